"""Rows of a CSV file: one for each run, written as the run ends, so that a stopped command goes on where it was."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path


def finished(path: Path, run: Mapping[str, object]) -> bool:
    """Whether a file holds a row with these fields."""
    if not path.exists():
        return False
    with path.open(newline="") as file:
        return any(all(row[name] == str(value) for name, value in run.items()) for row in csv.DictReader(file))


def append(path: Path, *rows: Mapping[str, object]) -> None:
    """Add rows to a file, with its header where the file is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
