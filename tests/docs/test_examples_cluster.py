"""Files for schedulers in examples/ and their page: parsed, compared with what schedulers take, their commands run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import entrodrop_prep
from entrodrop_prep.config.workers import Worker, worker_of
from entrodrop_prep.terminal.preemption import EXIT_CODE, GRACE
from entrodrop_prep.verification.run import verify
from helpers.models import write_rows
from helpers.pages import ROOT, console_lines, settings_of
from helpers.vllm import VLLM, environment

EXAMPLES = ROOT / "examples"
MODEL = Path(entrodrop_prep.__file__).parent / "demo" / "model"
PAGE = ROOT / "docs" / "workers.md"
ARRAY = {
    **{"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "0"},
    **{"SLURM_ARRAY_TASK_COUNT": "8", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
}


def example(name: str) -> str:
    return (EXAMPLES / name).read_text(encoding="utf-8")


# --- Slurm


def test_the_array_is_a_shell_script() -> None:
    subprocess.run(["bash", "-n", EXAMPLES / "slurm_array.sbatch"], check=True)
    given = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", example("slurm_array.sbatch"), re.MULTILINE))
    assert given["array"] == "0-7"
    assert given["open-mode"] == "append"
    assert "requeue" in given
    name, _, seconds = given["signal"].partition("@")  # no B: in front of it, which would send it to the script alone
    assert name == "SIGUSR1"
    assert int(seconds) >= 2 * GRACE
    last = max(m.start() for m in re.finditer("^#SBATCH", example("slurm_array.sbatch"), re.MULTILINE))
    assert last < example("slurm_array.sbatch").index("\nsrun ")  # Slurm reads them up to the first command


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Where ``srun`` runs its command and ``scontrol`` notes its arguments, as Slurm's do; and this ``entrodrop``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {
        "srun": 'exec "$@"',
        "scontrol": f'echo "$@" > {tmp_path}/scontrol',
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    VLLM.program(folder / "entrodrop", "-m", "entrodrop_prep")
    return folder


def submit(programs: Path, **more: str) -> int:
    env = {**environment(), **ARRAY, "PYTHONPATH": str(ROOT), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    script = EXAMPLES / "slurm_array.sbatch"
    return subprocess.run(["bash", script], env={**env, **more}, stdout=subprocess.DEVNULL).returncode


def test_the_array_scores(programs: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": f"Number {i} of some."} for i in range(5)])
    assert submit(programs, SOURCE=str(rows), MODEL=str(MODEL), OUT=str(tmp_path / "out")) == 0
    assert not verify(str(tmp_path / "out")).findings
    assert not (tmp_path / "scontrol").exists()


@pytest.mark.parametrize("code", [EXIT_CODE, 2, 1, 137])
def test_the_array_is_put_into_the_queue_again_when_it_was_preempted(code: int, programs: Path, tmp_path: Path) -> None:
    (programs / "entrodrop").write_text(f"#!/bin/sh\nexit {code}\n")
    assert submit(programs, SOURCE="s", MODEL="m", OUT="o") == code
    assert (tmp_path / "scontrol").exists() == (code == EXIT_CODE)
    if code == EXIT_CODE:
        assert (tmp_path / "scontrol").read_text() == "requeue 7_1\n"


# --- Kubernetes


def test_the_job_of_kubernetes(monkeypatch: pytest.MonkeyPatch) -> None:
    job = yaml.safe_load(example("kubernetes_job.yaml"))
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec = job["spec"]
    assert spec.keys() == {
        *("completionMode", "completions", "parallelism", "backoffLimit", "podFailurePolicy", "template"),
    }
    assert spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # which a podFailurePolicy needs
    assert pod["terminationGracePeriodSeconds"] >= 2 * GRACE
    (container,) = pod["containers"]
    told = {e["name"]: e["value"] for e in container["env"]}
    assert told == {"JOB_COMPLETIONS": str(spec["completions"])}  # texts: a number is refused
    for name, value in {**told, "JOB_COMPLETION_INDEX": "7"}.items():
        monkeypatch.setenv(name, value)
    assert worker_of("auto") == Worker(7, 8)
    config = settings_of(container["command"][1:])
    assert container["command"][0] == "entrodrop"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    for path in (config.source, config.model, config.out):
        assert any(path.startswith(f"{mount}/") for mount in mounts)


def test_what_kubernetes_does_with_exit_codes() -> None:
    job = yaml.safe_load(example("kubernetes_job.yaml"))
    rules = job["spec"]["podFailurePolicy"]["rules"]
    names = {container["name"] for container in job["spec"]["template"]["spec"]["containers"]}
    codes: dict[int, str] = {}
    for rule in rules:
        assert rule["action"] in ("Ignore", "FailJob", "Count", "FailIndex")
        assert len({"onExitCodes", "onPodConditions"} & rule.keys()) == 1
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] in names
            assert rule["onExitCodes"]["operator"] == "In"
            values = rule["onExitCodes"]["values"]
            assert values == sorted(set(values))
            assert 0 not in values
            codes |= dict.fromkeys(values, rule["action"])
    assert codes == {EXIT_CODE: "Ignore", 2: "FailJob"}
    assert {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]} in rules


# --- SkyPilot


def test_the_task_of_skypilot(tmp_path: Path) -> None:
    task = yaml.safe_load(example("skypilot.yaml"))
    assert task.keys() <= {"name", "num_nodes", "resources", "workdir", "volumes", "envs", "setup", "run"}
    recovery = task["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [EXIT_CODE]
    assert recovery.keys() <= {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"}
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    (tmp_path / "entrodrop").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "entrodrop").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SKYPILOT_NODE_RANK": "3", "SKYPILOT_NUM_NODES": "4"}
    done = subprocess.run(["bash", "-c", task["run"]], env=env, capture_output=True, text=True, check=True)
    config = settings_of(done.stdout.splitlines())
    assert worker_of(config.worker) == Worker(3, task["num_nodes"])
    for path in (config.source, config.model, config.out):
        assert any(path.startswith(f"{mount}/") for mount in task["volumes"])
    (requirement,) = shlex.split(task["setup"])[2:]
    assert requirement == f"{task['workdir']}[vllm]"


# --- docs/workers.md


@pytest.mark.parametrize("line", console_lines(PAGE), ids=lambda line: " ".join(line.words)[:60])
def test_a_command_line_of_the_page_is_right(line: Any) -> None:
    assert line.arguments is not None
    config = settings_of(line.arguments)
    assert (config.worker is None) == (config.workers is not None) == (config.ray is not None)


def test_the_page_names_every_example_and_variable() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in ("slurm_array.sbatch", "kubernetes_job.yaml", "skypilot.yaml"):
        assert f"examples/{name}" in page
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_PROCID", "JOB_COMPLETION_INDEX", "OMPI_COMM_WORLD_RANK"):
        assert f"`{name}`" in page
    assert f"exits with **{EXIT_CODE}**" in page
    assert f"{GRACE:.0f} seconds" in page
