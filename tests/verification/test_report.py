"""The report: one page whose masks are those of the files, and on which no text of a row can do anything."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entrodrop_prep import cli
from entrodrop_prep.config import MaterializeConfig
from entrodrop_prep.export.materialize import materialize
from entrodrop_prep.store.rows import to_rows
from entrodrop_prep.store.scored import ScoredDataset
from entrodrop_prep.training.rows import MaskedRows
from entrodrop_prep.verification.pieces import PARTIAL, pieces
from entrodrop_prep.verification.report import report
from helpers.mixtures import with_column
from helpers.models import markov_model, run_score, write_rows
from helpers.scored import some_rows, write_scored
from helpers.tokenizers import byte_bpe

EPOCHS = 3
HOSTILE = [
    "<script>window.broken = 1</script></script><!--<script>",
    "\"quotes\" 'and' `backticks` & &amp; &lt;b&gt; {{ 7*7 }} {% raw %}",
    "nul \x00 bell \x07 escape \x1b[31m backspace \x08 and \u2028 lines \u2029",
    "right to left \u202e\u05d0\u05d1\u05d2 \u2066 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "emoji \U0001f469\u200d\U0001f52c \U0001f3f3\ufe0f\u200d\U0001f308 done",
    "x" * 10_000,  # one token
]


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has every byte, and one token of 10,000 characters."""
    directory = markov_model(tmp_path_factory.mktemp("of-bytes") / "model", vocabulary=512).directory
    tokenizer = byte_bpe()
    tokenizer.add_tokens(HOSTILE[-1])
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scored and a masked directory, a mixture of two, and a packed one; never written to by a test."""
    folder = tmp_path_factory.mktemp("made")
    write_scored(folder / "scored", some_rows(40, lengths=(2, 20)), with_id=True)
    write_scored(folder / "other", some_rows(20, seed=1, lengths=(2, 20)))
    one = MaterializeConfig(scored=str(folder / "scored"), out=str(folder / "masked"), epochs=EPOCHS)
    materialize(one)
    materialize(replace(one, out=str(folder / "packed"), pack=64))
    mixed = (f"a={folder / 'scored'}", f"b={folder / 'other'}:0.5")
    materialize(MaterializeConfig(scored=mixed, out=str(folder / "mixed"), epochs=2, pack=64, target="both"))
    return folder


class Page(HTMLParser):
    """The elements of a page, and the text of its scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self._inside = False
        self.feed(self.text)
        self.data: dict[str, Any] = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        self._inside = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[-1] += data

    @property
    def shape(self) -> list[str]:
        """The elements that do not depend on how many rows are shown."""
        return [tag for tag, _ in self.tags if tag not in ("li", "bdi", "mark", "button", "tr", "td")]


def bits(row: dict[str, Any], epoch: int) -> list[bool]:
    """Which tokens a page says an epoch drops."""
    packed = np.frombuffer(b64decode(row["dropped"][epoch]), np.uint8)
    return [bool(b) for b in np.unpackbits(packed, bitorder="little")[: len(row["ids"])]]


def test_masks_and_scores_are_those_of_the_directories(made: Path, tmp_path: Path) -> None:
    page = Page(report(made / "masked", tmp_path / "r.html", against=[str(made / "scored")], rows=500))
    by_ids = {}
    for batch in ScoredDataset(made / "scored").batches():
        for r in range(batch.num_rows):
            row = to_rows(batch.slice(r, 1))
            by_ids[batch.column("id")[r].as_py(), int(row.window[0])] = row
    shown = {r["label"]: r for r in page.data["rows"]}
    assert len(shown) == sum(row.trainable.any() for row in by_ids.values())
    files = [pq.read_table(made / "masked" / f"epoch_{e:03d}").to_pylist() for e in range(EPOCHS)]
    wrong = 0
    for (name, window), row in by_ids.items():
        label = f"row {row.row_id[0]}{f', window {window}' if window else ''}, {name}"
        if label not in shown:
            continue
        one = shown[label]
        assert one["ids"] == row.input_ids.tolist()
        wanted = [-1 if np.isnan(h) else round(float(h) * 1000) for h in row.entropy]
        assert one["entropy"] == wanted
        assert [bool(f & 1) for f in one["flags"]] == row.trainable.tolist()
        for epoch in range(EPOCHS):
            labels = [
                i if t and not d else -100 for i, t, d in zip(one["ids"], row.trainable, bits(one, epoch), strict=True)
            ]
            wrong += {"input_ids": one["ids"], "labels": labels} not in [
                {n: f[n] for n in ("input_ids", "labels")} for f in files[epoch]
            ]
    assert wrong == 0
    assert "&rarr;replacement" not in page.text


def test_a_scored_directory_shows_what_a_recipe_would_drop(made: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("quantile: 0.3\nepochs: 2\n")
    page = Page(report(made / "scored", tmp_path / "r.html", recipe=str(recipe), rows=500))
    masks = MaskedRows.open(made / "scored", recipe, cache_dir=tmp_path / "cache")
    assert len(page.data["rates"]) == 2
    dropped = [sum(sum(bits(r, e)) for r in page.data["rows"]) for e in range(2)]
    trainable = sum(f & 1 for r in page.data["rows"] for f in r["flags"])
    left = [sum(label != -100 for label in masks[i]["labels"]) for i in range(len(masks))]
    first = masks.epoch_lengths[0]
    assert dropped == [trainable - sum(left[:first]), trainable - sum(left[first:])]


def test_a_packed_mixture_shows_replacements_and_its_sources(made: Path, tmp_path: Path) -> None:
    against = [f"a={made / 'scored'}", f"b={made / 'other'}"]
    page = Page(report(made / "mixed", tmp_path / "r.html", against=against, rows=500))
    assert {r["label"].split()[0] for r in page.data["rows"]} == {"a", "b"}
    absent = [r for r in page.data["rows"] if None in r["dropped"]]
    assert absent, "half of b is not in an epoch"
    assert all(r["label"].startswith("b ") for r in absent)
    assert any(r["replaced"][1] for r in page.data["rows"])
    assert "By source" in page.text
    assert "&rarr;replacement" in page.text


@pytest.mark.parametrize("kind", ["masked", "mixed"])
def test_the_share_that_is_dropped_is_that_of_the_epochs(kind: str, made: Path, tmp_path: Path) -> None:
    """Of a mixture, whose weights leave rows out of an epoch, too."""
    against = {"masked": str(made / "scored"), "mixed": [f"a={made / 'scored'}", f"b={made / 'other'}"]}[kind]
    page = Page(report(made / kind, tmp_path / "r.html", against=against))
    epochs = json.loads((made / kind / "manifest.json").read_text())["epochs"]
    share = sum(e["dropped_share"] * e["trainable"] for e in epochs) / sum(e["trainable"] for e in epochs)
    assert f"Over all epochs {share:.1%} of the trainable tokens are dropped." in page.text


def test_hostile_text_changes_nothing_of_the_page(tmp_path: Path) -> None:
    pages = []
    for name, texts in (("plain", [f"quiet {i}" for i in range(len(HOSTILE))]), ("hostile", HOSTILE)):
        write_scored(tmp_path / name, some_rows(6, lengths=(4, 12)))
        with_column(tmp_path / name, "kind", pa.string(), texts.__getitem__)
        pages.append(Page(report(tmp_path / name, tmp_path / f"{name}.html")))
    assert "window.broken = 1</script>" not in pages[1].text
    assert len(pages[1].scripts) == 2
    assert {t for t, _ in pages[1].tags} == {t for t, _ in pages[0].tags}
    links = [v for _, attrs in pages[1].tags for n, v in attrs.items() if n in ("src", "href") and v]
    assert all(v.startswith(("data:", "#")) for v in links if v), links
    assert not [n for _, attrs in pages[1].tags for n in attrs if n.startswith("on")]


def test_pieces_add_up_to_the_text() -> None:
    tokenizer = byte_bpe()
    for text in ("naïve 日本 \U0001f469\u200d\U0001f52c!", "def f(x):\n    return x\n", " leading"):
        ids = tokenizer(text)["input_ids"]
        assert "".join(p for p in pieces(tokenizer, ids) if p != PARTIAL) == tokenizer.decode(ids)
    cut = tokenizer("\U0001f469")["input_ids"][:-1]
    assert set(pieces(tokenizer, cut)) == {PARTIAL}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["masked"], "--against SCORED"),
        (["masked", "--against", "{made}/other"], "content digests differ"),
        (["masked", "--against", "{made}/scored", "--epochs", "2"], "leave out --recipe and --epochs"),
        (["mixed", "--against", "{made}/scored"], "--against NAME=SCORED"),
        (["scored", "--against", "{made}/scored"], "for masked directories"),
        (["scored", "--recipe", "{made}/none.yaml"], "none.yaml"),
        (["nothing"], "nothing"),
    ],
)
def test_mistakes_end_in_one_line(arguments: list[str], words: str, made: Path, tmp_path: Path, capfd: Any) -> None:
    rest = [a.replace("{made}", str(made)) for a in arguments[1:]]
    assert cli.run(["report", str(made / arguments[0]), *rest, "-o", str(tmp_path / "r.html")]) == 2
    found = capfd.readouterr().err.splitlines()
    assert len(found) == 1
    assert found[0].startswith("error: ")
    assert words in found[0]
    assert not (tmp_path / "r.html").exists()


def test_only_an_earlier_report_is_replaced(made: Path, tmp_path: Path, capfd: Any) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine</p>")
    assert cli.run(["report", str(made / "scored"), "-o", str(mine)]) == 2
    assert "no report of this program" in capfd.readouterr().err
    assert mine.read_text() == "<p>mine</p>"
    report(made / "scored", tmp_path / "r.html", rows=1)
    first = (tmp_path / "r.html").read_bytes()
    report(made / "scored", tmp_path / "r.html", rows=2)
    assert (tmp_path / "r.html").read_bytes() != first


def test_the_same_directory_gives_the_same_page(made: Path, tmp_path: Path) -> None:
    found = [report(made / "scored", tmp_path / f"{i}.html").read_bytes() for i in range(2)]
    assert found[0] == found[1]


# In a browser.

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or "chromium"
PROBE = """
<script>
const found = {errors: [], blocked: [], struck: [], details: "", keyboard: "", contrast: [], small: []};
window.addEventListener("error", (e) => found.errors.push(e.message));
document.addEventListener("securitypolicyviolation", (e) => found.blocked.push(e.blockedURI));
</script>
"""
ACTIONS = f"<script>{(Path(__file__).parent / 'probe.js').read_text()}</script>"


def in_browser(path: Path, tmp_path: Path, *, dark: bool = False, width: int = 1440) -> dict[str, Any]:
    """What the actions above found on a page."""
    text = path.read_text(encoding="utf-8")
    text = text.replace("<title>", PROBE + "<title>", 1).replace("</body>", ACTIONS + "</body>")
    page = tmp_path / f"probed-{path.stem}-{dark}-{width}.html"
    page.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"),
            *("--blink-settings=preferredColorScheme=0",) * dark,
            f"--user-data-dir={tmp_path / 'profile'}",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(found[-1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    return result


@pytest.mark.browser
@pytest.mark.parametrize("kind", ["masked", "packed", "mixed", "scored"])
def test_a_browser_shows_it(kind: str, made: Path, tmp_path: Path) -> None:
    against = {
        "masked": [str(made / "scored")],
        "packed": [str(made / "scored")],
        "mixed": [f"a={made / 'scored'}", f"b={made / 'other'}"],
        "scored": None,
    }
    check_in_browser(report(made / kind, tmp_path / f"{kind}.html", against=against[kind]), tmp_path)


@pytest.mark.browser
def test_a_browser_shows_the_turns_of_a_chat(of_bytes: Path, tmp_path: Path) -> None:
    turns = [("user", "What is 2 + 2?"), ("assistant", "2 + 2 = 4."), ("user", "And 3?"), ("assistant", "5, or 6?")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    source = write_rows(tmp_path / "chats.jsonl", [chat] * 4)
    run_score(source, of_bytes, tmp_path / "scored", chat_template="chatml")
    materialize(MaterializeConfig(scored=str(tmp_path / "scored"), out=str(tmp_path / "masked"), epochs=EPOCHS))
    page = check_in_browser(
        report(tmp_path / "masked", tmp_path / "r.html", against=[str(tmp_path / "scored")]), tmp_path
    )
    assert page.data["turns"]
    row = page.data["rows"][0]
    trained = "".join(text for text, flags in zip(row["text"], row["flags"], strict=True) if flags & 1)
    assert trained == "2 + 2 = 4.<|im_end|>5, or 6?<|im_end|>"


@pytest.mark.browser
def test_a_million_tokens_open_in_two_seconds(tmp_path: Path) -> None:
    rows = some_rows(2200, lengths=(400, 600))
    assert rows.lengths.sum() > 1_000_000
    scored = write_scored(tmp_path / "scored", rows, rows_per_shard=500)
    materialize(MaterializeConfig(scored=str(scored), out=str(tmp_path / "masked"), epochs=EPOCHS))
    path = report(tmp_path / "masked", tmp_path / "r.html", against=[str(scored)])
    assert path.stat().st_size < 3_000_000
    found = in_browser(path, tmp_path)
    print(f"{path.stat().st_size:,} bytes, open after {found['opened']:.0f} ms")
    assert found["opened"] < 2000


def check_in_browser(path: Path, tmp_path: Path) -> Page:
    """Open a page in both themes, wide and narrow; returns it."""
    page = Page(path)
    for dark, width in ((False, 1440), (True, 500)):
        found = in_browser(path, tmp_path, dark=dark, width=width)
        assert (found["errors"], found["blocked"], found["contrast"], found["small"]) == ([], [], [], [])
        assert not found["wide"], "the page scrolls sideways"
        epochs = range(len(page.data["rates"]))
        for row, struck in zip(page.data["rows"], found["struck"], strict=True):
            for epoch in epochs:
                wanted = [] if row["dropped"][epoch] is None else np.flatnonzero(bits(row, epoch)).tolist()
                assert struck[epoch] == wanted
        row = page.data["rows"][0]
        score_of = row["entropy"][1]
        assert f"token 1: id {row['ids'][1]} " in found["details"]
        assert f"entropy {score_of / 1000:.3f}" in found["details"] or score_of < 0
        assert "token 2: " in found["keyboard"]
    return page


@pytest.mark.browser
def test_a_browser_shows_hostile_rows_harmlessly(of_bytes: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "name": text[:60]} for text in (*HOSTILE[:-1], f"a {HOSTILE[-1]} b")]
    run_score(write_rows(tmp_path / "rows.jsonl", rows), of_bytes, tmp_path / "scored", id_column="name")
    path = report(tmp_path / "scored", tmp_path / "r.html")
    for width in (500, 1440):
        found = in_browser(path, tmp_path, width=width)
        assert (found["errors"], found["blocked"], found["wide"], found["small"]) == ([], [], False, [])
    page = Page(path)
    assert HOSTILE[0][:60] in page.data["rows"][0]["label"]
    assert [text for text in page.data["rows"][-1]["text"] if text.startswith("xxx") and "(10,000 characters)" in text]
    assert "<" not in page.scripts[0]
    assert len(found["struck"]) == len(page.data["rows"]) == len(HOSTILE)
