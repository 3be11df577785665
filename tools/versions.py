"""Notes in docs/versions.csv how the tests went on the Python, torch and numpy at hand: `python -m tools.versions REPORT TESTS`, pytest's JUnit file."""

from __future__ import annotations

import csv
import platform
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "docs" / "versions.csv"
COLUMNS: tuple[str, ...] = (
    "python",
    "torch",
    "numpy",
    "machine",
    "tests",
    "passed",
    "failed",
    "skipped",
    "date",
    "commit",
)
KEY = COLUMNS[:5]


def counted(report: Path) -> dict[str, str]:
    """How many tests passed, failed and were skipped."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failed, broken, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    bad = failed + broken
    return {"passed": str(total - bad - skipped), "failed": str(bad), "skipped": str(skipped)}


def rows(file: Path = FILE) -> list[dict[str, str]]:
    """What was noted, by torch and Python."""
    if not file.exists():
        return []
    with open(file, encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def note(row: dict[str, str], file: Path = FILE) -> None:
    """Write a row; one of the same versions, machine and tests is replaced."""
    others = [other for other in rows(file) if any(other[name] != row[name] for name in KEY)]
    ordered = sorted([*others, row], key=lambda one: [tuple(map(_number, one[name].split("."))) for name in KEY[1::-1]])
    with open(file, "w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)


def _number(part: str) -> int:
    return int("".join(letter for letter in part if letter.isdigit()) or 0)


def main(report: Path, tests: str) -> int:
    """Note the report; 1 where a test failed."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True, cwd=FILE.parent).stdout.strip()
    row = {
        "python": platform.python_version(),
        "torch": version("torch").partition("+")[0],
        "numpy": version("numpy"),
        "machine": platform.machine(),
        "tests": tests,
        **counted(report),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": commit,
    }
    note(row)
    print(", ".join(f"{name} {value}" for name, value in row.items()))
    return int(row["failed"] != "0")


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2]))
