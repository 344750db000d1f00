/* Faults at exact system calls of a real process: loaded with LD_PRELOAD, armed by tests/programs/faulty.py.

   Counts the calls that change something below a folder, or that send to a socket, and at one of them fails with an
   error number, sends a signal to its own process, or moves the clock. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { OPEN = 1, WRITE = 2, SYNC = 4, RENAME = 8, REMOVE = 16, MKDIR = 32, SEND = 64 };
enum { FAIL = 1, SIGNAL = 2, CLOCK = 3, BUDGET = 4 };

static char prefix[4096], marker[4096];
static int kinds, action, value, sticky;
static long at;
static atomic_long seen, written;
static atomic_int armed, offset;

void fault_arm(const char *below, const char *struck, int which, long n, int what, int with, int forever) {
    snprintf(prefix, sizeof prefix, "%s", below);
    snprintf(marker, sizeof marker, "%s", struck);
    kinds = which, at = n, action = what, value = with, sticky = forever;
    armed = 1;
}

long fault_seen(void) { return seen; }

static void mark(void) {
    int fd = syscall(SYS_openat, AT_FDCWD, marker, O_CREAT | O_WRONLY, 0644);
    if (fd >= 0) syscall(SYS_close, fd);
}

/* Whether the call is to fail with errno. */
static int strikes(int kind) {
    if (!(kinds & kind) || action == BUDGET) return 0;
    long n = ++seen;
    if (n != at && !(sticky && n > at)) return 0;
    if (n == at) mark();
    if (action == SIGNAL) kill(getpid(), value);
    if (action == CLOCK) offset += value;
    if (action == FAIL) errno = value;
    return action == FAIL;
}

static int below(const char *path) { return armed && path && !strncmp(path, prefix, strlen(prefix)); }

static int inside(int fd) {
    char name[64], path[4096];
    if (!armed) return 0;
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(name, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return below(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPENING(name, given, passed, path)                                                                             \
    int name given {                                                                                                   \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = va_arg(more, mode_t);                                                                            \
        va_end(more);                                                                                                  \
        if ((flags & (O_CREAT | O_WRONLY | O_RDWR)) && below(path) && strikes(OPEN)) return -1;                        \
        return REAL(name) passed;                                                                                      \
    }
OPENING(open, (const char *path, int flags, ...), (path, flags, mode), path)
OPENING(open64, (const char *path, int flags, ...), (path, flags, mode), path)
OPENING(openat, (int dir, const char *path, int flags, ...), (dir, path, flags, mode), path)
OPENING(openat64, (int dir, const char *path, int flags, ...), (dir, path, flags, mode), path)

#define WITH_PATH(kind, name, given, passed, path)                                                                     \
    int name given { return below(path) && strikes(kind) ? -1 : REAL(name) passed; }
WITH_PATH(RENAME, rename, (const char *a, const char *b), (a, b), b)
WITH_PATH(RENAME, link, (const char *a, const char *b), (a, b), b)
WITH_PATH(RENAME, linkat, (int da, const char *a, int db, const char *b, int flags), (da, a, db, b, flags), b)
WITH_PATH(REMOVE, unlink, (const char *a), (a), a)
WITH_PATH(REMOVE, rmdir, (const char *a), (a), a)
WITH_PATH(MKDIR, mkdir, (const char *a, mode_t mode), (a, mode), a)
int unlinkat(int dir, const char *a, int flags) { return inside(dir) && strikes(REMOVE) ? -1 : REAL(unlinkat)(dir, a, flags); }

int fsync(int fd) { return inside(fd) && strikes(SYNC) ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return inside(fd) && strikes(SYNC) ? -1 : REAL(fdatasync)(fd); }

/* Bytes that may still be written; -1 for no limit. */
static ssize_t allowed(size_t size) {
    if (action != BUDGET) return -1;
    long before = atomic_fetch_add(&written, (long)size);
    if (before + (long)size <= at) return -1;
    mark();
    return before >= at ? 0 : at - before;
}

#define WRITING(name, given, passed, fd, size)                                                                         \
    ssize_t name given {                                                                                               \
        if (inside(fd)) {                                                                                              \
            ssize_t most = allowed(size);                                                                              \
            if (!most) {                                                                                               \
                errno = value;                                                                                         \
                return -1;                                                                                             \
            }                                                                                                          \
            if (most > 0) size = most;                                                                                 \
            if (strikes(WRITE)) return -1;                                                                             \
        }                                                                                                              \
        return REAL(name) passed;                                                                                      \
    }
WRITING(write, (int fd, const void *data, size_t size), (fd, data, size), fd, size)
WRITING(pwrite, (int fd, const void *data, size_t size, off_t from), (fd, data, size, from), fd, size)
WRITING(pwrite64, (int fd, const void *data, size_t size, off64_t from), (fd, data, size, from), fd, size)

ssize_t send(int fd, const void *data, size_t size, int flags) {
    return armed && strikes(SEND) ? -1 : REAL(send)(fd, data, size, flags);
}

static void moved(clockid_t clock, struct timespec *t) {
    if (offset && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) t->tv_sec += offset;
}
int clock_gettime(clockid_t clock, struct timespec *t) {
    int done = REAL(clock_gettime)(clock, t);
    moved(clock, t);
    return done;
}
time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
