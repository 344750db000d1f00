"""What bad input gets beside the lines of ``helpers/bad_input.py``: bad rows that are skipped, and real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from entrodrop_prep import cli
from entrodrop_prep.errors import ModelError, SourceError
from entrodrop_prep.store import manifest
from helpers.models import (
    random_rows,
    rows_of,
    run_score,
    save_model,
    shards,
    tiny_llama,
    word_tokenizer,
    words,
    write_rows,
)
from helpers.warm import OFFLINE

V = 61
CONTEXT = 32
GOOD: list[dict[str, Any]] = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", tiny_llama(V, context=CONTEXT))


@dataclass
class Place:
    """A folder to make a mess in, with the paths that a command line names."""

    root: Path
    model: Path

    @property
    def source(self) -> Path:
        return self.root / "rows.jsonl"

    @property
    def out(self) -> Path:
        return self.root / "out"

    def rows(self, *rows: dict[str, Any]) -> None:
        write_rows(self.source, rows)

    def text(self, text: str | bytes) -> None:
        self.source.write_bytes(text.encode() if isinstance(text, str) else text)

    def own_model(self) -> Path:
        """A copy of the model that a test may break."""
        return shutil.copytree(self.model, self.root / "model")

    def arguments(self, *flags: str) -> list[str]:
        """A command line; flags that come later win."""
        return [
            "score",
            str(self.source),
            "--model",
            str(self.model),
            "--out",
            str(self.out),
            "--device",
            "cpu",
            "--backend",
            "transformers",
            *flags,
        ]


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Place:
    made = Place(tmp_path, model)
    made.rows(*GOOD)
    return made


def refused(place: Place, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line that a command line is answered with, less ``error: ``."""
    capsys.readouterr()
    code = cli.run(place.arguments(*flags))
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert "Traceback" not in captured.err
    assert len(lines) == 1
    assert captured.err.splitlines()[-1] == lines[0]
    assert "; " in lines[0]  # the fix
    if place.out.is_dir():
        left = {p.name for p in place.out.iterdir()}
        assert left <= {".lock", manifest.STATE}, left
    return lines[0].removeprefix("error: ")


Capture = pytest.CaptureFixture[str]


# --- the source -------------------------------------------------------------------------------------------------------


def test_the_first_bad_row_is_told_of_whatever_is_wrong_with_it(place: Place, capsys: Capture) -> None:
    lines = ['{"text": "w5 w6", "n": 1}'] * 1000  # the kept column's type comes from these
    lines += ['{"text": null, "n": 1}', '{"text": "w5", "n": "x"}', "[1]", '{"text": "w5 w6", "n": 1}']
    place.text("\n".join(lines) + "\n")
    flags = ("--keep-columns", "n")
    assert refused(place, capsys, *flags).startswith("rows.jsonl:1001: row 1000: column 'text' holds null")
    place.text("\n".join([*lines[:1000], *lines[1001:]]) + "\n")
    assert refused(place, capsys, *flags).startswith("rows.jsonl:1001: row 1000: column 'n', to be kept, is no int64")
    place.text("\n".join([lines[0], *lines[1000:]]) + "\n")
    run_score(place.source, place.model, place.out, on_bad_row="skip")
    rejected = [json.loads(text) for text in (place.out / "rejected.jsonl").read_text().splitlines()]
    assert [entry["row_id"] for entry in rejected] == [1, 3]


DEEP = '{"text": "w5 w6", "x": ' + "[" * 700 + "]" * 700 + "}"
CHAT = '{"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]'
MARKED = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} {% else %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% endif %}{% endfor %}"
)
WILD: list[tuple[str, str, str, str]] = [
    ('{"text": "w5 w6"}', DEEP.replace("[" * 700, "[" * 5000), "", "JSON nested more than 500 levels deep"),
    (f"{CHAT}}}", f'{CHAT}, "tools": "{"[" * 3000}"}}', MARKED, "column 'tools' is not JSON that can be read: maximum"),
    (
        f"{CHAT}}}",
        f'{CHAT}, "tools": "[{"1" * 5000}]"}}',
        MARKED,
        "column 'tools' is not JSON that can be read: Exceeds",
    ),
    (
        f"{CHAT}}}",
        f'{CHAT}, "chat_template_kwargs": {{"n": 0}}}}',
        "{{ 1 // n if n is defined else '' }}" + MARKED,
        "cannot render it: ZeroDivisionError",
    ),
    (
        f"{CHAT}}}",
        f'{CHAT}, "chat_template_kwargs": {{"n": 0}}}}',
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() if n is defined else '' }}" + MARKED,
        "cannot render it: RecursionError",
    ),
]


@pytest.mark.parametrize(("good", "bad", "template", "says"), WILD, ids=[says for _, _, _, says in WILD])
def test_a_row_that_goes_wild_is_a_bad_row(
    place: Place, capsys: Capture, good: str, bad: str, template: str, says: str
) -> None:
    place.text(f"{good}\n{bad}\n{good}\n")
    (place.root / "template.jinja").write_text(template)
    flags = ("--chat-template", str(place.root / "template.jinja")) if template else ()
    message = refused(place, capsys, *flags)
    assert message.startswith("rows.jsonl:2: row 1: ")
    assert says in message
    assert cli.run(place.arguments("--on-bad-row", "skip", *flags)) == 0
    assert "1 rows bad, listed in rejected.jsonl" in capsys.readouterr().out
    assert [row["row_id"] for row in rows_of(place.out)] == [0, 2]


def test_an_array_of_rows_that_go_deep(place: Place, capsys: Capture) -> None:
    source = place.root / "rows.json"
    source.write_text(f'[{{"text": "w5 w6"}}, {DEEP}]')
    place.text("")
    assert cli.run(["score", str(source), *place.arguments()[2:]]) == 2
    assert "row 1: JSON nested more than 500 levels deep" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_two_columns_of_one_name(place: Place, name: str) -> None:
    ids, others = pa.array([[5, 6, 7]]), [pa.array([1]), pa.array([2])]
    table = pa.table([ids, *others], names=["input_ids", "x", "x"])
    source = place.root / name
    if name == "rows.parquet":
        pq.write_table(table, source)
    else:
        with pa.ipc.new_file(source, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(SourceError, match=f"^{name}: two columns are called 'x'; rename one of them"):
        run_score(source, place.model, place.out, keep_columns=("x",))
    assert run_score(source, place.model, place.out).counts["rows"] == 1  # of those in use there is one each


def test_columns_that_cannot_be_kept(place: Place, capsys: Capture) -> None:
    place.text('{"input_ids": [5, 6], "x": ' + "[" * 60 + "1" + "]" * 60 + "}\n")
    message = refused(place, capsys, "--keep-columns", "x")
    assert message.startswith("rows.jsonl: column 'x' has no one type that can be stored: Parquet schema too deeply")
    maps = pa.array([[{"m": [("a", 1)]}]], pa.list_(pa.struct([("m", pa.map_(pa.string(), pa.int64()))])))
    pq.write_table(pa.table({"input_ids": [[5, 6, 7]], "x": maps}), place.root / "rows.parquet")
    with pytest.raises(SourceError, match="column 'x' holds maps, which are not supported; leave it out of --keep-col"):
        run_score(place.root / "rows.parquet", place.model, place.out, keep_columns=("x",))


def test_a_row_over_the_limit(place: Place, capsys: Capture) -> None:
    place.rows(*GOOD, {"input_ids": [5] * 9})
    message = refused(place, capsys, "--long-documents", "error", "--max-length", "8")
    assert message.startswith("rows.jsonl:3: row 2: it has 9 tokens, over --max-length 8; ")
    assert cli.run(place.arguments("--long-documents", "error", "--max-length", "9")) == 0


def test_nothing_is_left(place: Place, capsys: Capture) -> None:
    place.rows({"input_ids": [5]}, {"input_ids": []}, {"input_ids": [5] * 20}, {"input_ids": None})
    flags = ("--max-length", "8", "--long-documents", "drop", "--on-bad-row", "skip")
    code = cli.run(place.arguments(*flags))
    line = capsys.readouterr().err.splitlines()[-1]
    assert code == 2
    assert line == (
        "error: rows.jsonl: nothing is left to score: of 4 rows 2 have fewer than two tokens, 1 are too long, "
        "1 are bad; check the column and the limits"
    )
    assert not (place.out / manifest.NAME).exists()


# --- the model and the tokenizer --------------------------------------------------------------------------------------


def with_pickles(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def with_half_the_weights(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def test_names_that_are_empty(place: Place, capsys: Capture) -> None:
    """And mean no current directory."""
    for name in ("", " "):
        assert refused(place, capsys, "--model", name).startswith("the model's name is empty; ")
        assert cli.run(["score", name, *place.arguments()[2:]]) == 2
        assert capsys.readouterr().err.startswith("error: SOURCE is empty; ")


def test_a_rejected_row_without_an_id(place: Place) -> None:
    place.rows(*({**row, "name": name} for row, name in zip([*GOOD, *GOOD], ["a", None, "None", 7], strict=True)))
    run_score(place.source, place.model, place.out, id_column="name", on_bad_row="skip")
    (entry,) = [json.loads(text) for text in (place.out / "rejected.jsonl").read_text().splitlines()]
    assert (entry["row_id"], entry["id"]) == (1, None)


def test_pickles_load_when_asked_for(place: Place) -> None:
    path = place.own_model()
    with_pickles(path)
    run_score(place.source, path, place.out, allow_pickle=True)
    run_score(place.source, place.model, place.root / "safe")
    assert rows_of(place.out) == rows_of(place.root / "safe")


def test_a_tokenizer_with_more_tokens_fits_until_one_is_used(place: Place, capsys: Capture) -> None:
    word_tokenizer(V + 5).save_pretrained(place.root / "tokenizer")
    place.rows({"text": "w7 w8"}, {"text": f"w8 w{V + 1}"})
    message = refused(place, capsys, "--tokenizer", str(place.root / "tokenizer"))
    assert f"token id {V + 1} at position 1 is out of the vocabulary of {V} tokens" in message
    place.rows({"text": "w7 w8"})
    assert cli.run(place.arguments("--tokenizer", str(place.root / "tokenizer"))) == 0


def test_the_errors_of_the_library_are_of_one_family(place: Place) -> None:
    with pytest.raises(ModelError) as caught:
        run_score(place.source, place.root / "absent", place.out)
    assert caught.value.where == str(place.root / "absent")
    assert caught.value.fix
    assert "\n" not in str(caught.value)


# --- real processes ---------------------------------------------------------------------------------------------------


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=120)
    return process.returncode, err


LIMITED = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from entrodrop_prep.cli import main
main()
"""


def start(place: Place, *flags: str, file_bytes: int | None = None) -> subprocess.Popen[str]:
    """A command in a process of its own; no file of it may grow beyond ``file_bytes``."""
    program = ["-c", LIMITED, str(file_bytes)] if file_bytes else ["-m", "entrodrop_prep"]
    return OFFLINE.popen(
        [sys.executable, *program, *place.arguments(*flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_processes_end_with_one_line_and_code_2(place: Place) -> None:
    bad = Place(place.root / "bad", place.model)
    bad.root.mkdir()
    bad.text('{"text": "w5 w6"}\n{"text": \n')
    broken = place.own_model()
    with_half_the_weights(broken)
    runs = [
        (start(bad), "error: rows.jsonl:2: row 1: broken JSON: "),
        (start(place, "--model", str(broken)), f"error: {broken}: cannot load the model: "),
        (start(place, "--max-length", "x"), "error: --max-length 'x': input should be a valid integer"),
    ]
    for process, says in runs:
        code, err = finish(process)
        lines = err.splitlines()
        assert code == 2
        assert "Traceback" not in err
        assert [line.startswith("error: ") for line in lines].count(True) == 1
        assert lines[-1].startswith(says)
    assert shards(place.out) == shards(bad.out) == []


@pytest.mark.parametrize("what", ["shard", "tokenizer"])
def test_no_space_left(place: Place, what: str) -> None:
    if what == "shard":
        place.rows(*[{"input_ids": ids} for ids in random_rows(3000, V)])
    else:
        place.model = save_model(place.root / "large", tiny_llama(3000, context=CONTEXT))
    code, err = finish(start(place, file_bytes=40_000))
    line = err.splitlines()[-1]
    assert code == 2, err
    assert "Traceback" not in err
    assert line.startswith(f"error: {place.out}")
    assert "no space left" in line
    assert "make room and run the same command again: finished files are kept" in line
    assert not (place.out / manifest.NAME).exists()
    assert not list(place.out.glob(".tmp-*.part"))
    assert len(shards(place.out)) == (what == "tokenizer")
    assert cli.run(place.arguments()) == 0
    assert not list(place.out.glob(".tmp-*"))


def test_ctrl_c_says_how_to_go_on(place: Place) -> None:
    place.rows(*[{"text": words(ids)} for ids in random_rows(150, V)])
    process = start(place, "--rows-per-shard", "1", "--dtype", "float32")
    while len(shards(place.out)) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    code, err = finish(process)
    assert code == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "interrupted: finished files are kept; run the same command again to resume"
    there = shards(place.out)
    assert 3 <= len(there) < 150
    before = [(p.stat().st_mtime_ns, p.read_bytes()) for p in there]
    assert not list(place.out.glob(".tmp-*"))
    run_score(place.source, place.model, place.out, rows_per_shard=1)
    assert [(p.stat().st_mtime_ns, p.read_bytes()) for p in there] == before
    run_score(place.source, place.model, place.root / "whole", rows_per_shard=1)
    assert rows_of(place.out) == rows_of(place.root / "whole")


def shift_scores(monkeypatch: pytest.MonkeyPatch, shift: tuple[float, float]) -> None:
    """Add to every entropy and log-probability that transformers gives, once its probe is over."""
    from entrodrop_prep.backends import transformers as backend

    scored = backend.TransformersBackend._job

    def job(self: Any, *arguments: Any) -> Any:
        real = self.reduce

        def shifted(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            entropy, logprob = real(logits, targets)
            return entropy + shift[0], logprob + shift[1]

        monkeypatch.setattr(self, "reduce", shifted)
        return scored(self, *arguments)

    monkeypatch.setattr(backend.TransformersBackend, "_job", job)


@pytest.mark.parametrize(
    ("shift", "says"),
    [
        ((10.0, 0.0), "the entropy of token 1 of window 0 is"),
        ((-10.0, 0.0), "the entropy of token 1 of window 0 is"),
        ((0.0, 20.0), "the logprob of token 1 of window 0 is"),
        ((0.0, float("nan")), "the logprob of token 1 of window 0 is nan"),
        ((0.0, float("-inf")), "the logprob of token 1 of window 0 is -inf"),
    ],
)
@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_scores_out_of_range_are_refused_whatever_gives_them(
    shift: tuple[float, float],
    says: str,
    stored: str,
    place: Place,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not only by the self-check, which this backend does not have."""
    shift_scores(monkeypatch, shift)
    message = refused(place, capsys, "--score-dtype", stored)
    assert message.startswith("rows.jsonl:1: row 0: ")
    assert says in message


@pytest.mark.parametrize(("by", "least"), [(-300.0, -310.0), (-70_000.0, -65_504.0), (-1e30, -65_504.0)])
def test_half_precision_holds_every_logprob(
    place: Place, monkeypatch: pytest.MonkeyPatch, by: float, least: float
) -> None:
    place.rows(*GOOD)
    shift_scores(monkeypatch, (0.0, by))
    run_score(place.source, place.model, place.out, score_dtype="float16")
    found = [x for row in rows_of(place.out) for x in row["logprob"][1:]]
    assert all(least <= x <= max(by, least) for x in found)
    assert found
    assert cli.run(["verify", str(place.out)]) == 0
