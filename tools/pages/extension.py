"""The Sphinx extension of these pages: files of the repository as pages, `{rows}` blocks as tables, figures drawn before anything is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tools.pages.figures import FIGURES, save
from tools.pages.plots import draw_all
from tools.pages.repository import SHOWN, shown
from tools.pages.tables import TABLES

_ROWS = re.compile(r"^```\{rows\} (?P<name>.+)\n```$", re.MULTILINE)


def draw(app: Any) -> None:
    """Write every figure into `_figures` below the pages."""
    folder = Path(app.srcdir) / "_figures"
    folder.mkdir(exist_ok=True)
    for name, figure in FIGURES.items():
        save(figure(), folder / f"{name}.svg")
    for name, plot in draw_all():
        save(plot, folder / f"{name}.svg")


def with_tables(text: str) -> str:
    """The text, its `{rows}` blocks replaced by tables.

    Raises:
        KeyError: a block names no table.
    """
    return _ROWS.sub(lambda match: TABLES[match["name"]](), text)


def read(app: Any, docname: str, source: list[str]) -> None:
    """What Sphinx reads instead of the page's own text."""
    source[0] = shown(docname) if docname in SHOWN else with_tables(source[0])


def with_examples(lines: list[str]) -> list[str]:
    """A docstring's lines, where an indented block after a paragraph and a blank line is marked as Python."""
    marked: list[str] = []
    above, block = "", False
    for at, line in enumerate(lines):
        depth, floor = len(line) - len(line.lstrip()), len(above) - len(above.lstrip())
        if line.strip():
            begins = not block and at > 0 and not lines[at - 1].strip() and depth > floor and above
            if begins and not above.rstrip().endswith(":"):
                marked += [" " * floor + ".. code-block:: python", ""]
            block = bool(begins) or (block and depth > floor)
            above = above if block else line
        marked.append(line)
    return marked


def document(app: Any, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """What Sphinx reads instead of a docstring."""
    lines[:] = with_examples(lines)


def with_joined_names(lines: list[str]) -> list[str]:
    """A docstring's lines, where Sphinx takes `a, b` of one description for names and not for a type and a name: no white space between them."""
    return [
        re.sub(r", ", ",\N{ZERO WIDTH SPACE}", match[0]) + line[match.end() :]
        if (match := re.match(r"\s*:ivar [\w, ]+:", line))
        else line
        for line in lines
    ]


def document_fields(app: Any, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """What Sphinx reads instead of what napoleon made of a docstring."""
    lines[:] = with_joined_names(lines)


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("builder-inited", draw)
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", document, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", document_fields, priority=600)  # after it
    return {"parallel_read_safe": True}
