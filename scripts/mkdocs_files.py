"""Hook of MkDocs (mkdocs.yml): the site's pages are the repository's Markdown files, at their own paths.

So a link that works on GitHub works on the site too. docs/api.md is made here, from the table of public names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from entrodrop_prep import PUBLIC

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """The pages of the repository and the files that they link to, beside those of the theme."""
    folders = ("benchmarks", "examples", "study")
    pages = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(p for name in folders for p in (ROOT / name).glob("*.md")),
    ]
    linked = [page.parent / target for page in pages for target in LINK.findall(page.read_text(encoding="utf-8"))]
    paths = dict.fromkeys([*pages, *(path.resolve() for path in linked if path.is_file())])
    made = [File.generated(config, p.relative_to(ROOT).as_posix(), abs_src_path=str(p)) for p in paths]
    theme = [file for file in files if ROOT / "docs" not in Path(file.abs_src_path or "").parents]
    return Files([*theme, *made, File.generated(config, "docs/api.md", content=api_page())])


def api_page() -> str:
    """Markdown for mkdocstrings: one directive for each public name."""
    directive = "::: {}\n    options:\n      heading: {}\n      toc_label: {}\n"
    targets = "\n".join(directive.format(target.replace(":", "."), name, name) for name, target in PUBLIC.items())
    return f"# API\n\nEverything that `entrodrop_prep` exports, from its docstrings.\n\n{targets}\n"
