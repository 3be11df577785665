"""Every Python block in the pages a reader starts from runs as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.workspace import PACKAGES, ROOT

PAGES = ("README.md", "CONTRIBUTING.md", "GLOSSARY.md", *(f"packages/{package}/README.md" for package in PACKAGES))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
INSTALL = re.compile(r"`pip install((?: \./packages/\w+)+)`")


def blocks() -> list[Any]:
    """Return (page, text) of each block; blank lines keep the page's own line numbers in a traceback."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start(1))
            found.append(pytest.param(page, "\n" * line + match.group(1), id=f"{page}:{line + 1}"))
    return found


@pytest.mark.parametrize(("page", "text"), blocks())
def test_block_runs(page: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block runs in a fresh namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    exec(compile(text, str(ROOT / page), "exec"), {"__name__": "example"})


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_has_an_example(package: str) -> None:
    """A package's README shows it at work."""
    assert BLOCK.search((ROOT / "packages" / package / "README.md").read_text(encoding="utf-8"))


def test_an_install_command_per_package() -> None:
    """The README names one command per package; the nox session `install` runs each of them."""
    commands = INSTALL.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert list(PACKAGES) == [command.split("/")[-1] for command in commands]
