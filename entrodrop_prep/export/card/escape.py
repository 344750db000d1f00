"""Names in Markdown: they show as they are, and are neither HTML, nor Markdown, nor more than one line."""

from __future__ import annotations

import re
from typing import Any

from entrodrop_prep.terminal.text import printable, without_secrets

_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_MARKUP = re.compile(r"[\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_PLAIN = re.compile(r"[A-Za-z0-9 ./:=@%+,_-]+")


def words(value: Any) -> str:
    """A value as text within a line of Markdown, also in a cell of a table."""
    text = printable(without_secrets(str(value)))
    return re.sub("[&<>]", lambda m: _HTML[m[0]], _MARKUP.sub(r"\\\g<0>", text))


def code(value: Any) -> str:
    """A value as code, or as ``words`` where it could end the code."""
    text = str(value)
    return f"`{text}`" if _PLAIN.fullmatch(text) and text.strip() else words(text)
