"""Every Python block in the pages a reader starts from runs as it stands."""

import re
from pathlib import Path

import pytest

from tests.readme_blocks import BLOCK, blocks, run_block
from tests.workspace import PACKAGES, ROOT

GUIDE = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts
)
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "GLOSSARY.md",
    *(f"packages/{package}/README.md" for package in PACKAGES),
    *GUIDE,
)
INSTALL = re.compile(r"`pip install((?: \./packages/\w+)+)`")


EXAMPLES = [pytest.param(page, text, id=f"{page}:{line}") for page in PAGES for line, text in blocks(ROOT / page)]


@pytest.mark.parametrize(("page", "text"), EXAMPLES)
def test_block_runs(page: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block runs in a fresh namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    run_block(ROOT / page, text)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_has_an_example(package: str) -> None:
    """A package's README shows it at work."""
    assert BLOCK.search((ROOT / "packages" / package / "README.md").read_text(encoding="utf-8"))


def test_an_install_command_per_package() -> None:
    """The README names one command per package; the nox session `install` runs each of them."""
    commands = INSTALL.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert list(PACKAGES) == [command.split("/")[-1] for command in commands]
