"""Text that is safe to show: URLs without what is secret in them, names without characters that act on a terminal."""

from __future__ import annotations

import re
import unicodedata

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>`]+")
# Where one part of an fsspec chain, `zip://rows.jsonl::https://host/a.zip`, ends; `::` of an IPv6 address is none.
_CHAIN = re.compile(r"::(?=[A-Za-z][A-Za-z0-9+.-]*(?:://|::|$))")
_ENDS_A_SENTENCE = ".,;:!)]}"
LONGEST = 2000
"""Characters of a message; of a longer one the middle is left out."""
_JOINERS = "\u200c\u200d"  # part of words and emoji
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def shown_url(url: str) -> str:
    """A URL as it may be shown and recorded: without ``user:password@``, and with ``?...`` for its query.

    Args:
        url: a URL, or several that fsspec chains with ``::``. Other text is given back as it is.
    """
    return "::".join(_shown(part) for part in _CHAIN.split(url))


def without_secrets(text: str) -> str:
    """Any text, with each URL in it as ``shown_url`` gives it."""

    def shown(match: re.Match[str]) -> str:
        url = match[0].rstrip(_ENDS_A_SENTENCE)
        return shown_url(url) + match[0][len(url) :]

    return _URL.sub(shown, text) if "://" in text else text


def printable(text: str) -> str:
    """Text that stays in one line and leaves the terminal alone.

    Control characters, line ends, marks that change the direction of writing, and bytes of a name that are not UTF-8
    are written as escapes, for example ``\\n``, ``\\x1b``, ``\\u202e``.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(c) if _acts(c) else c for c in text)


def one_line(text: str) -> str:
    """A message as it is printed: in one line, printable, without secrets of URLs, and short whatever it quotes."""
    line = printable(" ".join(without_secrets(text).split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"


def _shown(url: str) -> str:
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url
    is_http = scheme.lower() in ("http", "https")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    port = authority.rpartition("@")[2].rpartition("]")[2].partition(":")[2]
    if port and not port.isdecimal() and "@" in rest:  # a password with a slash in it
        rest = rest.rpartition("@")[2]
    elif "@" in authority:
        rest = authority.rpartition("@")[2] + rest[len(authority) :]
    if is_http:
        rest = rest.partition("#")[0]
    path, question, query = rest.partition("?")
    if question and (is_http or "=" in query):  # elsewhere it may be a wildcard
        rest = f"{path}?..."
    return f"{scheme}://{rest}"


def _acts(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name, as Python keeps it
        return f"\\x{code - 0xDC00:02x}"
    short = f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return _SHORT.get(character, short)
