"""The texts of the study, from the Python that runs it: a general corpus, and domains with train, dev and test."""

from __future__ import annotations

import ast
import functools
import hashlib
import warnings
from collections.abc import Iterable, Iterator

from entrodrop_prep.demo.corpus import documents

DOMAINS, CHATS = ("code", "prose"), ("task", "chat")
"""``CHATS`` are questions with one answer each."""
PARTS = ("train", "dev", "test")
LONG_LINE, MOST_SEEN = 30, 0.2
"""A document is a copy where more than this share of its lines of so many characters was seen before."""
Document = tuple[str, str]
"""Name and text; of CHATS the question and, in a line of its own, the answer."""
WORDS = [
    "self",
    "name",
    "value",
    "type",
    "list",
    "path",
    "data",
    "test",
    "file",
    "class",
    "return",
    "not",
    "with",
    "from",
    "code",
    "line",
    "size",
    "text",
    "mode",
    "time",
]
QUESTIONS, REVERSED = 2000, 3


def fraction(name: str) -> float:
    """A number in [0, 1) that depends on ``name`` alone."""
    return int.from_bytes(hashlib.sha256(f"study/{name}".encode()).digest()[:6]) / 2**48


@functools.cache
def general() -> list[Document]:
    """The modules of the standard library that no domain is made of, in an order by hash."""
    return sorted(documents(held_out=False), key=lambda d: fraction(d[0]))


def domain(name: str) -> list[Document]:
    """The documents of a domain, by hash, without copies.

    ``code``: held-out modules; ``prose``: topics of the language reference; ``task``: words to be reversed; ``chat``:
    what a function or class of a held-out module is, from its docstring.
    """
    if name == "code":
        found = documents(held_out=True)
    elif name == "task":
        found = _reversals()
    elif name == "chat":
        found = _docstrings()
    else:
        from pydoc_data.topics import topics

        found = iter(topics.items())
    return without_copies(sorted(found, key=lambda d: fraction(d[0])), general())


def _reversals() -> Iterator[Document]:
    for question in {" ".join(_words(i)): None for i in range(QUESTIONS)}:
        yield question, f"reverse: {question}\n{' '.join(reversed(question.split()))}"


def _words(number: int) -> list[str]:
    return [WORDS[int(fraction(f"{number}/{at}") * len(WORDS))] for at in range(REVERSED)]


def _docstrings() -> Iterator[Document]:
    """Answers of 20 to 120 characters that are one paragraph, each once."""
    found: dict[str, str] = {}
    for file, text in documents(held_out=True):
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                answer = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if 20 <= len(answer) <= 120 and answer.endswith("."):
                    found.setdefault(answer, f"{file.removesuffix('.py').replace('/', '.')}.{node.name}")
    names = {name: answer for answer, name in found.items()}
    yield from ((name, f"What is {name}?\n{answer}") for name, answer in names.items())


def without_copies(found: Iterable[Document], known: Iterable[Document] = ()) -> list[Document]:
    """The documents of ``found`` most of whose long lines are new, compared with ``known`` and those before."""
    seen = {line for _, text in known for line in _lines(text)}
    kept = []
    for name, text in found:
        lines = _lines(text)
        if sum(line in seen for line in lines) <= MOST_SEEN * len(lines):
            kept.append((name, text))
            seen.update(lines)
    return kept


def _lines(text: str) -> list[str]:
    return [line for raw in text.splitlines() if len(line := raw.strip()) >= LONG_LINE]


def parts(found: list[Document], sizes: dict[str, int], tokens: dict[str, int]) -> dict[str, list[Document]]:
    """Documents to each of PARTS until it has its ``sizes`` in tokens; ``tokens`` are those of each document.

    A document goes to the part that lacks the largest share of its size, unless that would exceed it by a tenth.
    """
    made: dict[str, list[Document]] = {part: [] for part in sizes}
    filled = dict.fromkeys(sizes, 0)
    for name, text in found:
        part = min(sizes, key=lambda p: filled[p] / sizes[p])
        if filled[part] + tokens[name] <= 1.1 * sizes[part]:
            made[part].append((name, text))
            filled[part] += tokens[name]
    return made
