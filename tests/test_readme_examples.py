"""Every Python block in the pages a reader starts from runs as it stands."""

import re
import tomllib
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


def test_no_install_command_leaves_a_sibling_to_an_index() -> None:
    """No index has our packages, so what one may have under such a name is a stranger's: commands name paths, and those below each package."""
    pages = ["README.md", *(f"packages/{package}/README.md" for package in PACKAGES)]
    pages += [
        f"docs/{page.relative_to(ROOT / 'docs')}"
        for page in (ROOT / "docs").rglob("*.md")
        if "_build" not in page.parts
    ]
    found = 0
    for page in pages:
        for command in re.findall(r"pip install [^`\n]*", (ROOT / page).read_text(encoding="utf-8")):
            named = re.findall(r"\./packages/(\w+)", command)
            found += bool(named)
            below = {name for package in named for name in siblings(package)}
            assert below <= set(named) and "longattn-" not in command, f"{page}: {command}"
    assert found >= 2 * len(PACKAGES)


def siblings(package: str) -> list[str]:
    """The packages that one declares."""
    text = (ROOT / "packages" / package / "pyproject.toml").read_text(encoding="utf-8")
    declared = tomllib.loads(text)["project"]["dependencies"]
    return [name for name in PACKAGES for line in declared if line.startswith(f"longattn-{name}")]
