"""A repeated call enters few files, and the page that shows its walk names files that there are."""

import re
import subprocess
import sys

from tests.workspace import ROOT, source

# ring size -> files of ours that a repeated call enters at most, where the native row serves.
MOST_FILES = {1: 16, 4: 20}
MORE_OF_TORCH = 8  # rows of torch's operations stand in so many more


def test_a_repeated_call_enters_few_files() -> None:
    """Counted in a process of its own, without the fixtures of tests."""
    command = [sys.executable, "-m", "tools.trace_call", "--count", *map(str, MOST_FILES)]
    traced = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for line, most in zip(traced.stdout.splitlines(), MOST_FILES.values(), strict=True):
        count, row = line.split()
        assert int(count) <= most + (0 if row == "native" else MORE_OF_TORCH)


def test_the_page_names_files_that_there_are() -> None:
    """A module that was moved is shown where it is now: write the page again."""
    page = (ROOT / "docs" / "a-call.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)/([\w/]+\.py)` \|", page, re.MULTILINE))
    assert len(named) > 20
    assert [] == sorted(name for package, name in named if not (source(package) / name).is_file())
