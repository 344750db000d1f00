"""Python processes that start without importing: forked from one that has imported what takes seconds.

    python = Warm("pandas", "pyarrow.parquet")
    done = python.run([sys.executable, "-m", "entrodrop_prep", "--help"], capture_output=True, text=True)

Each is a process with a pid, signals, pipes and an exit status of its own, and begins as Python begins: environment,
working directory, descriptors, ``sys.argv`` and ``sys.path`` are set before its program runs. It only finds some
modules imported. Of those the ones that read the environment when they are imported are run again (``reread``); none of
ours is among them.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import hashlib
import importlib
import inspect
import json
import multiprocessing.context
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

COLD = subprocess.Popen
REQUEST_BYTES = 1 << 20
THREADLESS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""What makes libraries start no thread when they are imported."""
READY, TAKEN = b"ready\n", b"taken\n"
START_SECONDS = 120
Program = Callable[[], Any]


class Warm:
    """A process that has imported some modules, and what it was asked to fork. It starts at the first request.

    One serves all processes that the tests run in.

    Args:
        modules: what it imports. Where one of them starts a thread, or is one of ours, it refuses to serve.
        reread: what of them reads the environment, in that order, and is to read each program's; see ``read_again``.
        nested: whether programs start their own Python processes so, too, and fork where they would spawn.
        environment: what is set while it imports.
    """

    def __init__(self, *modules: str, reread: Sequence[str] = (), nested: bool = False, **environment: str) -> None:
        self._asked = {"modules": modules}
        self._each = {"reread": reread, "nested": nested}
        self._environment = environment
        self._lock = threading.Lock()
        self._begun = False

    @property
    def popen(self) -> type[WarmPopen]:
        """``subprocess.Popen``, but that the Python of the tests is started warm."""
        root = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
        kind = hashlib.sha256(json.dumps([self._asked, self._environment]).encode()).hexdigest()
        address = f"\0warm-{root}-{kind}"
        with self._lock:
            if not self._begun:
                self._begin({"address": address, "root": root, **self._asked})
            self._begun = True
        return warm_popen(address, **self._each)

    def _begin(self, asked: dict[str, Any]) -> None:
        """Start the server, unless another process has done so; back when it listens."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("COVERAGE_", "HF_", "PYTHONPATH"))}
        server = COLD(
            [sys.executable, "-P", __file__, json.dumps(asked)],
            env={**kept, **THREADLESS, **self._environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        assert server.stdout is not None
        answer = server.stdout.readline()
        assert answer in (READY, TAKEN)
        if answer == TAKEN:
            server.wait()
        else:
            self._server = server

    def run(self, command: Sequence[Any], *, input: Any = None, check: bool = False, **more: Any) -> Any:
        """As ``subprocess.run``."""
        if more.pop("capture_output", False):
            more |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        if input is not None:
            more["stdin"] = subprocess.PIPE
        with self.popen(command, **more) as process:
            out, err = process.communicate(input)
        done = subprocess.CompletedProcess(command, process.returncode, out, err)
        if check:
            done.check_returncode()
        return done

    def program(self, path: Path, *command: str) -> None:
        """Make an executable that starts Python so, with these arguments and its own: for shells."""
        here = Path(__file__).resolve().parents[1]
        lines = ["import sys", f"sys.path.insert(0, {str(here)!r})", "from helpers.warm import warm_popen"]
        lines += [f"popen = warm_popen({self.popen.address!r}, **{self._each!r})"]
        lines += [f"sys.exit(popen([sys.executable, *{command!r}, *sys.argv[1:]]).wait())", ""]
        path.write_text("\n".join([f"#!{sys.executable} -IS", *lines]))
        path.chmod(0o755)


class WarmPopen(COLD):  # type: ignore[type-arg]
    """A process that the server at ``address`` forks. Any other program than its Python is started as ever."""

    address: ClassVar[str]
    reread: ClassVar[Sequence[str]]
    nested: ClassVar[bool]
    every: ClassVar[list[WarmPopen]] = []
    _connection: socket.socket | None = None

    def _execute_child(self, *given: Any) -> None:
        asked = inspect.signature(COLD._execute_child).bind(self, *given).arguments
        command = [os.fspath(word) for word in asked["args"]] if isinstance(asked["args"], list) else []
        if command[:1] != [sys.executable] or asked["preexec_fn"]:
            super()._execute_child(*given)
            return
        ours = [asked["p2cread"], asked["c2pwrite"], asked["errwrite"]]
        standard = [n if fd == -1 else fd for n, fd in enumerate(ours)]
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, REQUEST_BYTES)
        connect(self._connection, self.address)
        request = {
            "command": command[1:],
            "environment": dict(os.environ if asked["env"] is None else asked["env"]),
            "folder": os.fspath(asked["cwd"] or os.getcwd()),
            "session": asked["start_new_session"],
            "reread": self.reread,
            "nested": self.nested,
            "descriptors": [0, 1, 2, *asked["pass_fds"]],
        }
        socket.send_fds(self._connection, [json.dumps(request).encode()], [*standard, *asked["pass_fds"]])
        self.pid = int(self._connection.recv(100))
        self._child_created = True
        self.every.append(self)
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(asked[name] for name in pipes))

    def _ended(self, timeout: float | None) -> bool:
        """Whether it ended within so many seconds. Several threads may wait: its status stays where it is read."""
        if self.returncode is None and self._connection is not None:
            if not select.select([self._connection], [], [], timeout)[0]:
                return False
            self.returncode = os.waitstatus_to_exitcode(int(self._connection.recv(100, socket.MSG_PEEK)))
        return self.returncode is not None

    def _wait(self, timeout: float | None) -> int:
        if self._connection is None:
            return super()._wait(timeout)
        if not self._ended(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def _internal_poll(self, *more: Any, **named: Any) -> int | None:
        if self._connection is None:
            return super()._internal_poll(*more, **named)
        self._ended(0)
        return self.returncode


def connect(connection: socket.socket, address: str) -> None:
    """Connect to a server that may still import its modules for another process."""
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            return connection.connect(address)
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
        time.sleep(0.05)


def warm_popen(address: str, reread: Sequence[str], nested: bool) -> type[WarmPopen]:
    """The ``Popen`` of the server at an address."""
    return type("WarmPopen", (WarmPopen,), {"address": address, "reread": reread, "nested": nested})


def running(word: str) -> set[int]:
    """The pids of the processes that this one started warm, with that word in their command, and that run."""
    return {process.pid for process in WarmPopen.every if word in process.args and process.poll() is None}


MODEL_MODULES = (
    *("jinja2", "pandas", "pyarrow.compute", "pyarrow.dataset", "pyarrow.parquet", "pydantic.main", "tqdm.auto"),
    *("typer", "yaml", "torch", "transformers", "transformers.models.auto.modeling_auto"),
    *("transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama"),
    *("transformers.tokenization_utils_sentencepiece", "unittest.mock", "httpx", "datasets", "matplotlib.figure"),
)
"""What a command imports that runs a model."""
HUB_MODULES = (
    *("datasets.packaged_modules.parquet.parquet", "huggingface_hub._snapshot_download", "huggingface_hub.repocard"),
    *("jinja2", "pandas", "pyarrow.compute", "pyarrow.dataset", "pyarrow.json", "pyarrow.parquet", "pydantic.fields"),
    *("tqdm.auto", "typer", "unittest.mock", "yaml"),
)
"""What a command imports that uses a Hub, but for ``hf_xet``, which starts threads."""
READ = (
    *("huggingface_hub.constants", "datasets.config"),
    *("huggingface_hub.hf_api:api", "huggingface_hub.hf_file_system:hffs"),
)
"""What of them reads the environment."""
MODEL_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "7"}
OFFLINE = Warm(*MODEL_MODULES, **MODEL_ENVIRONMENT)
"""For commands that run a model and need no Hub."""
CLIENT = Warm(*HUB_MODULES, reread=READ, nested=True, HF_HUB_VERBOSITY="error", DATASETS_VERBOSITY="error")
"""For commands that use the Hub that their environment names."""
MODEL_CLIENT = Warm(*MODEL_MODULES, reread=(*READ, "transformers.utils.hub"), **MODEL_ENVIRONMENT)
"""For those that run a model, too."""


# The server, which is a program of its own.


def serve(address: str, root: int, modules: Sequence[str]) -> Program:
    """Fork until the process ``root`` ends. Returns in each forked process: what it is to run."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(address)
    except OSError:  # another one serves
        os.write(1, TAKEN)
        os._exit(0)
    ended = open(os.pidfd_open(root), "rb", buffering=0)  # noqa: SIM115 - it stays open
    for name in modules:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked"
    assert not [name for name in sys.modules if name.startswith("entrodrop_prep")]
    gc.collect()
    gc.freeze()  # collections in the forked ones leave what is shared alone
    wake, woken = socket.socketpair()
    for one in (wake, woken):
        one.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    listener.listen(64)
    os.write(1, READY)
    asking: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as events:
        for file in (ended, wake, listener):
            events.register(file, selectors.EVENT_READ)
        while True:
            for key, _ in events.select():
                if key.fileobj is ended:
                    os._exit(0)
                elif key.fileobj is listener:
                    client, _ = listener.accept()
                    data, descriptors, _, _ = socket.recv_fds(client, REQUEST_BYTES, 64)
                    pid = os.fork()
                    if not pid:
                        asked = json.loads(data)
                        used = [ended, wake, woken, listener, client, events, *asking.values()]
                        return begun(asked, descriptors, used, address)
                    for fd in descriptors:
                        os.close(fd)
                    client.send(str(pid).encode())
                    asking[pid] = client
                else:
                    with contextlib.suppress(BlockingIOError):
                        while wake.recv(4096):
                            pass
                    reap(asking)


def reap(asking: dict[int, socket.socket]) -> None:
    """Tell those who asked for a process that it has ended."""
    while asking:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        client = asking.pop(pid)
        with contextlib.suppress(OSError):
            client.send(str(status).encode())
        client.close()


def begun(asked: dict[str, Any], descriptors: list[int], used: list[Any], address: str) -> Program:
    """Make a forked process what a new one is; what it is to run."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for one in used:
        one.close()
    if asked["session"]:
        os.setsid()
    free = 1 + max(*descriptors, *asked["descriptors"])
    moved = [os.dup2(fd, free + n) for n, fd in enumerate(descriptors)]  # so that none is overwritten by another
    for fd in descriptors:
        os.close(fd)
    for fd, number in zip(moved, asked["descriptors"], strict=True):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    tempfile.tempdir = None
    sys.path[:0] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        errors = "backslashreplace" if name == "stderr" else "strict"
        stream = os.fdopen(asked["descriptors"].pop(0), mode, encoding="utf-8", errors=errors, closefd=False)
        stream.reconfigure(line_buffering=name == "stderr")
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if "COVERAGE_PROCESS_CONFIG" in os.environ:
        import coverage

        coverage.process_startup()
    read_again(asked["reread"])
    if asked["nested"]:
        subprocess.Popen = warm_popen(address, asked["reread"], True)  # type: ignore[misc]
        contexts = multiprocessing.context._concrete_contexts
        contexts["spawn"] = contexts["fork"]
    return lambda: run(asked["command"])


def read_again(names: Sequence[str]) -> None:
    """Run modules again in the environment of now, and initialize objects again that are given as MODULE:NAME.

    Other modules of these packages that had taken a value by its name get the new one.
    """
    packages = {name.partition(".")[0] for name in names}
    for name in names:
        module_name, _, of = name.partition(":")
        module = sys.modules[module_name]
        if of:
            getattr(module, of).__init__()
            continue
        before = dict(vars(module))
        importlib.reload(module)
        changed = {key: value for key, value in before.items() if vars(module)[key] is not value}
        others = [m for n, m in sys.modules.items() if n.partition(".")[0] in packages and n not in names]
        for other in others:
            for key in changed.keys() & vars(other).keys():
                if vars(other)[key] is changed[key]:
                    setattr(other, key, vars(module)[key])


def run(command: list[str]) -> None:
    """What Python does with these arguments."""
    if command[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(command[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = command
        sys.path[0] = str(Path(command[0]).resolve().parent)
        runpy.run_path(command[0], run_name="__main__")


def end_of(program: Program) -> None:
    """Run a program and end as Python does, but that modules are not taken apart, which takes as long as a start."""
    code, interrupted = 0, False
    try:
        program()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException as e:  # noqa: BLE001 - whatever it is, it is shown
        sys.excepthook(type(e), e, e.__traceback__)
        code, interrupted = 1, isinstance(e, KeyboardInterrupt)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    end_of(serve(**json.loads(sys.argv[1])))
