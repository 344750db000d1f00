"""Two cards laid over each other: what is the user's, wherever it was written, and what is ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from huggingface_hub import DatasetCard

from entrodrop_prep import MaterializeConfig, materialize
from entrodrop_prep.export.card import (
    clashing_configs,
    license_of,
    masked_card,
    merged_card,
    scored_card,
    with_license,
    write_card,
)
from entrodrop_prep.export.card.picture import WIDTH, picture
from entrodrop_prep.export.card.values import _feature, values
from entrodrop_prep.store.manifest import read
from entrodrop_prep.store.schema import MASKED
from entrodrop_prep.store.scored import ScoredDataset
from helpers.scored import rewrite_manifest, seal, some_rows, write_scored

THEIRS = "---\nlicense: cc-by-4.0\npretty_name: Mine\nmy: 1\n---\n# T\n\nwords\n"
NOTES = "\n\n## Notes\n\nThe dta is good.\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``scored``, of a Hub source, and ``masked``."""
    folder = tmp_path_factory.mktemp("made")
    write_scored(folder / "scored", some_rows(30), rows_per_shard=9)
    described = read(folder / "scored", "scored/1")
    source = {"kind": "hub", "dataset": "org/texts", "config": "default", "split": "train", "revision": "ab" * 20}
    rewrite_manifest(
        folder / "scored",
        identity={**described["identity"], "source": source},
        source={**described["source"], "name": "org/texts", "card": {"license": "mit", "language": ["en"]}},
    )
    seal(folder / "scored")
    materialize(MaterializeConfig(scored=str(folder / "scored"), out=str(folder / "masked"), epochs=2))
    return folder


def meta_of(card: str) -> dict[Any, Any]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


def pushed(made: Path, before: str, remote: str | None) -> str:
    """As a push makes the card: from the local README, the manifest, and the card that is there."""
    return merged_card(masked_card(before, read(made / "masked", MASKED), title="masked", repo="a/b"), remote)


# --- front matter


@pytest.mark.parametrize("begin", ["", "\ufeff", "\n", " \t\n\n", "\ufeff\n"])
def test_front_matter_behind_a_mark_or_empty_lines_is_front_matter(begin: str, made: Path, tmp_path: Path) -> None:
    merged = pushed(made, "", begin + THEIRS)
    meta = meta_of(merged)
    assert (meta["license"], meta["pretty_name"], meta["my"]) == ("cc-by-4.0", "Mine", 1)
    assert merged.count("\n---\n") == 1
    assert merged.startswith("---\n")
    assert license_of(begin + THEIRS) == "cc-by-4.0"
    (tmp_path / "README.md").write_text(begin + THEIRS, encoding="utf-8")
    write_card(tmp_path, read(made / "masked", MASKED))
    written = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert meta_of(written)["pretty_name"] == "Mine"
    assert written.count("\n---\n") == 1


@pytest.mark.parametrize("line", ["released: 2024-01-01", "1: x", "yes: x", "x: .nan", "x: {1: a}", "'a b': c"])
def test_any_key_that_yaml_has_is_kept(line: str, made: Path) -> None:
    local = pushed(made, "", None).replace("---\n", f"---\n{line}\n", 1)
    [(key, value)] = yaml.safe_load(line).items()
    for remote in (None, THEIRS, THEIRS.replace("my: 1", line)):
        merged = pushed(made, local, remote)
        assert repr(meta_of(merged)[key]) == repr(value)
        assert pushed(made, local, merged) == merged
        keys = [node.value for node, _ in yaml.compose(merged.split("---\n")[1]).value]
        assert len(keys) == len(set(keys)), "no key stands twice"


def test_a_configuration_of_the_users_own_is_not_taken_for_ours(made: Path) -> None:
    local = pushed(made, "", None)

    def named(name: str, **more: Any) -> str:
        return f"---\n{yaml.safe_dump({'configs': [{'config_name': name, **more}]})}---\n"

    for name, more, clashes in (
        ("all", {"data_files": "x/*.csv"}, True),
        ("epoch_000", {"data_files": [{"split": "train", "path": ["mine/a.csv", "epoch_000/*"]}]}, True),
        ("epoch_000", {"data_files": {"train": "mine/*"}}, True),
        ("all", {}, False),
        ("all", {"data_files": [{"split": "train", "path": ["epoch_000/train-*.parquet"]}]}, False),
        ("all", {"data_files": "x/*", "description": "content digest 12"}, False),
        ("epoch_009", {"data_files": "mine/*"}, False),
    ):
        remote = named(name, **more)
        assert clashing_configs(local, remote) == ([name] if clashes else [])
        names = [c["config_name"] for c in meta_of(pushed(made, "", remote))["configs"]]
        assert names == ["all", "epoch_000", "epoch_001", *(["epoch_009"] if name == "epoch_009" else [])]


# --- text


def test_a_text_that_was_edited_here_arrives(made: Path) -> None:
    """As long as it is there as an earlier push left it; what was changed there stays."""
    first = pushed(made, "# Mine" + NOTES, None)
    assert pushed(made, first, first) == first
    fixed = first.replace("dta", "data")
    second = pushed(made, fixed, first)
    assert "The data is good." in second
    assert "dta" not in second
    assert pushed(made, fixed, second) == second
    theirs = second.replace("is good", "is very good")
    third = pushed(made, fixed.replace("data", "text"), theirs)
    assert "The data is very good." in third
    assert "The data is very good." in pushed(made, fixed, third), "nor at the next push"


def test_another_directory_without_a_text_takes_none_away(made: Path) -> None:
    first = pushed(made, "# Mine" + NOTES, None)
    assert "The dta is good." in pushed(made, "", first)


# --- licence, and what a scored directory says


def test_an_unknown_licence_is_none(made: Path) -> None:
    described = read(made / "masked", MASKED)
    assert values(described)["license"] == "mit"
    source = {**described["scored"]["source"], "card": {"license": "unknown", "license_name": "x"}}
    told = values({**described, "scored": {**described["scored"], "source": source}})
    assert not {"license", "license_name"} & set(told)
    for license in ("unknown", "[unknown]"):
        assert license_of(f"---\nlicense: {license}\n---\n") is None
    assert license_of(with_license("", "mit")) == "mit"


def test_a_scored_card_says_what_a_masked_one_does(made: Path) -> None:
    scored = ScoredDataset(made / "scored")
    card = scored_card("# Mine\n\nWords.\n", scored, title="x", repo="alice/scores", with_recipe=True)
    meta = meta_of(card)
    masked = meta_of(pushed(made, "", None))
    for key in ("license", "language", "source_datasets", "task_categories", "size_categories", "tags"):
        assert meta[key] == masked[key]
    for said in (
        "Words.",
        "at commit abab",
        scored.content_digest,
        f"reference model: {scored.manifest['model']['name']} (",
        'MaskedRows.from_hub("alice/scores")',
        "entrodrop verify alice/scores",
    ):
        assert said in card
    assert "path/or/repo" not in card
    again = scored_card(card, scored, title="x", repo="alice/scores", with_recipe=True)
    assert again == card == merged_card(card, card)
    DatasetCard(card)
    assert "entropy.svg" not in card
    scored.manifest["entropy_histogram"] = {"bins_per_nat": 8, "counts": [1, 2]}
    assert "(entropy.svg)" in scored_card("", scored, title="x", repo="a/b", with_recipe=False)
    drawn = picture(scored.manifest)
    assert drawn is not None
    assert b"dropped" not in drawn
    assert f'width="{WIDTH}"'.encode() not in drawn


def test_features_are_those_that_datasets_finds() -> None:
    from datasets import Features

    text, numbers = pa.string(), pa.list_(pa.int8())
    schema = pa.schema(
        [
            ("a", pa.float16()),
            ("b", pa.list_(pa.float32())),
            ("c", pa.struct([("x", pa.float64()), ("y", pa.list_(text))])),
            ("d", pa.timestamp("us", tz="UTC")),
            ("e", pa.list_(pa.struct([("q", pa.bool_()), ("r", numbers)]))),
            ("f", pa.date32()),
            ("g", pa.decimal128(10, 2)),
            ("h", pa.list_(numbers)),
            ("i", pa.binary()),
            ("j", pa.time64("us")),
        ]
    )
    told = [_feature(field) for field in schema]
    assert told == Features.from_arrow_schema(schema)._to_yaml_list()
