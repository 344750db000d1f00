"""Which weights count: what loading may read is hashed, what lies elsewhere is refused, none may change."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from entrodrop_prep.backends.identity import Weights, identify_weights
from entrodrop_prep.backends.model import inspect_model
from entrodrop_prep.errors import MismatchError, ModelError
from entrodrop_prep.store import digest, manifest
from helpers.models import random_rows, rows_of, run_score, settings_for, shards, write_rows

V = 61
INDEX = "model.safetensors.index.json"


@pytest.fixture
def own(tmp_path: Path, model: Path) -> Path:
    return shutil.copytree(model, tmp_path / "model")


def weights_of(path: Path, known: dict[str, list[Any]] | None = None, **settings: Any) -> Weights:
    config = settings_for("-", path, Path("-"), **settings)
    return identify_weights(config, inspect_model(config), known)


def digest_of(path: Path, **settings: Any) -> str:
    return weights_of(path, **settings).identity["digest"]


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def scale(path: Path, factor: float) -> None:
    save_file({k: v * factor for k, v in load_file(path).items()}, path, metadata={"format": "pt"})


def sharded(path: Path, *names: str) -> None:
    """Spread model.safetensors over files that an index names."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    where = {key: names[i % len(names)] for i, key in enumerate(tensors)}
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({k: t for k, t in tensors.items() if where[k] == name}, path / name, metadata={"format": "pt"})
    write_index(path, where)


def write_index(path: Path, where: Any, name: str = INDEX) -> None:
    (path / name).write_text(json.dumps({"metadata": {}, "weight_map": where}))


# ---- what is hashed


def plain(path: Path) -> None:
    pass


def in_two(path: Path) -> None:
    sharded(path, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def as_mistral(path: Path) -> None:
    in_two(path)
    save_file({"x": torch.zeros(1)}, path / "consolidated.safetensors")


@pytest.mark.parametrize("shape", [plain, in_two, as_mistral])
def test_plain_directories_keep_their_identity(own: Path, shape: Callable[[Path], None]) -> None:
    """Runs begun by earlier versions can be continued: this is the digest as it always was."""
    shape(own)
    (own / "code.py").write_text("x = 1\n")
    config = json.loads((own / "config.json").read_text())
    del config["transformers_version"]
    files = {p.name: sha(p) for p in own.iterdir() if p.suffix in (".safetensors", ".py")}
    assert digest_of(own) == digest.of_json({"config": config, **files})


def test_weights_in_a_sub_folder(tmp_path: Path, own: Path, model: Path) -> None:
    sharded(own, "sub/a.safetensors", "sub/deeper/b.safetensors")
    save_file({"x": torch.zeros(1)}, own / "decoy.safetensors")
    source = write_rows(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in random_rows(6, V)])
    run_score(source, own, tmp_path / "out")
    run_score(source, model, tmp_path / "plain")
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "plain")
    before = digest_of(own)
    assert {"sub/a.safetensors", "sub/deeper/b.safetensors"} <= weights_of(own).files.keys()
    scale(own / "sub/deeper/b.safetensors", 0.5)
    assert digest_of(own) != before
    with pytest.raises(MismatchError, match=r"model\.digest was"):
        run_score(source, own, tmp_path / "out")


def test_weights_behind_a_link(tmp_path: Path, own: Path) -> None:
    """As in a snapshot of the Hub's cache: what a link leads to is hashed."""
    (own / "model.safetensors").rename(tmp_path / "blob")
    (own / "model.safetensors").symlink_to(tmp_path / "blob")
    before = digest_of(own)
    scale(tmp_path / "blob", 0.5)
    assert digest_of(own) != before


def test_which_files_an_index_names(own: Path) -> None:
    (own / "model.safetensors").rename(own / "a.safetensors")
    shutil.copy(own / "a.safetensors", own / "b.safetensors")
    scale(own / "b.safetensors", 0.5)
    found = set()
    for name in ("a.safetensors", "b.safetensors"):
        write_index(own, dict.fromkeys(load_file(own / name), name))
        found.add(digest_of(own))
    write_index(own, dict.fromkeys(load_file(own / "b.safetensors"), "./b.safetensors"))
    found.add(digest_of(own))
    assert len(found) == 2


def test_weights_that_the_configuration_names(own: Path) -> None:
    (own / "sub").mkdir()
    (own / "model.safetensors").rename(own / "sub/w.safetensors")
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "transformers_weights": "sub/w.safetensors"}))
    before = digest_of(own)
    scale(own / "sub/w.safetensors", 0.5)
    assert digest_of(own) != before
    (own / "config.json").write_text(json.dumps({**config, "transformers_weights": "adapter_model.bin"}))
    with pytest.raises(ModelError, match=r"adapter_model\.bin, which is no safetensors file"):
        digest_of(own)


def test_both_a_file_and_an_index_of_others(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(own / "model.safetensors", own / "kept")
    in_two(own)
    (own / "kept").rename(own / "model.safetensors")
    before = digest_of(own)
    assert "which transformers loads" in caplog.text
    scale(own / "model.safetensors", 0.5)
    assert digest_of(own) != before


def test_code_in_a_sub_folder(own: Path) -> None:
    (own / "code").mkdir()
    (own / "code" / "modeling.py").write_text("x = 1\n")
    before = digest_of(own, trust_remote_code=True)
    (own / "code" / "modeling.py").write_text("x = 2\n")
    assert digest_of(own, trust_remote_code=True) != before


def test_pickles_that_were_allowed(own: Path) -> None:
    tensors = load_file(own / "model.safetensors")
    (own / "model.safetensors").unlink()
    (own / "sub").mkdir()
    torch.save(tensors, own / "sub/w.bin")
    write_index(own, dict.fromkeys(tensors, "sub/w.bin"), "pytorch_model.bin.index.json")
    before = digest_of(own, allow_pickle=True)
    torch.save({k: v * 0.5 for k, v in tensors.items()}, own / "sub/w.bin")
    assert digest_of(own, allow_pickle=True) != before


# ---- what is refused


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["/etc/w.safetensors"], "which is no file in the model's directory"),
        (["../w.safetensors"], "which is no file in the model's directory"),
        (["sub/../../w.safetensors"], "which is no file in the model's directory"),
        (["..\\w.safetensors"], "which is no file in the model's directory"),
        ([5], "which is no file in the model's directory"),
        ([""], "which is no file in the model's directory"),
        (["w.bin"], "which is no safetensors file: a pickle can run code when loaded"),
        (["model.safetensors", "w.pt"], "which is no safetensors file: a pickle can run code when loaded"),
        (["absent.safetensors"], "its weights lack the file absent.safetensors"),
        ([["w.safetensors"]], "is damaged: it has no weight_map"),
    ],
)
def test_what_an_index_must_not_name(tmp_path: Path, own: Path, names: list[Any], says: str) -> None:
    for place in (tmp_path, own):
        for name in ("w.safetensors", "w.bin", "w.pt"):
            shutil.copy(own / "model.safetensors", place / name)
    write_index(own, {f"k{i}": name for i, name in enumerate(names)})
    with pytest.raises(ModelError) as caught:
        digest_of(own)
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"{own}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}', "[" * 100_000])
def test_a_damaged_index(own: Path, content: str) -> None:
    (own / INDEX).write_text(content)
    with pytest.raises(ModelError, match=r"model.safetensors.index.json is damaged: it has no weight_map; fetch it"):
        digest_of(own)


def test_an_adapter_beside_the_weights(own: Path) -> None:
    (own / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    with pytest.raises(ModelError, match="it holds an adapter"):
        digest_of(own)


# ---- what changes meanwhile


def rewritten(path: Path) -> None:
    scale(path, 0.5)


def rewritten_with_old_times(path: Path) -> None:
    stat = path.stat()
    scale(path, 0.5)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert [path.stat().st_size, path.stat().st_mtime_ns] == [stat.st_size, stat.st_mtime_ns]


def exchanged(path: Path) -> None:
    other = Path(shutil.copy2(path, path.with_name("other")))
    rewritten_with_old_times(other)
    other.replace(path)


def removed(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [rewritten, rewritten_with_old_times, exchanged, removed])
def test_a_change_is_noticed(own: Path, change: Callable[[Path], None]) -> None:
    weights = weights_of(own)
    weights.check_unchanged()
    time.sleep(0.02)  # the clock of a file system has ticks
    change(own / "model.safetensors")
    for _ in range(2):
        with pytest.raises(ModelError, match=r"model.safetensors: the file changed while its model was in use"):
            weights.check_unchanged()


@pytest.mark.parametrize("change", [lambda p: p.chmod(0o600), lambda p: os.link(p, p.with_name("link"))])
def test_what_is_no_change(own: Path, change: Callable[[Path], None]) -> None:
    weights = weights_of(own)
    time.sleep(0.02)
    change(own / "model.safetensors")
    weights.check_unchanged()
    assert digest_of(own) == weights.identity["digest"]


def test_what_was_noted_is_believed_only_of_files_left_alone(own: Path) -> None:
    weights = weights_of(own)
    noted = json.loads(json.dumps(weights.files))
    assert weights_of(own, noted).files == weights.files
    time.sleep(0.02)
    rewritten_with_old_times(own / "model.safetensors")
    assert weights_of(own, noted).identity != weights.identity
    earlier = {name: entry[:3] for name, entry in noted.items()}  # as versions before noted it
    assert weights_of(own, earlier).identity == weights_of(own).identity


def test_a_model_that_changes_while_it_scores(tmp_path: Path, own: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in random_rows(60, V)])
    out = tmp_path / "out"

    def change() -> None:
        while not shards(out):
            time.sleep(0.001)
        rewritten(own / "model.safetensors")

    thread = threading.Thread(target=change)
    shutil.copy2(own / "model.safetensors", tmp_path / "kept")
    thread.start()
    with pytest.raises(ModelError, match="the file changed while its model was in use; restore it and rerun to resume"):
        run_score(source, own, out, rows_per_shard=1)
    thread.join()
    assert not (out / manifest.NAME).exists()
    there = len(shards(out))
    assert 1 <= there < 60
    with pytest.raises(MismatchError, match=r"model\.digest was"):
        run_score(source, own, out, rows_per_shard=1)
    shutil.copy2(tmp_path / "kept", own / "model.safetensors")
    run_score(source, own, out, rows_per_shard=1)
    run_score(source, own, tmp_path / "whole", rows_per_shard=1)
    assert rows_of(out) == rows_of(tmp_path / "whole")
