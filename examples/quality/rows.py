"""Rows of a CSV file: one for each run, written as the run ends, so that a stopped command goes on where it was."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from benchmarks.record import surroundings


class Rows:
    """A file of runs. Each row ends with where it was made: processor, threads, torch, commit and day as they were when this began."""

    def __init__(self, path: Path) -> None:
        self.path, self.where = path, asdict(surroundings())

    def finished(self, run: Mapping[str, object]) -> bool:
        """Whether the file holds a row with these fields."""
        if not self.path.exists():
            return False
        with self.path.open(newline="") as file:
            return any(all(row[name] == str(value) for name, value in run.items()) for row in csv.DictReader(file))

    def append(self, *rows: Mapping[str, object]) -> None:
        """Add rows, with a header where the file is new."""
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *self.where], lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows({**row, **self.where} for row in rows)
