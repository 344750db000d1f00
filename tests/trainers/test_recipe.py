"""What ``entrodrop recipe`` prints runs as it is, and says what is true of the run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from entrodrop_prep import check_batches, materialize
from entrodrop_prep.cli import run
from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.errors import ConfigError, IntegrityError
from entrodrop_prep.trainers import TRAINERS, recipe, recipe_of
from entrodrop_prep.trainers.facts import Facts, facts_of, read_facts
from entrodrop_prep.trainers.notes import comment
from entrodrop_prep.trainers.rendering import TEMPLATES, fill
from helpers.models import (
    save_model,
    scored_documents,
    tiny_llama,
    word_tokenizer,
)
from helpers.recipes import run_recipe, run_text

pytestmark = pytest.mark.training

OURS = ("transformers", "trl", "lightning")
EPOCHS, ROWS, VOCABULARY = 3, 22, 97
LONGEST = 30


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base-model``, rows ``scored`` with it, and of these ``labels``, ``inputs``, ``both``: masked."""
    folder = tmp_path_factory.mktemp("recipe")
    scored_documents(folder, rows=ROWS, longest=LONGEST - 1, held=9)
    for target in ("labels", "inputs", "both"):
        mask(folder, target, target=target)
    return folder


def mask(made: Path, name: str, **settings: Any) -> Path:
    """A masked directory of the scored rows, two files an epoch."""
    usual: dict[str, Any] = {"schedule": "linear", "max_rate": 0.9, "rows_per_shard": 12, "epochs": EPOCHS}
    materialize(MaterializeConfig(scored=str(made / "scored"), out=str(made / name), **{**usual, **settings}))
    return made / name


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the current one, with ``base-model`` in it."""
    (tmp_path / "base-model").symlink_to(made / "base-model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def place(here: Path, masked: Path) -> None:
    (here / "masked").symlink_to(masked)


def plain(text: str) -> str:
    """Text without the comments' line breaks."""
    return " ".join(text.replace("\n# ", " ").split())


def steps_said(text: str) -> int:
    (found,) = re.findall(r"rounded up, = ([\d,]+) steps", plain(text))
    return int(found.replace(",", ""))


def steps_run(names: dict[str, Any]) -> int:
    trainer = names["trainer"]
    return int(
        trainer.state.global_step
        if hasattr(trainer, "state") and hasattr(trainer.state, "global_step")
        else trainer.global_step
    )


@pytest.mark.parametrize(("trainer", "target"), zip(OURS, ("both", "inputs", "labels"), strict=True))
def test_it_runs_as_it_is_printed(
    trainer: str, target: str, made: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place(here, made / target)
    assert run(["recipe", trainer, "masked"]) == 0
    printed = capsys.readouterr().out
    assert printed == recipe(trainer, "masked")
    names, batches = run_text(printed)
    arrived = check_batches("masked", batches)
    assert (arrived.rows, arrived.epochs) == (EPOCHS * ROWS, (0, 1, 2))
    assert steps_run(names) == steps_said(printed) == -(-EPOCHS * ROWS // 16)
    before, after = (load_file(here / folder / "model.safetensors") for folder in ("base-model", names["OUT"]))
    assert all(not torch.equal(before[name], after[name]) for name in before if "proj" in name)


@pytest.mark.parametrize("trainer", OURS)
def test_it_evaluates_on_the_validation_rows(trainer: str, made: Path, here: Path, tmp_path: Path) -> None:
    place(here, mask(made, f"validated-{trainer}", eval=str(made / "held"), plain_config=True))
    names, batches = run_recipe(trainer)
    assert check_batches("masked", batches).rows == EPOCHS * ROWS
    if trainer == "lightning":
        assert names["trainer"].callback_metrics["validation_loss"] > 0
    else:
        assert sum("eval_loss" in entry for entry in names["trainer"].state.log_history) == 5 // (5 // EPOCHS)


class Killed(Exception):
    """Stands for whatever ends a run in the middle."""


def dying_at(call: int) -> Iterator[None]:
    """Steps of a generator that fails at its ``call``th."""
    for _ in range(call - 1):
        yield
    raise Killed


@pytest.mark.parametrize("trainer", OURS)
def test_it_goes_on_in_the_middle_of_an_epoch(trainer: str, made: Path, here: Path) -> None:
    place(here, made / "labels")
    text = recipe(trainer, "masked")
    whole, every = run_text(text, ("\nOUT = ", '\nOUT = "whole-" + '))
    batches_a_step = 1 if trainer == "lightning" else 4
    rows_a_step = len(every[0]["input_ids"]) * batches_a_step

    calls = dying_at(2 * batches_a_step + 1)  # in the third step, whose first rows are epoch 1's
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: next(calls) if type(module).__name__ == "LlamaForCausalLM" else None
    )
    try:
        with pytest.raises(Killed):
            run_text(text)
    finally:
        hook.remove()
    assert ROWS < 2 * rows_a_step < 2 * ROWS, "it was not in the middle of an epoch"

    names, batches = run_text(text)
    assert len(batches) == len(every) - 2 * batches_a_step
    check_batches("masked", every[: 2 * batches_a_step] + batches)
    assert steps_run(names) == steps_run(whole)
    for name, value in load_file(here / whole["OUT"] / "model.safetensors").items():
        torch.testing.assert_close(load_file(here / names["OUT"] / "model.safetensors")[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("trainer", OURS)
def test_other_rows_or_another_model_begin_anew(trainer: str, made: Path, here: Path) -> None:
    """A trainer continues from what lies in its folder: so no folder serves for two arms of a comparison."""
    (here / "models").mkdir()
    (here / "models" / "base-model").symlink_to(save_model(here / "other", tiny_llama(VOCABULARY, seed=1)))
    (here / "plain").symlink_to(made / "inputs")
    place(here, made / "labels")
    runs = [("masked", None), ("plain", None), ("plain", "models/base-model")]
    folders = set()
    for directory, model in runs:
        names, batches = run_text(recipe(trainer, directory, model))
        assert check_batches(directory, batches).rows == EPOCHS * ROWS
        folders.add(names["OUT"])
    assert len(folders) == len(runs)


def test_every_recipe_names_the_rows_and_the_model_in_its_folder(made: Path) -> None:
    facts = replace(read_facts(str(made / "labels")), model="org/name", layouts=("concatenated",))
    described = json.loads((made / "labels" / "manifest.json").read_bytes())
    for trainer in TRAINERS:
        begins = f"trained-{described['content_digest'][:8]}-{trainer}-"
        text = recipe_of(trainer, facts)
        assert (f'OUT = "{begins}" + MODEL.replace("/", "-")' in text) != (f"{begins}org-name" in text), trainer


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(trainer: str, made: Path, here: Path) -> None:
    """As a run leaves it that is killed while it writes one: the weights are there, the trainer's state is not."""
    place(here, made / "labels")
    text = recipe(trainer, "masked")
    names, _ = run_text(text, ("report_to=[]", "report_to=[], max_steps=2"))
    checkpoints = sorted((here / names["OUT"]).glob("checkpoint-*"))
    assert [c.name for c in checkpoints] == ["checkpoint-1", "checkpoint-2"]
    (checkpoints[-1] / "trainer_state.json").unlink()
    (checkpoints[-1] / "optimizer.pt").unlink()
    names, batches = run_text(text)
    assert steps_run(names) == 5
    assert len(batches) == -(-EPOCHS * ROWS // 4) - 4, "it did not continue behind the first step"


@pytest.mark.parametrize("name", ["text", "\N{GRINNING FACE} it's $masked"])
def test_a_directory_of_any_name(name: str, made: Path, here: Path) -> None:
    """``datasets`` takes a bare ``text`` for its reader of text files."""
    (here / name).symlink_to(made / "labels")
    (here / "\N{GRINNING FACE}").symlink_to(made / "base-model")
    _, batches = run_text(recipe("transformers", name, "./\N{GRINNING FACE}"))
    assert check_batches(name, batches).rows == EPOCHS * ROWS


@pytest.mark.parametrize("trainer", OURS)
def test_it_divides_by_the_trainable_tokens_where_the_rows_have_them(trainer: str, made: Path, here: Path) -> None:
    masked = mask(made, f"counted-{trainer}", add_columns=("n_trainable", "seq_lengths"), eval=str(made / "held"))
    rows = [r for f in sorted(masked.glob("epoch_*/*.parquet")) for r in pq.read_table(f).to_pylist()][-16:]
    left, before = sum(label != -100 for r in rows for label in r["labels"]), sum(r["n_trainable"] for r in rows)
    assert left < 0.8 * before
    place(here, masked)
    names, batches = run_recipe(trainer)
    assert check_batches("masked", batches).rows == EPOCHS * ROWS
    assert all(batch.keys() <= {"input_ids", "attention_mask", "labels"} for batch in batches)

    model = names["training"].model if trainer == "lightning" else names["model"]
    batch = (names["collator"] if trainer == "lightning" else names["trainer"].data_collator)(
        [{k: v for k, v in r.items() if k != "seq_lengths"} for r in rows]
    )
    with torch.no_grad():
        mean = model.eval()(**{k: v for k, v in batch.items() if k != "n_trainable"}).loss
        if trainer == "lightning":
            loss = names["training"].training_step(batch, 0)
        else:
            own = names["trainer"]
            (taken,), count = own.get_batch_samples(iter([batch]), 1, own.args.device)
            loss = own.compute_loss(model, taken, num_items_in_batch=count)
    assert float(loss) == pytest.approx(float(mean) * left / before, rel=1e-5)


def kept_apart(text: str) -> bool:
    """What a recipe says of the documents of packed rows."""
    found = [
        said in plain(text)
        for said in (
            "with this file the documents of a row see each other. Better are rows that are not",
            "Their documents are kept apart by position_ids",
        )
    ]
    assert sum(found) == 1
    return found[1]


@pytest.mark.parametrize(("trainer", "columns"), [("trl", ()), ("lightning", ("position_ids", "seq_lengths"))])
def test_packed_rows_run_and_are_told_of(
    trainer: str, columns: tuple[str, ...], made: Path, here: Path, tmp_path: Path
) -> None:
    place(here, mask(made, str(tmp_path / "packed"), pack=64, add_columns=columns))
    assert read_facts("masked").packed == 64
    assert not any(kept_apart(recipe(other, "masked")) for other in OURS if not columns)
    text = recipe(trainer, "masked")
    assert not kept_apart(text)
    names, batches = run_text(text)
    arrived = check_batches("masked", batches)
    assert arrived.epochs == (0, 1, 2)
    assert steps_run(names) == steps_said(text)


@pytest.mark.parametrize(
    ("trainer", "more"),
    [
        ("transformers", {"add_columns": ("position_ids", "seq_lengths")}),
        *((t, {"add_columns": ("n_trainable", "position_ids"), "eval": "held"}) for t in ("transformers", "trl")),
    ],
)
def test_documents_of_a_packed_row_do_not_see_each_other(
    trainer: str, more: dict[str, Any], made: Path, here: Path, tmp_path: Path
) -> None:
    if "eval" in more:
        more = {**more, "eval": str(made / "held")}
    place(here, mask(made, str(tmp_path / "packed"), pack=64, **more))
    text = recipe(trainer, "masked")
    assert kept_apart(text)
    names, batches = run_text(text)
    assert steps_run(names) == steps_said(text)
    epochs = json.loads((here / "masked" / "manifest.json").read_bytes())["epochs"]
    assert check_batches("masked", batches).rows == sum(e["rows"] for e in epochs)
    assert all("attention_mask" not in batch for batch in batches)
    own = names["trainer"]
    batch = next(b for b in own.get_train_dataloader() if (b["position_ids"] == 0).sum() > 1)
    batch = {name: batch[name] for name in ("input_ids", "labels", "position_ids")}
    second = int(torch.nonzero(batch["position_ids"][0] == 0)[1])
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, :second] = (other["input_ids"][0, :second] + 1) % 90
    before, after = (hidden_states(own, b) for b in (batch, other))
    assert not torch.equal(before[:second], after[:second])
    assert torch.equal(before[second:], after[second:])


def hidden_states(trainer: Any, batch: dict[str, Any]) -> torch.Tensor:
    """[T, H] last hidden states of the one line of a batch, for which the trainer computes its loss."""
    noted: list[torch.Tensor] = []
    hook = trainer.model.model.register_forward_hook(lambda *args: noted.append(args[-1].last_hidden_state))
    trainer.model.eval()
    try:
        with torch.no_grad():
            trainer.compute_loss(trainer.model, dict(batch))
    finally:
        hook.remove()
    (state,) = noted
    return state[0]


# --- what it says


def test_the_table_is_the_manifests(made: Path) -> None:
    described = json.loads((made / "labels" / "manifest.json").read_bytes())
    text = recipe("transformers", str(made / "labels"))
    for e in described["epochs"]:
        kept = f"{e['labels_left'] / e['trainable']:.1%}"
        assert re.search(rf"^# +{e['folder']} +{e['rows']} .* {e['labels_left']:,} +{kept}$", text, re.MULTILINE), text
    most = max(e["trainable"] / e["labels_left"] for e in described["epochs"])
    assert f"{most:.2f} times" in plain(text)
    assert "`materialize --add-columns n_trainable`, with a new --out)" in plain(text)
    assert "`materialize --rows-multiple 16`, with a new --out, makes" in plain(text)
    assert "times" not in recipe("transformers", str(made / "inputs")).partition("import")[0].replace("P times", "")


def test_facts_are_read_from_the_files(made: Path) -> None:
    facts = read_facts(str(made / "both"))
    rows = [row for f in sorted((made / "both").glob("epoch_*/*.parquet")) for row in pq.read_table(f).to_pylist()]
    assert facts.longest == max(len(row["input_ids"]) for row in rows)
    assert facts.rows == len(rows) == EPOCHS * ROWS
    assert [e.labels_left for e in facts.epochs] == [
        sum(label != -100 for row in rows[e * ROWS : (e + 1) * ROWS] for label in row["labels"]) for e in range(EPOCHS)
    ]
    assert (facts.target, facts.drop_token, facts.columns, facts.layouts) == ("both", "random", (), ())
    assert (facts.validation_rows, facts.plain, facts.packed) == (None, False, None)
    described = json.loads((made / "both" / "manifest.json").read_bytes())
    assert facts_of(described, str(made / "both")) == replace(facts, longest=None)
    assert facts.content_digest == described["content_digest"]


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32, 33])
@pytest.mark.parametrize(("batch", "accumulate", "processes"), [(4, 4, 1), (16, 1, 1), (1, 3, 1), (4, 1, 2)])
def test_steps_are_counted_as_a_loop_would(rows: int, batch: int, accumulate: int, processes: int, made: Path) -> None:
    epoch = replace(read_facts(str(made / "labels")).epochs[0], rows=rows)
    left, steps = rows, 0
    while left > 0:
        steps += 1
        for _ in range(accumulate):
            left -= batch * processes
    assert Facts("masked", (epoch,), "labels", "random").steps(batch, accumulate, processes) == steps


def test_a_drop_token_asks_for_trained_embeddings(made: Path) -> None:
    facts = read_facts(str(made / "inputs"))
    for trainer in OURS:
        assert "modules_to_save" not in recipe_of(trainer, facts)
        assert "modules_to_save" in recipe_of(trainer, replace(facts, drop_token="<mask>"))


def test_the_placeholder_is_told(made: Path) -> None:
    told = 'Replace "base-model" with your model.'
    assert told in recipe("transformers", str(made / "labels"))
    assert told not in recipe("transformers", str(made / "labels"), str(made / "base-model"))


# --- the model to train


def other(folder: Path, **changes: Any) -> Path:
    """A model whose tokenizer differs from the rows' in some way."""
    save_model(folder, tiny_llama(VOCABULARY, **changes.pop("config", {})))
    tokenizer = changes.pop("tokenizer", None) or AutoTokenizer.from_pretrained(folder)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return folder


DIFFERENT = {
    "vocabulary": ({"tokenizer": word_tokenizer(VOCABULARY, first=4)}, "the vocabulary of .* is not that of the rows"),
    "eos": ({"eos_token": "w50"}, "EOS is id 50 to .* and 1 in the rows"),
    "template": ({"chat_template": "{{ messages }}"}, "the chat template of .* is not that of the rows"),
    "rest": ({"bos_token": "w7"}, "the tokenizer of .* is not that of the rows, though its vocabulary"),
    "context": ({"config": {"context": 8}}, r"rows are up to \d+ tokens long, the context of .* is 8"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_model_that_differs_is_told(
    name: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, said = DIFFERENT[name]
    model = other(tmp_path / "m", **changes)
    assert run(["recipe", "transformers", str(made / "labels"), "--train-model", str(model)]) == 0
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert re.match(f"warning: {said}", line)
    assert re.search(f"note: {said}", plain(out))
    assert f'"{model}"' in out


def test_a_model_that_fits_says_nothing(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipe", "trl", str(made / "labels"), "--train-model", str(made / "base-model")]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert "note:" not in out


def test_ids_outside_the_models_vocabulary_are_an_error(made: Path, tmp_path: Path) -> None:
    largest = max(
        i
        for f in (made / "labels").glob("epoch_*/*.parquet")
        for ids in pq.read_table(f)["input_ids"].to_pylist()
        for i in ids
    )
    small = save_model(tmp_path / "small", tiny_llama(largest))
    with pytest.raises(ConfigError, match=rf"small: id {largest} of the rows is outside its vocabulary of {largest};"):
        recipe("transformers", str(made / "labels"), str(small))
    fits = save_model(tmp_path / "fits", tiny_llama(largest + 1))
    assert str(fits) in recipe("transformers", str(made / "labels"), str(fits))


def test_an_id_that_stands_in_the_labels_alone_is_looked_at(made: Path, tmp_path: Path) -> None:
    """With --target inputs the input of a dropped token is replaced, and its label stays."""
    out = mask(made, "replaced", target="inputs", schedule="constant", max_rate=1, quantile=1, drop_token="5", epochs=1)
    rows = pq.read_table(out / "epoch_000").to_pylist()
    ids, labels = (max(i for row in rows for i in row[name]) for name in ("input_ids", "labels"))
    assert ids < labels
    small = save_model(tmp_path / "small", tiny_llama(labels))
    with pytest.raises(ConfigError, match=rf"id {labels} of the rows is outside its vocabulary of {labels};"):
        recipe("transformers", str(out), str(small))


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing", "labels"], "unknown trainer 'nothing'; there are: transformers, trl"),
        (["trl", "labels", "--train-model", "./none"], "./none: no such directory; give a model directory or a Hub id"),
        (["trl", "labels", "--train-model", "./empty"], "the directory has no config.json"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], said: str, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (made / "empty").mkdir(exist_ok=True)
    monkeypatch.chdir(made)
    assert run(["recipe", *arguments]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not out


def test_no_option_is_named_that_the_command_has_not(made: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "m", tiny_llama(VOCABULARY))
    for file in model.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(Exception, match="no tokenizer files; give another --train-model, or leave it out"):
        recipe("trl", str(made / "labels"), str(model))


def test_a_file_that_is_gone_is_told(made: Path, tmp_path: Path) -> None:
    masked = mask(made, "damaged")
    next(masked.glob("epoch_001/*.parquet")).unlink()
    with pytest.raises(IntegrityError, match="the file is missing"):
        recipe("transformers", str(masked))


def test_no_trainer_is_loaded_to_print_a_recipe(made: Path) -> None:
    code = (
        "import sys; from entrodrop_prep.cli import run;"
        "code = max(run(['recipe', trainer, sys.argv[1]]) for trainer in sys.argv[2:]);"
        "loaded = {'torch', 'transformers', 'trl', 'lightning', 'datasets'} & set(sys.modules);"
        "sys.exit(code or (str(loaded) if loaded else 0))"
    )
    command = [sys.executable, "-c", code, str(made / "labels"), *OURS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_help_names_every_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    run(["recipe", "--help"])
    said = "".join(capsys.readouterr().out.split())  # a line may end in a hyphen
    for trainer in TRAINERS:
        assert trainer in said


# --- pieces


@pytest.mark.parametrize(
    ("form", "said"), [("py", '"it\'s"'), ("yaml", '"it\'s"'), ("sh", "'it'\"'\"'s'")], ids=lambda x: x
)
def test_a_value_is_quoted_as_its_form_wants_it(
    form: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("entrodrop_prep.trainers.rendering.TEMPLATES", tmp_path)
    name = f"x.{form}.j2"
    (tmp_path / name).write_text("{% if yes %}\na = {{ a }}\n{% endif %}\nb = {{ b }}, {{ [a] }}\n")
    assert fill(name, {"a": "it's", "b": 1, "yes": True}) == f"a = {said}\nb = 1, [{said}]\n"
    assert fill(name, {"a": "it's", "b": 1, "yes": False}) == f"b = 1, [{said}]\n"
    with pytest.raises(jinja2.UndefinedError):
        fill(name, {"a": "it's", "yes": True})


def test_every_trainer_has_a_template() -> None:
    assert {f"{name}.{trainer.form}.j2" for name, trainer in TRAINERS.items()} | {"collate.py.j2"} == {
        path.name for path in TEMPLATES.iterdir()
    }


def test_comments_are_wrapped_and_tables_are_not() -> None:
    text = comment("word " * 60, "", "  " + "cell " * 40)
    lines = text.splitlines()
    assert all(line.startswith("#") for line in lines)
    assert all(len(line) <= 118 for line in lines[:-1])
    assert "#" in lines
    assert len(lines[-1]) > 118
