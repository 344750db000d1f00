"""A warm start changes nothing for the program: each is run so, and by a new Python, and they do the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers.warm import CLIENT, MODEL_CLIENT, Warm

PYTHON = Warm("json", "pyarrow", SET_WHILE_IMPORTING="1")
SHOW = """
import atexit, os, signal, sys, threading, time
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.1), print("of a thread"))).start()
print(__name__, sys.argv, sys.path, sys.executable, os.getcwd(), os.getsid(0) == os.getpid())
print({k: v for k, v in os.environ.items() if k != "_"}, sys.stdin.read())
print([(s.encoding, s.errors, s.line_buffering, s.fileno()) for s in (sys.stdin, sys.stdout, sys.stderr)])
print([str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE)])
print([name for name in sys.modules if name.startswith("entrodrop_prep")])
sys.stderr.write("an error")
"""
SETTINGS = """
import inspect, json, pathlib, sys
import datasets, huggingface_hub.repocard, transformers.utils

PACKAGES = ("huggingface_hub", "datasets")

def shown(value):
    '''What may come from the environment: no code, no address in memory.'''
    if isinstance(value, (str, bytes, bool, int, float, pathlib.PurePath, type(None))):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return list(map(shown, value))
    if inspect.ismethod(value):
        return shown(value.__self__)
    if inspect.isroutine(value):
        return shown([getattr(value, "__defaults__", None), *(getattr(value, "__kwdefaults__", None) or {}).values()])
    if type(value).__module__.split(".")[0] in PACKAGES and hasattr(value, "__dict__"):
        return {key: shown(one) for key, one in vars(value).items() if isinstance(one, (str, bool)) and key[0] != "_"}
    return ""

found = {}
for name, module in list(sys.modules.items()):
    if name.split(".")[0] in PACKAGES or name in ("transformers.utils", "transformers.utils.hub"):
        for key, value in list(vars(module).items()):
            for inner, one in (vars(value).items() if inspect.isclass(value) else [("", value)]):
                if not key.startswith("__") and not inner.startswith("_") and key != "SESSION_ID":  # drawn
                    found[f"{name} {key} {inner}"] = shown(one)
print(json.dumps(found))
"""
ENDS = {
    "a code": "sys.exit(3)",
    "none": "sys.exit()",
    "words": "sys.exit('no')",
    "an error": "raise ValueError('wrong')",
    "Ctrl-C": "raise KeyboardInterrupt",
    "a signal": "os.kill(os.getpid(), signal.SIGTERM)",
    "at once": "os._exit(9)",
}


def both(command: list[str], **more: Any) -> list[Any]:
    """Exit code, stdout and last line of stderr, cold and warm."""
    more = {"capture_output": True, "text": True, "input": "typed", **more}
    more["env"] = {k: v for k, v in more.get("env", os.environ).items() if k != "PYTHONUNBUFFERED"}
    done = [run([sys.executable, *command], **more) for run in (subprocess.run, PYTHON.run)]
    return [(d.returncode, d.stdout.splitlines(), d.stderr.splitlines()[-1:]) for d in done]


@pytest.mark.parametrize("session", [False, True])
@pytest.mark.parametrize("way", ["-m", "-c", "script"])
def test_a_program_finds_what_it_finds_in_a_new_python(way: str, session: bool, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "shown.py").write_text(SHOW)
    command = {"-m": ["-m", "shown"], "-c": ["-c", SHOW], "script": [str(tmp_path / "shown.py")]}[way]
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{tmp_path}:/nowhere",
        "LC_ALL": "C.UTF-8",
        "MINE": "\u00e4",
    }
    environment["PYTHONIOENCODING"] = "utf-8:strict"
    cold, warm = both([*command, "a", ""], env=environment, cwd=tmp_path / "here", start_new_session=session)
    assert cold == warm
    assert "typed" in cold[1][1]


@pytest.mark.parametrize("end", ENDS)
def test_it_ends_as_it_ends_in_a_new_python(end: str) -> None:
    cold, warm = both(["-c", f"import os, signal, sys\nprint('so far')\n{ENDS[end]}"])
    assert cold == warm


def test_signals_reach_it_and_descriptors_are_passed() -> None:
    ours, theirs = os.pipe()
    code = "import os, sys, time; os.write(int(sys.argv[1]), b'here'); time.sleep(60)"
    process = PYTHON.popen([sys.executable, "-c", code, str(theirs)], pass_fds=[theirs])
    os.close(theirs)
    assert os.read(ours, 4) == b"here"
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(process.wait) for _ in range(3)]
        os.kill(process.pid, signal.SIGKILL)
        assert {one.result(30) for one in waiting} == {process.poll()} == {-signal.SIGKILL}
    assert os.read(ours, 1) == b""
    os.close(ours)


def test_the_clients_of_a_hub_find_what_their_environment_says(tmp_path: Path) -> None:
    """Nothing is left of the environment in which they were imported: every setting is that of a new Python."""
    told = {"HF_ENDPOINT": "http://127.0.0.1:9/", "HF_HOME": str(tmp_path), "HF_DATASETS_OFFLINE": "1"}
    told |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_ETAG_TIMEOUT": "7"}
    environment = {"PATH": os.environ["PATH"], "HOME": "/nowhere", **told}
    cold, *warm = (
        json.loads(run([sys.executable, "-c", SETTINGS], env=environment, capture_output=True, check=True).stdout)
        for run in (subprocess.run, CLIENT.run, MODEL_CLIENT.run)
    )
    assert len(cold) > 1_000
    for found in warm:
        assert {key: (value, found[key]) for key, value in cold.items() if found.get(key, value) != value} == {}
    assert str(tmp_path) in cold["datasets.config HF_DATASETS_CACHE "]


@pytest.mark.parametrize("module", ["entrodrop_prep", "helpers.scored"])
def test_nothing_of_ours_is_imported_before(module: str) -> None:
    with pytest.raises(AssertionError):
        Warm(module, PYTHONPATH=os.pathsep.join(sys.path)).run([sys.executable, "-c", ""])
