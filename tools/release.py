"""What the session `release` checks of built files: the same bytes in two builds, sums, versions and tags."""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("bufmgr", "patterncache", "kernels", "attention")
SUMS = "SHA256SUMS"


def version_of(package: str) -> str:
    """The version that a package's metadata states."""
    path = ROOT / "packages" / package / "pyproject.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))["project"]["version"]


def tag_of(package: str) -> str:
    """The tag of a package's release."""
    return f"{package}-v{version_of(package)}"


def earlier_tag(package: str, root: Path = ROOT) -> str | None:
    """The package's newest tag before HEAD, or None where it has never been released."""
    words = ["git", "-C", str(root), "tag", "--merged", "HEAD", "--sort=-version:refname", "--list", f"{package}-v*"]
    tags = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    return next((tag for tag in tags if tag != tag_of(package)), None)


def tagged_elsewhere(tag: str, root: Path = ROOT) -> bool:
    """Whether a tag names another commit than HEAD."""
    words = ["git", "-C", str(root), "rev-parse", "--quiet", "--verify"]
    commits = [
        subprocess.run([*words, f"{name}^{{commit}}"], capture_output=True, check=False).stdout
        for name in (f"refs/tags/{tag}", "HEAD")
    ]
    return bool(commits[0]) and commits[0] != commits[1]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, by name, but for the list of sums."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def differences(first: Path, second: Path) -> list[str]:
    """A line for each file that is not, byte for byte, in both folders."""
    one, other = digests(first), digests(second)
    missing = [f"{name}: only in one of the builds" for name in sorted(one.keys() ^ other.keys())]
    return missing + [
        f"{name}: the two builds differ" for name in sorted(one.keys() & other.keys()) if one[name] != other[name]
    ]


def write_sums(folder: Path) -> Path:
    """The list that `sha256sum --check` reads."""
    path = folder / SUMS
    path.write_text("".join(f"{digest}  {name}\n" for name, digest in digests(folder).items()), encoding="utf-8")
    return path


def unreleasable(packages: Sequence[str]) -> list[str]:
    """A line for each package whose version is no 0.MINOR.PATCH or is tagged already, or that requires a sibling's version which is not this one's series."""
    problems = []
    for package in packages:
        version = version_of(package)
        parts = version.split(".")
        if len(parts) != 3 or not all(part.isdecimal() for part in parts):
            problems.append(f"{package}: version must be MAJOR.MINOR.PATCH, got {version!r}")
        if tagged_elsewhere(tag_of(package)):
            problems.append(f"{package}: version {version} is tagged already, at another commit")
        path = ROOT / "packages" / package / "pyproject.toml"
        for requirement in tomllib.loads(path.read_text(encoding="utf-8"))["project"]["dependencies"]:
            for sibling in PACKAGES:
                series = ".".join(version_of(sibling).split(".")[:2])
                if requirement.startswith(f"longattn-{sibling}") and f">={series}" not in requirement:
                    problems.append(f"{package}: requires {requirement!r}, but {sibling} is {version_of(sibling)}")
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two folders of builds and write the sums of the first; 1 where anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tools.release", description=main.__doc__)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    options = parser.parse_args(arguments)
    problems = unreleasable(PACKAGES) + differences(options.first, options.second)
    for problem in problems:
        print(f"release: {problem}", file=sys.stderr)
    if problems:
        return 1
    print(write_sums(options.first).read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
