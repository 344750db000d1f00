"""The commands that README and docs/vllm.md give for vLLM, run on the CPU engine; and the table of architectures."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from entrodrop_prep.backends.architectures import DIFFERING, PROVEN
from entrodrop_prep.verification.run import verify
from helpers.architectures import CONFIGS, HALF
from helpers.models import save_model
from helpers.servers import free_port
from helpers.vllm import VLLM

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND = re.compile(r"^    (entrodrop (?:score|serve) .*)$", re.MULTILINE)
STAND_INS = {"my_documents.jsonl": str(ROOT / "examples" / "rows.jsonl"), "org/base-model": None}
MODEL = str(ROOT / "entrodrop_prep" / "demo" / "model")


def commands(text: str) -> list[str]:
    return COMMAND.findall(text)


def test_the_readme_gives_the_commands_of_the_page() -> None:
    section = README.partition("## Score with vLLM")[2].partition("\n## ")[0]
    assert commands(section) == commands(PAGE)
    assert len(commands(PAGE)) == 3


def test_the_page_says_of_each_family_what_vllm_does() -> None:
    section = PAGE.partition("## Which architectures")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", section, re.MULTILINE)
    said = [(name, verdict, figure) for verdict, figure, names in rows for name in re.findall(r"`(\w+)`", names)]
    assert {name for name, verdict, _ in said if verdict.startswith("proven")} == set(PROVEN)
    assert {name for name, verdict, _ in said if verdict == "proven, by the mean"} == set(HALF)
    assert {name: figure for name, verdict, figure in said if verdict == "refused"} == DIFFERING
    assert len(said) == len(PROVEN) + len(DIFFERING)


def arguments(command: str, port: int, model: str = MODEL) -> list[str]:
    words = [STAND_INS.get(word, word) or model for word in shlex.split(command.replace("8000", str(port)))]
    return [sys.executable, "-m", "entrodrop_prep", *words[1:]]


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def run(command: list[str], folder: Path) -> Any:
    return VLLM.run(command, cwd=folder, env=environment(), capture_output=True, text=True)


def test_score_with_vllm_on_this_machine(tmp_path: Path) -> None:
    done = run(arguments(commands(PAGE)[0], 0), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "scoring with vllm on cpu" in done.stdout
    assert "12 of 12 rows" in done.stdout
    assert verify(str(tmp_path / "scored")).findings == []
    check_scores(tmp_path / "scored", MODEL)


def gemma_as_published(directory: Path) -> str:
    """A small Gemma 3 with eyes, in bfloat16, with the demo's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = CONFIGS["Gemma3ForConditionalGeneration"]()
    config.text_config.vocab_size, config.text_config.max_position_embeddings = len(tokenizer), 512
    save_model(directory, config, scale=8.0)
    weights = load_file(directory / "model.safetensors")
    save_file({n: w.bfloat16() for n, w in weights.items()}, directory / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**described, "dtype": "bfloat16"}))
    tokenizer.save_pretrained(directory)
    return str(directory)


def check_scores(folder: Path, model: str) -> None:
    """Entropies as transformers has them in float32, in the mean; vLLM ran in bfloat16."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    rows = [row for path in sorted(folder.glob("shard-*.parquet")) for row in pq.read_table(path).to_pylist()]
    differences, beside = [], []
    for row in rows:
        with torch.inference_mode():
            logp = lm(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        exact = -(logp.exp() * logp).sum(-1).numpy()
        differences.append(np.abs(np.array(row["entropy"][1:], np.float32) - exact))
        beside.append(np.abs(np.diff(exact)))
    assert len(rows) >= 12
    assert np.concatenate(differences).mean() < 0.02
    assert np.concatenate(beside).mean() > 0.1


def test_score_against_a_server_that_serve_starts(tmp_path: Path) -> None:
    """A multimodal model, of which the text side is served and compared."""
    model, port = gemma_as_published(tmp_path / "model"), free_port()
    _, serve, score = commands(PAGE)
    with (tmp_path / "said").open("w+") as said:
        server = subprocess.Popen(arguments(serve, port, model), stdout=said, env=environment(), start_new_session=True)
        try:
            deadline = time.monotonic() + 400
            while "ready: " not in (tmp_path / "said").read_text() and time.monotonic() < deadline:
                assert server.poll() is None
                time.sleep(0.2)
            lines = (tmp_path / "said").read_text().splitlines()
            assert lines[0].startswith("python -m vllm.entrypoints.openai.api_server --host=127.0.0.1")
            assert lines[1] == f"ready: http://127.0.0.1:{port}"
            assert "scoring with server (" in run(arguments(score, port, model), tmp_path).stdout
            assert verify(str(tmp_path / "scored")).findings == []
            check_scores(tmp_path / "scored", model)
            check_other_weights_are_refused(tmp_path, score, port, model)
            check_another_number_format_is_refused(tmp_path, score, port, model)
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)


def check_other_weights_are_refused(folder: Path, score: str, port: int, model: str) -> None:
    """A model of the same name and shape is another one."""
    other = shutil.copytree(model, folder / "other" / "model")
    weights = load_file(other / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] * 1.01}, other / "model.safetensors", metadata={"format": "pt"})
    words = [str(other) if word == model else word for word in arguments(score, port, model)]
    done = run(words, folder / "other")
    assert done.returncode == 2
    assert "it serves other weights than those of model" in done.stderr


def check_another_number_format_is_refused(folder: Path, score: str, port: int, model: str) -> None:
    done = run([*arguments(score, port, model), "--dtype", "float32", "--overwrite"], folder)
    assert done.returncode == 2
    assert "it runs in bfloat16, this run is to be in float32; give --dtype bfloat16, or serve it with" in done.stderr


def test_serve_says_what_it_cannot_do(tmp_path: Path) -> None:
    for flags, said in (
        (["--engine-arg", "enable_prefix_caching=true"], "enable_prefix_caching cannot be set"),
        (["--engine-arg", "nonsense"], "write it as KEY=VALUE"),
        (["--port", "0"], "--port"),
        (["--max-length", "100000"], "--max-length 100000"),
    ):
        command = [sys.executable, "-m", "entrodrop_prep", "serve", MODEL, *flags, "--print-command"]
        done = VLLM.run(command, capture_output=True, text=True)
        assert done.returncode == 2, flags
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_port_that_is_taken_is_an_error() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        command = [sys.executable, "-m", "entrodrop_prep", "serve", MODEL, "--port", str(s.getsockname()[1])]
        done = VLLM.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "choose another --port" in done.stderr
