"""Windows of long documents: each token trainable in one of them, and BOS in front where the document has it."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.errors import ConfigError, MismatchError
from entrodrop_prep.export.materialize import materialize
from entrodrop_prep.scoring.windows import cut, new_tokens
from entrodrop_prep.store import manifest
from entrodrop_prep.store.schema import SCORED
from entrodrop_prep.verification.run import verify
from helpers.models import Markov, markov_model, rows_of, run_score, shards, words, write_rows

EOS, BOS, SECOND = 1, 3, 4
L = 9


@given(
    length=st.integers(2, 60),
    max_length=st.integers(2, 20),
    overlap=st.integers(0, 19),
    start=st.sampled_from([(), (100,), (100, 101)]),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_each_token_is_trainable_in_one_window(
    length: int, max_length: int, overlap: int, start: tuple[int, ...], data: st.DataObject
) -> None:
    max_length = max(max_length, len(start) + 2)
    overlap = min(overlap, max_length - len(start) - 1)
    assert new_tokens(max_length, overlap, start) >= 1
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    mask[0] = False
    ids = np.arange(length, dtype=np.int32)
    windows = list(cut(3, ids, mask, max_length, overlap, start))
    trainable = np.concatenate([w.input_ids[w.loss_mask] for w in windows])
    new = np.concatenate([w.input_ids[max(1, w.context) :] for w in windows])
    assert trainable.tolist() == ids[mask].tolist()
    assert new.tolist() == list(range(1, length))
    repeat = max(1, overlap)
    for before, window in itertools.pairwise(windows):
        assert len(before.input_ids) == max_length
        assert window.context == len(start) + repeat
        assert window.input_ids[: len(start)].tolist() == list(start)
        assert window.input_ids[len(start) : window.context].tolist() == before.input_ids[-repeat:].tolist()
        assert len(window.input_ids) > window.context
    assert windows[0].context == 0
    assert [w.number for w in windows] == list(range(len(windows)))
    assert max(len(w.input_ids) for w in windows) <= max_length
    assert {(w.input_ids.dtype, w.loss_mask.dtype, len(w.input_ids) == len(w.loss_mask)) for w in windows} == {
        (np.dtype(np.int32), np.dtype(np.bool_), True)
    }


# ---- scored


@pytest.fixture(scope="module")
def markov(tmp_path_factory: pytest.TempPathFactory) -> Markov:
    return markov_model(tmp_path_factory.mktemp("markov"), context=64)


def model_with(markov: Markov, directory: Path, front: str, *, bos: str | None = "<s>") -> Path:
    """The model with a word tokenizer that puts ``front`` before every text; its BOS token is ``bos``."""
    shutil.copytree(markov.directory, directory)
    names = {"<pad>": 0, "</s>": EOS, "<unk>": 2, "<s>": BOS, "<sop>": SECOND}
    tokenizer = Tokenizer(models.WordLevel(names | {f"w{i}": i for i in range(5, 40)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if front:
        special: Any = [(name, names[name]) for name in front.split()]
        tokenizer.post_processor = TemplateProcessing(single=f"{front} $A", special_tokens=special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
    return directory


def documents(front: Sequence[int]) -> list[list[int]]:
    """Documents that begin with ``front``, of lengths around the edges of windows."""
    rng = np.random.default_rng(0)
    return [[*front, *rng.integers(5, 40, n).tolist()] for n in (2, 5, *range(6, 24), 40)]


def check(found: list[dict[str, Any]], document: list[int], model: Markov, overlap: int, start: list[int]) -> None:
    """The windows of one document, from the contract alone."""
    repeat, at = max(1, overlap), 0
    times = np.zeros(len(document), int)
    for number, row in enumerate(found):
        front = start if number else []
        context = len(front) + repeat if number else 1
        ids = row["input_ids"]
        assert row["window"] == number
        assert len(ids) <= L
        assert ids == [*front, *document[at : at + len(ids) - len(front)]]
        assert row["loss_mask"] == [t >= context for t in range(len(ids))]
        assert row["entropy"][:context] == row["logprob"][:context] == [None] * context
        for t in range(context, len(ids)):
            assert row["entropy"][t] == pytest.approx(model.entropy[ids[t - 1]], abs=1e-4)
            assert row["logprob"][t] == pytest.approx(model.logprob[ids[t - 1], ids[t]], abs=1e-4)
        times[at : at + len(ids) - len(front)] += row["loss_mask"][len(front) :]
        at += len(ids) - len(front) - repeat
    assert at + repeat == len(document)
    assert times.tolist() == [0] + [1] * (len(document) - 1)


def by_document(out: Path) -> list[list[dict[str, Any]]]:
    return [list(rows) for _, rows in itertools.groupby(rows_of(out), lambda row: row["row_id"])]


@pytest.mark.parametrize("overlap", [0, 4])
@pytest.mark.parametrize("front", ["", "<s>", "<sop> <s>"])
def test_windows_of_text_begin_as_the_tokenizer_begins_it(
    tmp_path: Path, markov: Markov, front: str, overlap: int
) -> None:
    model = model_with(markov, tmp_path / "model", front)
    ids = [{"<s>": BOS, "<sop>": SECOND}[name] for name in front.split()]
    texts = documents([])
    source = write_rows(tmp_path / "rows.jsonl", [{"text": words(t)} for t in texts])
    settings_: dict[str, Any] = {"max_length": L, "overlap": overlap}
    run_score(source, model, tmp_path / "out", **settings_)
    whole = [[*ids, *t, EOS] for t in texts]
    for found, document in zip(by_document(tmp_path / "out"), whole, strict=True):
        check(found, document, markov, overlap, ids)
    counts = np.load(tmp_path / "out" / "unigram.npy")
    assert counts.tolist() == np.bincount([i for d in whole for i in d], minlength=40).tolist()
    assert verify(str(tmp_path / "out")).findings == []
    identity = manifest.read(tmp_path / "out", SCORED)["identity"]
    assert identity.get("window_bos") == ("on" if front else None)
    if not front:
        return
    run_score(source, model, tmp_path / "old", **settings_, window_bos="off")
    for found, document in zip(by_document(tmp_path / "old"), whole, strict=True):
        check(found, document, markov, overlap, [])
    old = manifest.read(tmp_path / "old", SCORED)["identity"]
    assert {**old, "window_bos": "on"} == identity
    # A directory begun without BOS, by an earlier version say, is continued so. The other way round it is refused.
    before = [path.read_bytes() for path in shards(tmp_path / "old")]
    (tmp_path / "old" / "manifest.json").unlink()
    shards(tmp_path / "old")[0].unlink()
    run_score(source, model, tmp_path / "old", **settings_)
    assert [path.read_bytes() for path in shards(tmp_path / "old")] == before
    assert manifest.read(tmp_path / "old", SCORED)["identity"] == old
    with pytest.raises(MismatchError, match='window_bos was "on", now null'):
        run_score(source, model, tmp_path / "out", **settings_, window_bos="off")
    run_score(source, model, tmp_path / "old", **settings_, overwrite=True)
    assert rows_of(tmp_path / "old") == rows_of(tmp_path / "out")


def test_windows_of_token_ids_begin_as_their_row_does(tmp_path: Path, markov: Markov) -> None:
    model = model_with(markov, tmp_path / "model", "")
    rows = [*documents([BOS]), *documents([]), *documents([SECOND])]
    source = write_rows(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in rows])
    run_score(source, model, tmp_path / "out", max_length=L, overlap=2)
    for found, document in zip(by_document(tmp_path / "out"), rows, strict=True):
        check(found, document, markov, 2, [BOS] if document[0] == BOS else [])
    bare = model_with(markov, tmp_path / "bare", "", bos=None)
    run_score(source, bare, tmp_path / "plain", max_length=L, overlap=2)
    assert "window_bos" not in manifest.read(tmp_path / "plain", SCORED)["identity"]


def test_rows_that_are_not_split_do_not_change_the_identity(tmp_path: Path, markov: Markov) -> None:
    model = model_with(markov, tmp_path / "model", "<s>")
    source = write_rows(tmp_path / "rows.jsonl", [{"text": words(t)} for t in documents([])])
    run_score(source, model, tmp_path / "out", max_length=L, long_documents="drop")
    assert "window_bos" not in manifest.read(tmp_path / "out", SCORED)["identity"]


def test_a_window_has_room_for_a_new_token(tmp_path: Path, markov: Markov) -> None:
    model = model_with(markov, tmp_path / "model", "<s>")
    source = write_rows(tmp_path / "rows.jsonl", [{"text": words(t)} for t in documents([])])
    for settings_ in ({"max_length": L, "overlap": L - 1}, {"max_length": 2}):
        with pytest.raises(ConfigError, match=r"no room for new ones beside BOS .*--window-bos off"):
            run_score(source, model, tmp_path / "out", **settings_)
        assert not list(tmp_path.glob("out/shard*"))
    run_score(source, model, tmp_path / "out", max_length=L, overlap=L - 2)
    for found, text in zip(by_document(tmp_path / "out"), documents([]), strict=True):
        check(found, [BOS, *text, EOS], markov, L - 2, [BOS])


def test_masks_of_windows_with_bos_hold(tmp_path: Path, markov: Markov) -> None:
    model = model_with(markov, tmp_path / "model", "<s>")
    source = write_rows(tmp_path / "rows.jsonl", [{"text": words(t)} for t in documents([])])
    run_score(source, model, tmp_path / "scored", max_length=L)
    config = MaterializeConfig(scored=str(tmp_path / "scored"), out=str(tmp_path / "masked"), epochs=2)
    materialize(config)
    assert verify(str(tmp_path / "masked"), str(tmp_path / "scored")).findings == []
