"""The walks in examples/ run to the end, and train on what their page says."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from entrodrop_prep.store.rows import to_rows
from entrodrop_prep.store.scored import ScoredDataset
from entrodrop_prep.verification.run import verify

pytestmark = pytest.mark.training

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Any:
    """Runs a script; returns its directory and what it printed."""

    def run(name: str) -> tuple[Path, str]:
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), str(tmp_path / "out")])
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return tmp_path / "out", capfd.readouterr().out

    return run


def trained_texts(out: Path) -> list[str]:
    """What each scored row trains on, as text."""
    tokenizer = AutoTokenizer.from_pretrained(out / "scored" / "tokenizer")
    texts = []
    for batch in ScoredDataset(out / "scored").batches():
        for r in range(batch.num_rows):
            row = to_rows(batch.slice(r, 1))
            texts.append(tokenizer.decode(row.input_ids[row.trainable]))
    return texts


def check(out: Path, said: str) -> str:
    """The masks hold, the page is there, the model got better at rows it did not see; returns the recipe."""
    assert not verify(str(out / "masked"), [str(out / "scored"), f"eval={out / 'held-out'}"]).findings
    assert (out / "report.html").stat().st_size > 50_000
    losses = [float(x) for x in re.findall(r"\d\.\d{3}", said.rpartition("validation loss")[2])]
    assert len(losses) >= 3
    assert losses[-1] < losses[0]
    (model,) = out.glob("trained-*/model.safetensors")
    assert model.stat().st_size > 0
    return (out / "train.py").read_text(encoding="utf-8")


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "scored.jsonl").read_text(encoding="utf-8").splitlines()]


def test_maths_trains_on_the_answers(walk: Any) -> None:
    out, said = walk("maths.py")
    check(out, said)
    rows = rows_of(out)
    for row, text in zip(rows, trained_texts(out), strict=True):
        a, b = map(int, re.findall(r"\d+", row["prompt"]))
        assert row["completion"].endswith(f"answer: {a + b}")
        assert text.removesuffix("<|endoftext|>") == row["completion"]


def test_code_keeps_documents_of_a_packed_row_apart(walk: Any) -> None:
    out, said = walk("code.py")
    assert "kept apart by position_ids" in check(out, said).replace("\n# ", " ")
    windows = trained_texts(out)
    assert len(windows) > len(rows_of(out)), "no file is long enough to be split"


def test_tool_chat_trains_on_calls_and_answers(walk: Any) -> None:
    out, said = walk("tool_chat.py")
    assert "TrainableTokenLoss" in check(out, said)
    for row, text in zip(rows_of(out), trained_texts(out), strict=True):
        call, answer = (m for m in row["messages"] if m["role"] == "assistant")
        arguments = json.dumps(call["tool_calls"][0]["function"]["arguments"])
        assert text == f"call temperature {arguments}<|endoftext|>{answer['content']}<|endoftext|>"
