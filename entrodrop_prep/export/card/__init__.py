"""The dataset card: README.md, which makes each epoch a configuration for ``datasets`` and says what this is.

The file is the user's: only some YAML keys and the block between the two marks are ours. The block notes which values
in the YAML are ours, and the digest of the text around it where that came from here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from entrodrop_prep.errors import OutputError
from entrodrop_prep.export.card.escape import words
from entrodrop_prep.export.card.front import (
    Front,
    clashing,
    configs,
    front_of,
    renewed,
    split_card,
    value_of,
    with_value,
)
from entrodrop_prep.export.card.picture import NAME as PICTURE
from entrodrop_prep.export.card.picture import picture
from entrodrop_prep.export.card.scored import scored_front, scored_text
from entrodrop_prep.export.card.tables import aligned, epoch_table, left_out, source_table
from entrodrop_prep.export.card.text import NO_REPO, block_text
from entrodrop_prep.export.card.values import infos, is_known, values
from entrodrop_prep.store import digest, inside
from entrodrop_prep.store.disk import write_bytes
from entrodrop_prep.store.scored import ScoredDataset

__all__ = [
    "BEGIN",
    "END",
    "NAME",
    "PICTURE",
    "aligned",
    "clashing_configs",
    "epoch_table",
    "is_known",
    "left_out",
    "license_of",
    "masked_card",
    "merged_card",
    "read_card",
    "scored_card",
    "source_table",
    "with_license",
    "write_card",
]

NAME = "README.md"
BEGIN = "<!-- entrodrop-prep: begin (rewritten by the tool) -->"
END = "<!-- entrodrop-prep: end -->"
_NOTE = re.compile(r"<!-- entrodrop-prep: keys (\{.*\}) -->\n")
_TEXT_NOTE = re.compile(r"<!-- entrodrop-prep: text ([0-9a-f]{64}) -->\n")


def write_card(directory: Path, manifest: dict[str, Any]) -> None:
    """Write or renew README.md and its picture from a masked dataset's manifest alone.

    Raises OutputError for a README.md that is not text.
    """
    path = directory / NAME
    before = read_card(directory)
    drawn, content = picture(manifest), masked_card(before, manifest, title=directory.resolve().name)
    if drawn is not None and not _holds(directory / PICTURE, drawn):
        write_bytes(directory / PICTURE, drawn)
    if before != content:
        write_bytes(path, content.encode())


def read_card(directory: Path) -> str:
    """README.md, empty where there is none. Raises OutputError for one that is not text, IntegrityError for a link."""
    path = directory / NAME
    if not inside.exists(path):
        return ""
    try:
        with inside.opened(path) as f:
            return f.read().decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as e:
        raise OutputError("it is not UTF-8 text", where=str(path), fix="fix or remove it, and run again") from e


def masked_card(before: str, manifest: dict[str, Any], *, title: str, repo: str = NO_REPO) -> str:
    """The card of a masked dataset: ``before``, with what is ours as the manifest says; its code loads ``repo``."""
    front = Front(configs(manifest), infos(manifest), values(manifest))
    return _renewed_card(before, front, block_text(manifest, repo), title)


def scored_card(before: str, scored: ScoredDataset, *, title: str, repo: str, with_recipe: bool) -> str:
    """As ``masked_card``, of a scored directory; ``with_recipe``: a recipe is beside it."""
    return _renewed_card(before, scored_front(scored), scored_text(scored, repo, with_recipe=with_recipe), title)


def _renewed_card(before: str, ours: Front, block: str, title: str) -> str:
    front, text = split_card(before.replace("\r\n", "\n"))
    front, noted = renewed(front, ours, _noted(text))
    text = text if text.strip() else f"# {words(title)}\n"
    return _card(front, _with_block(text, _block(block, noted, _around(text))))


def merged_card(local: str, remote: str | None) -> str:
    """The card to push: a directory's card laid over the one that the repository has, if it has one.

    Our configurations, their counts and our block are those of ``local``. Of ``remote`` stay all other keys and
    configurations, and the text around the block, unless ``local`` has all its lines too and perhaps more, or it is
    what an earlier push brought and ``local`` has more than a title. Keys that only ``local`` has are added; one that
    an earlier push wrote and nobody changed since is renewed.
    """
    local, remote = (card.replace("\r\n", "\n") for card in (local, remote or ""))
    front, text = split_card(local)
    found = _find_block(text)
    if not remote.strip():
        return _card(front, _with_block(text, _renoted(text, found, _noted(text), _around(text)))) if found else local
    their_front, their_text = split_card(remote)
    ours, also = front_of(front)
    merged, noted = renewed(their_front, ours, _noted(their_text), also)
    known = _noted_text(their_text)
    pushed = known == _around(their_text) and len(_outside(text).splitlines()) > 1
    here = pushed or _has_lines_of(text, their_text)
    base = text if here else their_text
    if not found:
        return _card(merged, base)
    return _card(merged, _with_block(base, _renoted(text, found, noted, _around(base) if here else known)))


def clashing_configs(local: str, remote: str) -> list[str]:
    """Names of configurations of the repository's own that those of ``local`` would replace."""
    return clashing(split_card(remote.replace("\r\n", "\n"))[0], split_card(local)[0])


def license_of(card: str) -> str | None:
    """The licence that a card's front matter names, or None; ``unknown`` is none."""
    found = value_of(split_card(card)[0], "license")
    return str(found) if is_known(found) else None


def with_license(card: str, license: str) -> str:
    """A card whose front matter names this licence."""
    front, text = split_card(card)
    return _card(with_value(front, "license", license), text)


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def _card(front: str, text: str) -> str:
    return f"---\n{front}---\n\n{text.strip()}\n"


def _block(text: str, noted: dict[str, Any], around: str | None) -> str:
    """Our block, with a note of the values in the front matter that are ours and of the text around it."""
    keys = json.dumps(noted, sort_keys=True).replace(">", "\\u003e")
    note = f"<!-- entrodrop-prep: keys {keys} -->\n" if noted else ""
    note += f"<!-- entrodrop-prep: text {around} -->\n" if around else ""
    return f"{BEGIN}\n{note}{text}\n{END}"


def _renoted(text: str, span: tuple[int, int], noted: dict[str, Any], around: str | None) -> str:
    """The block of a card's text with other notes in it."""
    block = _TEXT_NOTE.sub("", _NOTE.sub("", text[slice(*span)]))
    return _block(block.removeprefix(f"{BEGIN}\n").removesuffix(f"\n{END}"), noted, around)


def _around(text: str) -> str:
    """The digest of the user's text."""
    return digest.of_json(_outside(text))


def _noted(text: str) -> dict[str, Any]:
    """What the block in a card's text notes; nothing where it was changed beyond reading."""
    span = _find_block(text)
    found = _NOTE.search(text, *span) if span else None
    try:
        return dict(json.loads(found[1])) if found else {}
    except ValueError:
        return {}


def _noted_text(text: str) -> str | None:
    """The digest that the block in a card's text notes of the text around it."""
    span = _find_block(text)
    found = _TEXT_NOTE.search(text, *span) if span else None
    return found[1] if found else None


def _has_lines_of(text: str, other: str) -> bool:
    """Whether the user's text in one has all lines of that in another, in order."""
    lines = iter(_outside(text).splitlines())
    return all(line in lines for line in _outside(other).splitlines())


def _find_block(text: str) -> tuple[int, int] | None:
    """Where our block begins and ends, marks included."""
    end = text.rfind(END)
    begin = text.rfind(BEGIN, 0, max(end, 0))
    return (begin, end + len(END)) if begin >= 0 else None


def _outside(text: str) -> str:
    """The user's text."""
    span = _find_block(text)
    return f"{text[: span[0]].rstrip()}\n{text[span[1] :].strip()}".strip() if span else text.strip()


def _with_block(text: str, block: str) -> str:
    """A card's text with our block replacing the one it has, else at its end."""
    span = _find_block(text)
    if span:
        return text[: span[0]] + block + text[span[1] :]
    return f"{text.rstrip()}\n\n{block}\n" if text.strip() else block
