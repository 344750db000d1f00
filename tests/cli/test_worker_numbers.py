"""``--worker``: what is understood, and what schedulers say."""

from __future__ import annotations

from typing import Any

import pytest

from entrodrop_prep import cli
from entrodrop_prep.config import ScoreConfig
from entrodrop_prep.config.workers import Worker, worker_of
from entrodrop_prep.errors import ConfigError

FOUND: dict[str, tuple[dict[str, Any], Worker]] = {
    "Slurm array": ({"SLURM_ARRAY_TASK_ID": 2, "SLURM_ARRAY_TASK_MIN": 0, "SLURM_ARRAY_TASK_COUNT": 4}, Worker(2, 4)),
    "Slurm array from 1": (
        {"SLURM_ARRAY_TASK_ID": 4, "SLURM_ARRAY_TASK_MIN": 1, "SLURM_ARRAY_TASK_COUNT": 4},
        Worker(3, 4),
    ),
    "Slurm array 1-9:4": (
        {
            **{"SLURM_ARRAY_TASK_ID": 9, "SLURM_ARRAY_TASK_MIN": 1},
            **{"SLURM_ARRAY_TASK_STEP": 4, "SLURM_ARRAY_TASK_COUNT": 3},
        },
        Worker(2, 3),
    ),
    "Slurm array 3,7": (
        {"SLURM_ARRAY_TASK_ID": 7, "SLURM_ARRAY_TASK_MIN": 3, "SLURM_ARRAY_TASK_COUNT": 2},
        Worker(0, 2),
    ),
    "Slurm array, several tasks in each": (
        {
            **{"SLURM_ARRAY_TASK_ID": 2, "SLURM_ARRAY_TASK_MIN": 1, "SLURM_ARRAY_TASK_COUNT": 2},
            **{"SLURM_PROCID": 3, "SLURM_NTASKS": 4},
        },
        Worker(7, 8),
    ),
    "Slurm": ({"SLURM_PROCID": 1, "SLURM_NTASKS": 2}, Worker(1, 2)),
    "Kubernetes": ({"JOB_COMPLETION_INDEX": 5, "JOB_COMPLETIONS": 6}, Worker(5, 6)),
    "Open MPI": ({"OMPI_COMM_WORLD_RANK": 0, "OMPI_COMM_WORLD_SIZE": 3}, Worker(0, 3)),
}
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "a word": ("first", {}, "--worker 'first' is not understood; give I/N, such as 0/4, or auto"),
    "no number": ("1", {}, "--worker '1' is not understood"),
    "not two numbers": ("a/4", {}, "--worker 'a/4': not two numbers"),
    "negative": ("-1/4", {}, "--worker '-1/4': not two numbers"),
    "too large": ("4/4", {}, "--worker '4/4': 4 is not below 4; give I/N with I from 0 to N - 1, such as 0/4"),
    "none": ("0/0", {}, "--worker '0/0': 0 is not below 0"),
    "nothing found": (
        "auto",
        {},
        "--worker auto finds none of SLURM_ARRAY_TASK_ID, SLURM_PROCID, JOB_",
    ),
    "no count": (
        "auto",
        {"JOB_COMPLETION_INDEX": 0},
        "--worker auto finds JOB_COMPLETION_INDEX, but no JOB_COMPLETIONS; set JOB_COMPLETIONS, or give --worker I/N",
    ),
    "no number found": ("auto", {"SLURM_PROCID": "x", "SLURM_NTASKS": 2}, "SLURM_PROCID=x of SLURM_NTASKS=2: not two"),
    "too large a number found": (
        "auto",
        {"OMPI_COMM_WORLD_RANK": 2, "OMPI_COMM_WORLD_SIZE": 2},
        "OMPI_COMM_WORLD_RANK=2 of OMPI_COMM_WORLD_SIZE=2: 2 is not below 2",
    ),
    "no element": ("auto", {"SLURM_ARRAY_TASK_ID": "x"}, "--worker auto: SLURM_ARRAY_TASK_ID=x is not a number"),
    "below the first": (
        "auto",
        {"SLURM_ARRAY_TASK_ID": 1, "SLURM_ARRAY_TASK_MIN": 2},
        "SLURM_ARRAY_TASK_ID=1 SLURM_ARRAY_TASK_MIN=2 SLURM_ARRAY_TASK_STEP=1 SLURM_ARRAY_TASK_COUNT=1 cannot be",
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_schedulers_say(case: str) -> None:
    environment, expected = FOUND[case]
    assert worker_of("auto", {name: str(value) for name, value in environment.items()}) == expected


def test_a_number_that_is_given_goes_first() -> None:
    assert worker_of("1/3", {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}) == Worker(1, 3)


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(case: str) -> None:
    text, environment, message = WRONG[case]
    with pytest.raises(ConfigError) as e:
        worker_of(text, {name: str(value) for name, value in environment.items()})
    assert message in str(e.value)


def test_the_command_refuses_it_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    command = ["score", "rows.jsonl", "--model", "m", "--out", "o"]
    assert cli.run([*command, "--worker", "2/2"]) == 2
    assert capfd.readouterr().err == (
        "error: --worker '2/2': 2 is not below 2; give I/N with I from 0 to N - 1, such as 0/4\n"
    )
    assert cli.run([*command, "--worker", "0/2", "--overwrite"]) == 2
    assert capfd.readouterr().err.startswith("error: --overwrite and --worker exclude each other: ")


def test_a_time_out_is_above_zero() -> None:
    with pytest.raises(ConfigError, match="--claim-timeout"):
        ScoreConfig(source="s", model="m", out="o", worker="0/1", claim_timeout=0)
