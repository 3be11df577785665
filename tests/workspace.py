"""Where things stand in this checkout; shared by the workspace's tests."""

import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("bufmgr", "patterncache", "kernels", "attention")  # bottom up


def source(package: str) -> Path:
    """Return the folder with the package's own modules."""
    return ROOT / "packages" / package / "src" / "longattn" / package


def modules() -> list[Path]:
    """Return every Python file that ships, in a stable order."""
    return sorted(path for package in PACKAGES for path in source(package).rglob("*.py"))


@cache
def files() -> tuple[str, ...]:
    """Return paths, relative to the root, of every file that is or could be committed; skip without git."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: cannot tell which files belong to the project")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(sorted(name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()))
