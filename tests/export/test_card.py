"""The dataset card: what it says in YAML and in words, what it keeps of the user's, its picture, and merging two."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import DatasetCard
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from entrodrop_prep import MaterializeConfig, cli, materialize
from entrodrop_prep.export.card import BEGIN, END, license_of, merged_card, with_license, write_card
from entrodrop_prep.export.card.picture import HEIGHT, WIDTH, picture
from entrodrop_prep.export.card.values import values
from entrodrop_prep.masking.histogram import BINS, PER_NAT, EntropyHistogram
from entrodrop_prep.store.manifest import read
from entrodrop_prep.store.schema import MASKED, masked_schema
from entrodrop_prep.verification.run import verify
from helpers.scored import rewrite_manifest, seal, some_rows, write_scored

SOURCE = {"kind": "hub", "dataset": "org/texts", "config": "default", "split": "train", "revision": "ab" * 20}
ROWS = some_rows(40)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``scored``, and ``masked`` with a validation split and a plain configuration."""
    folder = tmp_path_factory.mktemp("made")
    card = {"license": "cc-by-4.0", "language": ["en"]}
    for name, rows in (("scored", ROWS), ("held", some_rows(40, seed=5))):
        write_scored(folder / name, rows, rows_per_shard=9)
        described = read(folder / name, "scored/1")
        rewrite_manifest(
            folder / name,
            identity={**described["identity"], "source": SOURCE},
            source={**described["source"], "name": "org/texts", "card": card},
        )
        seal(folder / name)
    materialize(settings(folder, folder / "masked", eval=str(folder / "held"), plain_config=True))
    return folder


def settings(folder: Path, out: Path, **more: Any) -> MaterializeConfig:
    return MaterializeConfig(**{"scored": str(folder / "scored"), "out": str(out), "epochs": 3, "horizon": 4, **more})


def card_of(out: Path) -> str:
    return (out / "README.md").read_text()


def meta_of(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


# What it says.


def test_the_quantile_taken_by_default_is_named(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "quantile 0.5" in card_of(made / "masked")
    assert cli.run(["inspect", str(made / "masked")]) == 0
    assert "quantile 0.5" in capsys.readouterr().out


def test_its_counts_are_those_that_datasets_finds(made: Path, tmp_path: Path) -> None:
    """``load_dataset`` refuses a card whose row counts are wrong; sizes and features are compared here."""
    from datasets import DatasetInfo, Features, load_dataset
    from datasets.exceptions import NonMatchingSplitsSizesError

    masked = made / "masked"
    infos = {i["config_name"]: i for i in meta_of(card_of(masked))["dataset_info"]}
    assert sorted(infos) == ["all", "epoch_000", "epoch_001", "epoch_002", "plain"]
    for name in (None, "epoch_001", "plain"):
        loaded = load_dataset(str(masked), name, cache_dir=str(tmp_path / "cache"))
        told = infos[name or "all"]
        assert sorted(loaded) == ["train", "validation"]
        for split in told["splits"]:
            found = loaded[split["name"]]
            assert split["num_examples"] == len(found)
            assert split["num_bytes"] == found.info.splits[split["name"]].num_bytes
        assert DatasetInfo._from_yaml_dict(told).features == Features.from_arrow_schema(masked_schema())
    for path in masked.glob("*/*.parquet"):
        (tmp_path / "wrong" / path.parent.name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "wrong" / path.relative_to(masked)).write_bytes(path.read_bytes())
    wrong = card_of(masked).replace(f"num_examples: {len(loaded['train'])}\n", "num_examples: 8\n")
    (tmp_path / "wrong" / "README.md").write_text(wrong)
    with pytest.raises(NonMatchingSplitsSizesError):
        load_dataset(str(tmp_path / "wrong"), "plain", cache_dir=str(tmp_path / "cache"))


def test_its_keys_are_those_of_the_hub(made: Path) -> None:
    card = DatasetCard(card_of(made / "masked"))
    told = card.data.to_dict()
    assert told["license"] == "cc-by-4.0"
    assert told["language"] == ["en"]
    assert told["source_datasets"] == ["org/texts"]
    assert told["task_categories"] == ["text-generation"]
    assert told["size_categories"] == ["n<1K"]
    assert [c["config_name"] for c in told["configs"] if c.get("default")] == ["all"]
    assert "entrodrop" in told["tags"]


def test_licences_that_differ_or_are_not_known_are_not_named(made: Path) -> None:
    described = read(made / "masked", MASKED)
    one = {k: v for k, v in described.items() if k != "validation"}
    other = {**one["scored"], "name": "b", "source": {"name": "b", "digest": "0", "card": {"license": "mit"}}}
    unknown = {**one["scored"], "name": "c", "source": {"name": "c", "digest": "0"}}
    assert values(one)["license"] == "cc-by-4.0"
    for second in (other, unknown):
        assert "license" not in values({**one, "scored": [one["scored"], second]})
    assert values({**one, "scored": [one["scored"], one["scored"]]})["license"] == "cc-by-4.0"
    assert "license" not in values({**one, "scored": unknown})
    many = {**one, "epochs": [{**e, "rows": 500_000} for e in one["epochs"]]}
    assert values(many)["size_categories"] == ["1M<n<10M"]


def test_its_words_tell_where_it_comes_from(made: Path) -> None:
    card, described = card_of(made / "masked"), read(made / "masked", MASKED)
    for said in (
        "arxiv.org/abs/2512.23422",
        f"at commit {SOURCE['revision']}",
        "licence cc-by-4.0",
        described["content_digest"],
        described["scored"]["content_digest"],
        "seed 0",
        "entrodrop verify",
        "entrodrop recipe transformers",
        "prevents overfitting",
        "![",
        "(entropy.svg)",
    ):
        assert said in card
    assert "Nothing here shows that" in card


# The picture.


def bars(drawn: bytes, colour: str) -> list[dict[str, float]]:
    found = ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}rect")
    sides = ("x", "y", "width", "height")
    return [{k: float(r.get(k, "0")) for k in sides} for r in found if r.get("fill") == colour]


def test_the_histogram_counts_the_trainable_tokens(made: Path) -> None:
    described = read(made / "masked", MASKED)
    told = described["entropy_histogram"]
    entropy = ROWS.entropy[ROWS.loss_mask]
    expected = [int(((entropy >= i / 8) & (entropy < (i + 1) / 8)).sum()) for i in range(len(told["counts"]))]
    assert told == {"bins_per_nat": 8, "counts": expected}
    assert sum(expected) == len(entropy)
    assert not verify(str(made / "masked"), [str(made / "scored"), f"eval={made / 'held'}"]).findings


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_scores_on_an_edge_are_of_the_bin_above(dtype: Any) -> None:
    counted = EntropyHistogram()
    below = np.nextafter(dtype(1), dtype(0))
    counted.add(np.array([0, -0.0005, 0.125, below, 1, 15.9, 16, 40], dtype))
    counts = counted.summary()["counts"]
    assert len(counts) == BINS
    assert {i: n for i, n in enumerate(counts) if n} == {0: 2, 1: 1, PER_NAT - 1: 1, PER_NAT: 1, BINS - 1: 3}
    with pytest.raises(ValueError, match="null score"):
        counted.add(np.array([np.nan], dtype))


def test_a_histogram_that_is_not_that_of_the_scores_is_found(made: Path, tmp_path: Path) -> None:
    materialize(settings(made, tmp_path / "out"))
    counts = read(tmp_path / "out", MASKED)["entropy_histogram"]["counts"]
    rewrite_manifest(tmp_path / "out", entropy_histogram={"bins_per_nat": 8, "counts": [counts[0] + 1, *counts[1:]]})
    assert not verify(str(tmp_path / "out")).findings
    assert any("entropy_histogram" in f for f in verify(str(tmp_path / "out"), str(made / "scored")).findings)


def test_the_picture_shows_the_counts(made: Path) -> None:
    described = read(made / "masked", MASKED)
    drawn = (made / "masked" / "entropy.svg").read_bytes()
    assert drawn == picture(described)
    counts = [n for n in described["entropy_histogram"]["counts"] if n]
    blue, red = bars(drawn, "#4477aa"), bars(drawn, "#cc3311")
    assert len(blue) == len(counts)
    for bar, count in zip(blue, counts, strict=True):
        assert bar["height"] == pytest.approx(180 * count / max(counts), abs=0.06)
    shares = [e["dropped_share"] for e in described["epochs"]]
    heights = [bar["height"] for bar in red]
    assert heights == pytest.approx([180 * s / 0.4 for s in shares], abs=0.06)
    for bar in [*blue, *red]:
        assert 0 <= bar["x"] <= bar["x"] + bar["width"] <= WIDTH
        assert 0 <= bar["y"] <= bar["y"] + bar["height"] <= HEIGHT


@pytest.mark.parametrize(
    "changes",
    [
        {"entropy_histogram": {"bins_per_nat": 8, "counts": []}},
        {"entropy_histogram": {"bins_per_nat": 8, "counts": [0] * 127 + [5]}},
        {"tau_nats": "selects none"},
        {"tau_nats": {"a": 1.5, "b": "selects none"}},
        {"tau_nats": {"column": "kind", "values": [["x", 0.5], [None, 99.0]]}},
        {"tau_nats": None},
        {"epochs": [{"epoch": e, "dropped_share": s} for e, s in enumerate([0.0] * 200 + [1.0])]},
        {"epochs": [{"epoch": 4, "dropped_share": 0.0}]},
    ],
)
def test_any_manifest_can_be_drawn(changes: dict[str, Any], made: Path) -> None:
    drawn = picture({**read(made / "masked", MASKED), **changes})
    assert drawn is not None
    assert b"nan" not in drawn
    for bar in [*bars(drawn, "#4477aa"), *bars(drawn, "#cc3311"), *bars(drawn, "#fbe3dc")]:
        assert 0 <= bar["x"] <= bar["x"] + bar["width"] <= WIDTH
        assert 0 <= bar["y"] <= bar["y"] + bar["height"] <= HEIGHT


def test_card_and_picture_are_made_from_the_manifest_alone(made: Path, tmp_path: Path) -> None:
    described, folder = read(made / "masked", MASKED), tmp_path / "masked"
    folder.mkdir()
    write_card(folder, described)
    for name in ("README.md", "entropy.svg"):
        assert (folder / name).read_bytes() == (made / "masked" / name).read_bytes()
    older = {k: v for k, v in described.items() if k != "entropy_histogram"}
    (tmp_path / "older").mkdir()
    write_card(tmp_path / "older", older)
    assert "entropy.svg" not in card_of(tmp_path / "older")
    assert [p.name for p in (tmp_path / "older").iterdir()] == ["README.md"]


# What the user changes.


def test_keys_of_ours_are_renewed_until_the_user_changes_them(made: Path, tmp_path: Path) -> None:
    described = read(made / "masked", MASKED)
    folder = tmp_path / "masked"
    folder.mkdir()

    def written(licence: str | None, **more: Any) -> dict[str, Any]:
        card = {"license": licence} if licence else {}
        source = {**described["scored"]["source"], "card": card}
        told = {k: v for k, v in described.items() if k != "validation"}
        write_card(folder, {**told, "scored": {**described["scored"], "source": source}, **more})
        return meta_of(card_of(folder))

    def edit(old: str, new: str) -> None:
        text = card_of(folder)
        assert old in text
        (folder / "README.md").write_text(text.replace(old, new, 1))

    assert written("mit")["license"] == "mit"
    assert written("cc0-1.0")["license"] == "cc0-1.0"
    assert "license" not in written(None)
    assert written("mit")["license"] == "mit"
    edit("license: mit", "license: odc-by   # asked them")
    assert written("cc0-1.0")["license"] == "odc-by"
    assert "license: odc-by   # asked them" in card_of(folder)
    edit("license: odc-by   # asked them\n", "")
    assert written("cc0-1.0")["license"] == "cc0-1.0"
    edit("license: cc0-1.0\n", "")
    assert "license" not in written("cc0-1.0")
    edit("configs:\n", "tags: [mine]\nconfigs:\n")
    assert written("mit")["tags"] == ["mine"]
    assert len(re.findall("^tags", card_of(folder), re.MULTILINE)) == 1
    info = {"config_name": "mine", "splits": [{"name": "train", "num_bytes": 1, "num_examples": 1}]}
    edit("dataset_info:\n", f"dataset_info:\n- {info}\n")
    after = written("mit", epochs=described["epochs"][:1])
    assert [i["config_name"] for i in after["dataset_info"]] == ["all", "epoch_000", "plain", "mine"]


# Merging two.


def test_merging_keeps_what_others_wrote_in_the_repository(made: Path) -> None:
    local = card_of(made / "masked")
    assert merged_card(local, None) == merged_card(local, "") == local
    assert merged_card(local, local) == local
    remote = (
        "---\nlicense: odc-by # theirs\npretty_name: Ours\nconfigs:\n- config_name: mine\n  data_files: x/*.csv\n"
        "- config_name: epoch_009\n  data_files: epoch_009/*\n---\nBefore.\n\n" + f"{BEGIN}\nold\n{END}\n\nAfter.\n"
    )
    merged = merged_card(local, remote.replace("\n", "\r\n"))
    meta = meta_of(merged)
    assert "license: odc-by # theirs\npretty_name: Ours\n" in merged
    names = [c["config_name"] for c in meta["configs"]]
    assert names == ["all", "epoch_000", "epoch_001", "epoch_002", "plain", "mine"]
    assert meta["language"] == ["en"]
    text = merged.split("---\n", 2)[2]
    assert text.strip().startswith("Before.")
    assert text.strip().endswith("After.")
    assert "\nold\n" not in text
    assert text.count(BEGIN) == 1
    assert "arxiv.org/abs/2512.23422" in text
    assert merged_card(local, merged) == merged


def test_what_was_added_here_arrives_and_what_was_added_there_stays(made: Path) -> None:
    pushed = card_of(made / "masked")
    here = f"{with_license(pushed, 'mit')}\n## Thanks\n\nTo all.\n"
    assert license_of(here) == "mit"
    first = merged_card(here, pushed)
    assert first.rstrip().endswith("To all.")
    assert license_of(first) == "mit"
    assert license_of(merged_card(with_license(here, "cc0-1.0"), first)) == "cc0-1.0", "nobody changed it there"
    there = with_license(first, "odc-by").replace("To all.", "To all of you.")
    again = merged_card(with_license(here, "cc0-1.0"), there)
    assert license_of(again) == "odc-by"
    assert again.rstrip().endswith("To all of you.")
    assert license_of("no front matter") is None
    assert license_of(with_license("no front matter", "mit")) == "mit"


LINES = st.lists(st.sampled_from(["", "# A", "text", "- item", "---", BEGIN, END, "license: mit"]), max_size=6)
FRONTS = st.one_of(
    st.none(),
    st.dictionaries(
        st.sampled_from(["license", "language", "tags", "configs", "dataset_info", "size_categories", "x-y"]),
        st.one_of(
            st.none(),
            st.sampled_from(["mit", "no", 3, True]),
            st.lists(st.sampled_from(["en", "no"]), max_size=2),
            st.lists(st.fixed_dictionaries({"config_name": st.sampled_from(["all", "mine", "plain"])}), max_size=2),
        ),
        max_size=5,
    ),
)


@hypothesis_settings(deadline=None, max_examples=60)
@given(front=FRONTS, lines=LINES)
def test_any_card_can_be_merged(front: dict[str, Any] | None, lines: list[str], made: Path) -> None:
    local = card_of(made / "masked")
    remote = ("" if front is None else f"---\n{yaml.safe_dump(front)}---\n") + "\n".join(lines)
    merged = merged_card(local, remote)
    meta = meta_of(merged)
    assert merged_card(local, merged) == merged
    names = [c["config_name"] for c in meta["configs"]]
    assert {"all", "epoch_000", "epoch_001", "epoch_002"} <= set(names)
    if front is not None:
        for key in set(front) - {"configs", "dataset_info"}:
            assert meta[key] == front[key]
        theirs = front.get("configs")
        if isinstance(theirs, list) and {"config_name": "mine"} in theirs:
            assert "mine" in names
    DatasetCard(merged)
