"""Odd paths, odd files and odd numbers that once ended in a traceback or in a result that should not have been."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import MptConfig

from entrodrop_prep import cli, materialize, verify
from entrodrop_prep.backends.model import inspect_model
from entrodrop_prep.config import MaterializeConfig, ScoreConfig
from entrodrop_prep.errors import EntrodropError, IntegrityError, ModelError, OutputError, RowError, SourceError
from helpers.models import run_score, save_model, shards, tiny_llama, write_rows

V = 61


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", tiny_llama(V, context=32))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])


def test_the_result_cannot_lie_inside_its_source(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    write_rows(folder / "rows.jsonl", [{"input_ids": [5, 6, 7]}])
    for out in (folder, folder / "scored", folder / "a" / "b"):
        with pytest.raises(OutputError, match="cannot be inside its source"):
            run_score(folder, model, out)
    assert [p.name for p in folder.iterdir()] == ["rows.jsonl"]
    run_score(folder, model, tmp_path / "documents-scored")


def test_the_result_cannot_lie_where_the_sources_glob_looks(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "documents"
    table = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7]]})
    (folder / "in").mkdir(parents=True)
    table.to_parquet(folder / "in" / "rows.parquet")
    table.to_json(folder / "in" / "rows.json")
    monkeypatch.chdir(tmp_path)
    for pattern in ("documents/**/*.parquet", f"{folder}/*/*.parquet", "documents/**/*.json", "./documents/**"):
        with pytest.raises(OutputError, match="cannot be inside its source"):
            run_score(pattern, model, folder / "out")
    assert not (folder / "out").exists()
    for number, pattern in enumerate(
        ("documents/in/*.parquet", "documents/i*/**/r*.parquet", "documents/**/rows.json")
    ):
        run_score(pattern, model, folder / f"out-{number}")
        assert run_score(pattern, model, folder / f"out-{number}").already_complete


@pytest.mark.parametrize("name", ["~nosuchuser/x", "x" * 5000])
def test_paths_that_mean_nothing(name: str, tmp_path: Path, source: Path, model: Path) -> None:
    with pytest.raises(EntrodropError):
        verify(name)
    with pytest.raises(EntrodropError):
        materialize(MaterializeConfig(scored=name, out=str(tmp_path / "out"), epochs=1))
    with pytest.raises(EntrodropError):
        run_score(source, Path(name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


BAD = os.fsdecode(b"bad\xff")


def test_names_that_are_not_utf8(tmp_path: Path, source: Path, model: Path, capfd: Any) -> None:
    """Parquet's libraries cannot open them, and no manifest names them: said before any work."""
    arguments = ["--model", str(model), "--backend", "transformers", "--device", "cpu"]
    for out in (tmp_path / BAD, tmp_path / BAD / "out"):
        assert cli.run(["score", str(source), "--out", str(out), *arguments]) == 2
        assert "name is not UTF-8" in capfd.readouterr().err
        with pytest.raises(OutputError, match="name is not UTF-8"):
            materialize(MaterializeConfig(scored=str(source), out=str(out), epochs=1))
    assert not (tmp_path / BAD).exists()
    (tmp_path / BAD).mkdir()
    tables = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7]]})
    tables.to_parquet(tmp_path / "rows.parquet")
    tables.save_to_disk(tmp_path / "saved")
    for folder, named in ((tmp_path / "rows.parquet", f"{BAD}/rows.parquet"), (tmp_path / "saved", f"{BAD}/saved")):
        shutil.move(folder, tmp_path / named)
        with pytest.raises(SourceError, match="path is not UTF-8"):
            run_score(tmp_path / named, model, tmp_path / "out")
    shutil.copy(source, tmp_path / BAD / f"{BAD}.jsonl")
    assert cli.run(["score", str(tmp_path / BAD / f"{BAD}.jsonl"), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert "bad\\xff.jsonl: its name is not UTF-8" in capfd.readouterr().err
    shutil.move(source, tmp_path / BAD / "rows.jsonl")
    assert cli.run(["score", str(tmp_path / BAD / "rows.jsonl"), "--out", str(tmp_path / "out"), *arguments]) == 0
    assert verify(str(tmp_path / "out")).findings == []


def test_stdout_takes_any_name(tmp_path: Path) -> None:
    code = f"from entrodrop_prep.terminal.output import print_anything; print_anything(); print({BAD!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert run.stdout == b"bad\\udcff\n"


def test_an_empty_output_is_not_the_current_directory(source: Path, model: Path) -> None:
    with pytest.raises(OutputError, match="empty"):
        materialize(MaterializeConfig(scored=str(source), out=" ", epochs=1))


@pytest.mark.parametrize("rows_ids", [[5, True, 7], [5, 10**30], [5, -(2**70)]], ids=["bool", "huge", "below"])
def test_what_is_no_token_id_is_named(rows_ids: list[int], tmp_path: Path, model: Path) -> None:
    at = write_rows(tmp_path / "rows.jsonl", [{"input_ids": rows_ids}])
    with pytest.raises(RowError, match=f"entry 1 is {rows_ids[1]}"):
        run_score(at, model, tmp_path / "out")


def test_a_finished_directory_that_was_cut_is_not_called_complete(tmp_path: Path, source: Path, model: Path) -> None:
    out = tmp_path / "out"
    run_score(source, model, out)
    shard = shards(out)[0]
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(IntegrityError, match=shard.name):
        run_score(source, model, out)
    shard.unlink()
    run_score(source, model, out)
    assert verify(str(out)).findings == []


def test_a_manifest_that_is_a_directory(tmp_path: Path, source: Path, model: Path) -> None:
    (tmp_path / "out" / "manifest.json").mkdir(parents=True)
    with pytest.raises(IntegrityError, match="it is a folder, not a file"):
        verify(str(tmp_path / "out"))
    for state in (None, "{}", '{"schema": "scored/1"}'):
        if state:
            (tmp_path / "out" / ".state.json").write_text(state)
        with pytest.raises((IntegrityError, OutputError)):
            run_score(source, model, tmp_path / "out")


@pytest.mark.parametrize(
    "note", ['{"model": 7}', '{"model": {"model.safetensors": 7}}', '{"identity": []}', '{"layouts": 1}', "[]", None]
)
def test_a_private_note_that_is_none(note: str | None, tmp_path: Path, source: Path, model: Path) -> None:
    """Whatever became of it, the shards tell whose they are."""
    run_score(source, model, tmp_path / "scored")
    materialize(MaterializeConfig(scored=str(tmp_path / "scored"), out=str(tmp_path / "masked"), epochs=1))
    for out in (tmp_path / "scored", tmp_path / "masked"):
        (out / "manifest.json").unlink()
        (out / ".state.json").unlink()
        (out / ".state.json").write_text(note) if note else (out / ".state.json").mkdir()
    if note is None:  # nothing can be noted there
        with pytest.raises(OutputError, match="this is a folder, and in the way"):
            run_score(source, model, tmp_path / "scored")
        return
    assert not run_score(source, model, tmp_path / "scored").already_complete
    materialize(MaterializeConfig(scored=str(tmp_path / "scored"), out=str(tmp_path / "masked"), epochs=1))
    for out in (tmp_path / "scored", tmp_path / "masked"):
        assert verify(str(out)).findings == []


def test_tokenizer_files_that_are_json_and_no_tokenizer(tmp_path: Path, source: Path) -> None:
    broken = save_model(tmp_path / "model", tiny_llama(V, context=32))
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        run_score(source, broken, tmp_path / "out")


def test_a_config_whose_numbers_are_none(tmp_path: Path, source: Path) -> None:
    broken = save_model(tmp_path / "model", tiny_llama(V, context=32))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "vocab_size": "many"}))
    with pytest.raises(ModelError, match="cannot load the model"):
        run_score(source, broken, tmp_path / "out")


def test_the_context_has_other_names_too(tmp_path: Path, source: Path) -> None:
    config = MptConfig(d_model=16, n_heads=2, n_layers=1, max_seq_len=24, vocab_size=V)
    model = save_model(tmp_path / "mpt", config)
    info = inspect_model(ScoreConfig(source=str(source), model=str(model), out="out"))
    assert info.context == 24
    assert info.max_length(None) == 24
