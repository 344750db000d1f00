"""The dataset card: README.md, which makes each epoch a configuration for ``datasets`` and tells what this is.

The file is the user's: only some YAML keys and the block between the two marks are ours.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from entrodrop_prep.errors import OutputError
from entrodrop_prep.export.card.front import Front, configs, front_of, renewed, split_card, value_of, with_value
from entrodrop_prep.export.card.picture import NAME as PICTURE
from entrodrop_prep.export.card.picture import picture
from entrodrop_prep.export.card.tables import aligned, epoch_table, left_out, source_table
from entrodrop_prep.export.card.text import block_text
from entrodrop_prep.export.card.values import infos, values
from entrodrop_prep.shards import write_bytes

__all__ = [
    "BEGIN",
    "END",
    "NAME",
    "PICTURE",
    "aligned",
    "epoch_table",
    "left_out",
    "license_of",
    "merged_card",
    "source_table",
    "with_license",
    "write_card",
]

NAME = "README.md"
BEGIN = "<!-- entrodrop-prep: begin (rewritten by the tool) -->"
END = "<!-- entrodrop-prep: end -->"
_NOTE = re.compile(r"<!-- entrodrop-prep: keys (\{.*\}) -->\n")


def write_card(directory: Path, manifest: dict[str, Any]) -> None:
    """Write or renew README.md and its picture from a masked dataset's manifest alone.

    Raises OutputError for a README.md that is not text.
    """
    path = directory / NAME
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError as e:
        raise OutputError("it is not UTF-8 text", where=str(path), fix="mend or remove it, and run again") from e
    front, text = split_card(before)
    front, noted = renewed(front, Front(configs(manifest), infos(manifest), values(manifest)), _noted(text))
    text = _with_block(text if text.strip() else f"# {directory.resolve().name}\n", _block(block_text(manifest), noted))
    drawn, content = picture(manifest), _card(front, text)
    if drawn is not None and not _holds(directory / PICTURE, drawn):
        write_bytes(directory / PICTURE, drawn)
    if before != content:
        write_bytes(path, content.encode())


def merged_card(local: str, remote: str | None) -> str:
    """The card to push: a directory's card laid over the one that the repository has, if it has one.

    Our configurations, their counts and our block are those of ``local``. Of ``remote`` stay all other keys and
    configurations, and the text around the block, unless ``local`` has all its lines too and perhaps more. Keys
    that only ``local`` has are added; one that an earlier push wrote and nobody changed since is renewed.
    """
    local, remote = (card.replace("\r\n", "\n") for card in (local, remote or ""))
    if not remote.strip():
        return local
    front, text = split_card(local)
    their_front, their_text = split_card(remote)
    ours, also = front_of(front)
    merged, noted = renewed(their_front, ours, _noted(their_text), also)
    found = _find_block(text)
    block = _NOTE.sub("", text[slice(*found)]).removeprefix(f"{BEGIN}\n").removesuffix(f"\n{END}") if found else ""
    lines = iter(_outside(text).splitlines())
    base = text if all(line in lines for line in _outside(their_text).splitlines()) else their_text
    return _card(merged, _with_block(base, _block(block, noted)) if found else base)


def license_of(card: str) -> str | None:
    """The licence that a card's front matter names, or None."""
    found = value_of(split_card(card)[0], "license")
    return str(found) if found else None


def with_license(card: str, license: str) -> str:
    """A card whose front matter names this licence."""
    front, text = split_card(card)
    return _card(with_value(front, "license", license), text)


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def _card(front: str, text: str) -> str:
    return f"---\n{front}---\n\n{text.strip()}\n"


def _block(text: str, noted: dict[str, Any]) -> str:
    """Our block, with a note of the values in the front matter that are ours."""
    told = json.dumps(noted, sort_keys=True).replace(">", "\\u003e")
    note = f"<!-- entrodrop-prep: keys {told} -->\n" if noted else ""
    return f"{BEGIN}\n{note}{text}\n{END}"


def _noted(text: str) -> dict[str, Any]:
    """What the block in a card's text notes; nothing where it was changed beyond reading."""
    place = _find_block(text)
    found = _NOTE.search(text, *place) if place else None
    try:
        return dict(json.loads(found[1])) if found else {}
    except ValueError:
        return {}


def _find_block(text: str) -> tuple[int, int] | None:
    """Where our block begins and ends, marks included."""
    end = text.rfind(END)
    begin = text.rfind(BEGIN, 0, max(end, 0))
    return (begin, end + len(END)) if begin >= 0 else None


def _outside(text: str) -> str:
    """The user's text."""
    place = _find_block(text)
    return f"{text[: place[0]].rstrip()}\n{text[place[1] :].strip()}".strip() if place else text.strip()


def _with_block(text: str, block: str) -> str:
    """A card's text with our block in the place of the one it has, else at its end."""
    place = _find_block(text)
    if place:
        return text[: place[0]] + block + text[place[1] :]
    return f"{text.rstrip()}\n\n{block}\n" if text.strip() else block
