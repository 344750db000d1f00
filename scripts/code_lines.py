"""Lines of code of folders: without blank lines, comments and docstrings. ``python scripts/code_lines.py DIR...``"""

from __future__ import annotations

import ast
import sys
import tokenize
from pathlib import Path

NOT_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
)


def code_lines(path: Path) -> int:
    """Lines of a Python file that hold a token which is neither a comment nor part of a docstring."""
    with path.open("rb") as f:
        tokens = [t for t in tokenize.tokenize(f.readline) if t.type not in NOT_CODE]
    lines = {n for t in tokens for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        print(f"{sum(map(code_lines, Path(folder).rglob('*.py'))):,} lines of code in {folder}")
