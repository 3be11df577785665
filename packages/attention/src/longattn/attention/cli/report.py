"""What a subcommand tells, and its three forms: tables on a terminal, plain text elsewhere, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

NO_PICTURES = "pictures need matplotlib: pip install matplotlib"


@dataclass(frozen=True)
class Table:
    """Rows of text under column names; `title` may be empty."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Report:
    """What a subcommand tells.

    Attributes:
        data: all of it, as JSON can say it.
        parts: tables and paragraphs for people, in order.
        status: exit status; 1 where the answer is no.
    """

    data: dict[str, Any]
    parts: list[Table | str] = field(default_factory=list[Table | str])
    status: int = 0


def print_report(report: Report, *, as_json: bool) -> None:
    """Print it: JSON where asked; with rich's tables where rich is installed and somebody looks; else aligned text."""
    if as_json:
        print(json.dumps(report.data, indent=2))
    elif sys.stdout.isatty() and find_spec("rich") is not None:
        _print_rich(report)
    else:
        print("\n".join(part if isinstance(part, str) else aligned(part) for part in report.parts))
    # A pipe that nobody reads fails here, where `main` expects it, and not at the interpreter's end.
    sys.stdout.flush()


def aligned(table: Table) -> str:
    """The table as text: two blanks between columns, numbers to the right."""
    lines = [table.columns, *table.rows]
    widths = [max(len(line[c]) for line in lines) for c in range(len(table.columns))]
    right = [all(_is_number(row[c]) for row in table.rows) and bool(table.rows) for c in range(len(table.columns))]
    text = [
        "  ".join(
            cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*([table.title] if table.title else []), *text])


def _is_number(cell: str) -> bool:
    return not cell or cell[0].isdigit() or (cell[0] in "-." and len(cell) > 1)


def _print_rich(report: Report) -> None:
    console = import_module("rich.console").Console(highlight=False)
    drawn = import_module("rich.table").Table
    for part in report.parts:
        if isinstance(part, str):
            console.print(part, markup=False, soft_wrap=True)
            continue
        table = drawn(title=part.title or None, title_justify="left", header_style="bold")
        for c, name in enumerate(part.columns):
            number = bool(part.rows) and all(_is_number(row[c]) for row in part.rows)
            table.add_column(name, justify="right" if number else "left", overflow="fold")
        for row in part.rows:
            table.add_row(*(import_module("rich.text").Text(cell) for cell in row))
        console.print(table)
