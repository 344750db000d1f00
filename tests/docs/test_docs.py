"""The documentation is true: it is made from the program, run, or compared with it."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import entrodrop_prep
from entrodrop_prep import errors
from entrodrop_prep.config import MaterializeConfig, Recipe, RecipeConfig, flag, settings
from helpers.warm import OFFLINE

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "entrodrop_prep" / "demo" / "model"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")), MODEL / "MODEL_CARD.md"]
LINKING = [
    *PAGES,
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "examples/README.md")),
]
TEXTS = [
    *PAGES,
    *(p for folder in ("docs", "examples", "scripts", "entrodrop_prep") for p in sorted((ROOT / folder).rglob("*.py"))),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?%?")
MACHINE_PATH = re.compile(r"(?<![\w.*}])/(?:home|root|tmp|mnt|opt|work|workspace|Users)/\w")


def _generator() -> Any:
    spec = importlib.util.spec_from_file_location("docs_generator", ROOT / "scripts" / "docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docs = _generator()


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# --- generated from the program


@pytest.mark.parametrize("path", docs.GENERATED, ids=_name)
def test_what_is_generated_is_what_the_program_says(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == docs.GENERATED[path](), "run `make docs`"


def test_every_public_name_says_what_it_is() -> None:
    for line in docs.library_page().splitlines():
        assert not line.endswith("|  |"), line


@pytest.mark.parametrize("command", sorted(docs.commands()))
def test_every_command_and_option_is_documented(command: str) -> None:
    section = re.search(rf"^## entrodrop {command}\n(.*?)(?=^## |\Z)", _text("docs/cli.md"), re.MULTILINE | re.DOTALL)
    assert section, f"docs/cli.md has no section on {command}"
    for parameter in docs.commands()[command].params:
        for name in re.split(r", | / ", docs.names_of(parameter).removesuffix(f" {parameter.metavar}")):
            assert f"`{name}`" in section[1], f"{name} of {command} is not documented"
        assert parameter.help, f"{command} {parameter.name} has no help text"


@pytest.mark.parametrize("cls", docs.CONFIGS.values())
def test_every_setting_is_in_the_settings_table(cls: type) -> None:
    table = _text("docs/cli.md").partition(f"### {cls.__name__}\n")[2].partition("###")[0]
    for name in settings(cls):
        assert f"| `{name}` |" in table


# --- run


@pytest.fixture(scope="module")
def after_the_readme(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str]]]:
    """A folder in which the README's marked commands were run; for each block, what it says and what was printed."""
    folder = tmp_path_factory.mktemp("readme")
    blocks = docs.BLOCK.findall(_text("README.md"))
    programs = tmp_path_factory.mktemp("programs")
    OFFLINE.program(programs / "entrodrop", "-m", "entrodrop_prep")
    return folder, [(block, docs.transcript(block, folder, programs)) for block in blocks]


def test_the_readme_shows_what_its_commands_print(after_the_readme: tuple[Path, list[tuple[str, str]]]) -> None:
    _, blocks = after_the_readme
    for name in ("score", "materialize", "verify", "inspect"):
        assert any(f"$ entrodrop {name} " in said for said, _ in blocks), f"the README runs no {name}"
    for said, printed in blocks:
        for line, now in zip(said.splitlines(), printed.splitlines(), strict=True):
            assert _alike(line, now), f"the README says\n{line}\nthe program prints\n{now}\nrun `make docs`"


def _alike(said: str, printed: str) -> bool:
    """The same words, and numbers that differ by no more than two processors' arithmetic may make them."""
    if NUMBER.sub("#", said).split() != NUMBER.sub("#", printed).split():
        return False
    pairs = zip(NUMBER.findall(said), NUMBER.findall(printed), strict=True)
    return all(math.isclose(_number(a), _number(b), rel_tol=0.02, abs_tol=0.5 * a.endswith("%")) for a, b in pairs)


def _number(text: str) -> float:
    return float(text.replace(",", "").removesuffix("%"))


@pytest.mark.parametrize("trainer", docs.PAGES)
def test_a_trainers_page_shows_its_recipe(trainer: str, after_the_readme: tuple[Path, list[tuple[str, str]]]) -> None:
    said = docs.PAGES[trainer].read_text(encoding="utf-8")
    assert len(docs.RECIPE.findall(said)) == 1
    printed = docs.recipe_page(said, trainer, after_the_readme[0])
    for line, now in zip(said.splitlines(), printed.splitlines(), strict=True):
        assert _alike(line, now), f"the page says\n{line}\nthe program prints\n{now}\nrun `make docs`"


def test_the_readme_loads_what_it_wrote(
    after_the_readme: tuple[Path, list[tuple[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = after_the_readme
    marked = re.findall(r"<!-- run -->\n```python\n(.*?)```", _text("README.md"), re.DOTALL)
    assert marked
    monkeypatch.chdir(folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    names: dict[str, Any] = {}
    for code in marked:
        exec(compile(code, "README.md", "exec"), names)
    assert names["epoch"].column_names == ["input_ids", "attention_mask", "labels"]
    assert len(names["every"]) == 4 * len(names["epoch"])
    assert names["every"][len(names["every"]) - 1] == names["epoch"][len(names["epoch"]) - 1]


def test_the_picture_is_that_of_what_the_readme_wrote(after_the_readme: tuple[Path, list[tuple[str, str]]]) -> None:
    drawn = (after_the_readme[0] / "masked" / "entropy.svg").read_text()
    for svg in (drawn, _text("docs/entropy.svg")):
        assert svg.startswith("<svg ")
    said, now = (re.findall(r">([^<]+)</text>", svg) for svg in (_text("docs/entropy.svg"), drawn))
    assert len(said) == len(now) > 10
    for one, other in zip(said, now, strict=True):
        assert _alike(one, other), "run `make docs`"


def test_the_example_trains(after_the_readme: tuple[Path, list[tuple[str, str]]]) -> None:
    folder, _ = after_the_readme
    script = ROOT / "examples" / "train_with_transformers.py"
    done = OFFLINE.run(
        [sys.executable, str(script), "masked", "--model", str(MODEL), "--out", "trained", "--batch", "12"],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"'loss': '?([0-9.]+)", done.stdout)]
    assert len(losses) == 4, done.stdout  # 4 epochs of 12 rows, 12 a step
    assert all(math.isfinite(x) and x > 0 for x in losses)
    assert (folder / "trained" / "model.safetensors").stat().st_size > 0


# --- what docs/training.md claims of transformers


@pytest.fixture(scope="module")
def epochs(after_the_readme: tuple[Path, list[tuple[str, str]]]) -> Any:
    from datasets import load_dataset

    folder = after_the_readme[0]
    return load_dataset(str(folder / "masked"), split="train", cache_dir=str(folder / "cache"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(MODEL))


def test_seq2seq_collator_keeps_labels(epochs: Any, tokenizer: Any) -> None:
    from transformers import DataCollatorForSeq2Seq

    rows = [epochs[i] for i in (-1, -2, -3)]
    assert any(label == -100 for label in rows[0]["labels"][1:])
    batch = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)([dict(row) for row in rows])
    for row, labels, attention in zip(rows, batch["labels"].tolist(), batch["attention_mask"].tolist(), strict=True):
        n = len(row["labels"])
        assert labels[:n] == row["labels"]
        assert set(labels[n:]) <= {-100}
        assert attention == [1] * n + [0] * (len(labels) - n)


def test_language_modelling_collator_loses_masks(epochs: Any, tokenizer: Any) -> None:
    from transformers import DataCollatorForLanguageModeling

    row = dict(epochs[-1])
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)([dict(row)])
    assert batch["labels"][0].tolist() != row["labels"]
    assert batch["labels"][0, 1:-1].tolist() == row["input_ids"][1:-1]


def test_default_collator_does_not_pad_labels(epochs: Any) -> None:
    from transformers import default_data_collator

    assert len(epochs[0]["labels"]) != len(epochs[1]["labels"])
    with pytest.raises(ValueError, match="length"):
        default_data_collator([epochs[0], epochs[1]])


def test_trainer_reads_in_order_only_if_asked(epochs: Any, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(str(MODEL))

    def first_ids(**options: Any) -> list[list[int]]:
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=1, report_to=[], use_cpu=True, **options
        )
        collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
        trainer = Trainer(model=model, args=arguments, train_dataset=epochs, data_collator=collator)
        return [batch["input_ids"][0].tolist() for batch in trainer.get_train_dataloader()]

    in_files = [row["input_ids"] for row in epochs]
    assert first_ids(train_sampling_strategy="sequential") == in_files
    assert first_ids() != in_files


def test_another_dataset_of_the_same_name_is_not_taken_for_an_older_one(
    after_the_readme: tuple[Path, list[tuple[str, str]]], tmp_path: Path
) -> None:
    """``datasets`` knows a local directory in its cache by its last name and its card, not by its files."""
    from datasets import load_dataset

    scored = str(after_the_readme[0] / "scored")
    labels = []
    for folder, seed in (("a", 0), ("b", 1)):
        out = str(tmp_path / folder / "masked")
        entrodrop_prep.materialize(MaterializeConfig(scored=scored, out=out, epochs=4, seed=seed))
        loaded = load_dataset(out, "epoch_003", split="train", cache_dir=str(tmp_path / "cache"))
        labels.append(loaded["labels"][:])
    assert labels[0] != labels[1]


def test_the_loss_is_a_mean_over_the_labels_left(epochs: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(MODEL), dtype=torch.float32).eval()
    row = epochs[-1]
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    with torch.inference_mode():
        out = model(input_ids=ids, labels=labels)
    logprob = out.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    kept = labels[0, 1:] != -100
    assert 0 < kept.sum() < len(kept)
    torch.testing.assert_close(out.loss, -logprob[kept].mean(), rtol=1e-4, atol=1e-4)


# --- compared with the program


def test_the_choices_table_has_every_setting_of_a_recipe_and_its_default() -> None:
    rows = dict(re.findall(r"^\| [^|]* \| `(--[\w-]+)`[^|]* \| ([^|]*) \|$", _text("docs/method.md"), re.MULTILINE))
    for name, (_, setting, default) in settings(Recipe).items():
        said = rows.get(flag(name))
        assert said is not None, f"docs/method.md does not list {flag(name)}"
        if setting.default_text == "0.5" or isinstance(default, (str, float, int)):
            wanted = setting.default_text or str(default)
            assert said.startswith(f"`{wanted}`"), f"docs/method.md: {flag(name)} is {wanted}"


def test_the_default_rates_are_those_the_docs_name() -> None:
    from entrodrop_prep.masking.curriculum import epoch_rates

    *first, last = (f"{r:.3f}" for r in epoch_rates(Recipe(epochs=4)))
    assert f"{', '.join(first)} and {last}" in " ".join(_text("docs/masks.md").split())


def test_the_error_tree_is_that_of_the_code() -> None:
    block = re.search(r"```text\n(EntrodropError.*?)```", _text("docs/errors.md"), re.DOTALL)
    assert block
    drawn = "\n".join(line.removeprefix("    ").rstrip() for line in (errors.__doc__ or "").splitlines())
    assert block[1].strip() in drawn
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.EntrodropError):
            assert re.search(rf"\b{name}\b", block[1])


def test_the_architecture_page_names_what_there_is() -> None:
    listing = _text("docs/architecture.md").partition("## ")[0]
    said = set(re.findall(r"^      ([\w./]+)", listing, re.MULTILINE))
    package = ROOT / "entrodrop_prep"
    there = {p.name for p in package.glob("*.py")} | {f"{p.name}/" for p in package.iterdir() if any(p.glob("*.py"))}
    assert said == there - {"__main__.py"}


def test_what_to_touch_to_add_something_is_there() -> None:
    table = _text("docs/architecture.md").partition("## To add something")[2].partition("\n## ")[0]
    named = [name for name in re.findall(r"`([\w./]+)`", table) if "/" in name]
    assert len(named) > 15
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_changelog_knows_the_version() -> None:
    assert f"## {entrodrop_prep.__version__}" in _text("CHANGELOG.md")


def test_the_licence_is_apache_2() -> None:
    text = _text("LICENSE")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


# --- in form


@pytest.mark.parametrize("page", LINKING, ids=_name)
def test_links_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.is_file(), f"{_name(page)} links to {target}"
        if anchor:
            assert anchor in _anchors(path), f"{_name(page)} links to {target}"


def _anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_page_is_in_the_index() -> None:
    index = _text("docs/README.md")
    for page in sorted((ROOT / "docs").rglob("*.md")):
        assert page.name == "README.md" or f"({page.relative_to(ROOT / 'docs').as_posix()})" in index


def test_the_site_shows_every_page_once() -> None:
    listed = re.findall(r"[\w./-]+\.md$", _text("mkdocs.yml").partition("\nnav:\n")[2], re.MULTILINE)
    there = [_name(page) for page in LINKING if page.is_relative_to(ROOT / "docs") or page not in PAGES]
    there += ["README.md", "CHANGELOG.md", "docs/api.md"]  # scripts/mkdocs_files.py makes the last one
    assert sorted(listed) == sorted(there)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_code_blocks_are_code(page: Path) -> None:
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            compile(block, _name(page), "exec")
        elif language == "json":
            json.loads(block)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_options_named_in_the_docs_exist(page: Path) -> None:
    known = {n for c in docs.commands().values() for p in c.params for n in [*p.opts, *p.secondary_opts]} | {
        *("--version", "--help", "--install-completion", "--show-completion"),
        *("--nope", "--modle"),  # among the mistakes
        "--middleware",  # of the vLLM server that `entrodrop serve` starts
        "--dataset",  # of ms-swift
        "--train",  # of LitGPT, as in --train.epochs
        *("--trainer", "--grid"),  # of examples/compare.py and of the study
        *("--estimator", "--bounds", "--top-k"),  # of earlier versions, whose directories are refused
    }
    # Of the containers' own options tests/docs/test_docker.py knows.
    others = r"(?:pip|python|--check|docker (?:build|run|compose)|apptainer|hf (?:download|cache))"
    shown = docs.RECIPE.sub("", page.read_text(encoding="utf-8"))  # tests/trainers/test_recipe_others.py knows of these
    text = re.sub(others + r"(?:[^\n]*\\\n)*.*", "", shown)
    for option in set(re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*(?![\w-])", text)):
        assert option in known, f"{_name(page)} speaks of {option}"


@pytest.mark.parametrize("file", TEXTS, ids=_name)
def test_nothing_is_promised_and_no_machine_is_named(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    for word in (r"\bTODO\b", r"\bFIXME\b", r"\bXXX\b", r"(?i)coming soon", r"(?i)not yet implemented"):
        assert not re.search(word, text), f"{_name(file)}: {word}"
    found = MACHINE_PATH.search(text)
    assert not found, f"{_name(file)} names {found[0] if found else ''}"


def test_the_settings_of_all_commands_are_documented_once() -> None:
    assert set(docs.CONFIGS.values()) == {
        entrodrop_prep.ScoreConfig,
        entrodrop_prep.ServeConfig,
        MaterializeConfig,
        entrodrop_prep.PushConfig,
        RecipeConfig,
    }
