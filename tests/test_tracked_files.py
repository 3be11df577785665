"""What may not be committed: this machine's paths, registry addresses, lock files, reports."""

import re
from fnmatch import fnmatch

import pytest

from tests.workspace import PACKAGES, ROOT, files

# One letter of each stands in brackets, so that this file does not find itself.
ADDRESS = re.compile(
    r"pyp[i]\.org|python[h]osted|registry\.np[m]js|deb\.deb[i]an|download\.pyto[r]ch"
    r"|(?<![\w.}])/(?:wor[k]|op[t]|tm[p]|roo[t]|hom[e]/\w+)/"
)
LOCKS_AND_REPORTS = ("uv.lock", "pylock*.toml", "poetry.lock", "*.log", "*.orig", "*.rej", ".coverage*", "*.whl")


def test_no_address_and_no_path_of_a_machine() -> None:
    """Nothing committed works on one machine only."""
    found = []
    for name in files():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{name}:{number}: {line[:120]}" for number, line in enumerate(text.splitlines(), 1) if ADDRESS.search(line)
        ]
    assert [] == found


def test_no_lock_file_and_no_report() -> None:
    """A lock file records addresses; a report is made again, not kept."""
    names = [(name, name.rsplit("/", 1)[-1]) for name in files()]
    assert [] == [name for name, base in names if any(fnmatch(base, pattern) for pattern in LOCKS_AND_REPORTS)]


@pytest.mark.parametrize("package", PACKAGES)
def test_news_fragments_are_named_by_rule(package: str) -> None:
    """A fragment is called ISSUE.KIND.md, and is not empty."""
    fragments = [path for path in (ROOT / "packages" / package / "changelog.d").iterdir() if path.name != ".gitkeep"]
    kinds = r"\d+\.(added|changed|deprecated|removed|fixed)\.md"
    assert [] == [path.name for path in fragments if not re.fullmatch(kinds, path.name) or not path.read_text().strip()]


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_carries_the_licence(package: str) -> None:
    """Each wheel ships the same licence text."""
    assert (ROOT / "LICENSE").read_text() == (ROOT / "packages" / package / "LICENSE").read_text()
