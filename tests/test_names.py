"""Names tell things apart; they do not rank them. Rooms stay small enough to read."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from tests.workspace import ROOT, files, modules, source

FORBIDDEN = re.compile(
    r"util|utils|helper|helpers|common|misc|improved|optimi[sz]ed|enhanced|refactored|manager\d|v\d+", re.IGNORECASE
)

# The seeds' users know these names; they are configurations in the attention package and nowhere else.
SEED_NAMES = {
    "ImprovedDilatedAttention",
    "ImprovedDilatedAttentionV2",
    "ImprovedMultiheadDilatedAttention",
    "ImprovedMultiheadDilatedAttentionV2",
    "RingDilatedAttentionV2",
    "RingDilatedAttentionV3",
    "RingMultiheadDilatedAttentionV2",
    "RingMultiheadDilatedAttentionV3",
}

MAX_LINES = 350

# Base names that three modules or more may have, and why.
SAME_NAMES = {
    "__init__.py": "a package is a folder",
    "testing.py": "each package's kit for its users' tests is imported by that name",
}


def words(name: str) -> list[str]:
    """Split snake_case, kebab-case and CamelCase into words."""
    return re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+\d*|[A-Z]+\d*|\d+", name)


def ranks(name: str) -> bool:
    """Return whether a word of the name ranks, or says nothing."""
    return any(FORBIDDEN.fullmatch(word) for word in words(name))


def symbols(tree: ast.AST) -> Iterator[str]:
    """Yield every function, class, argument-free assignment target and alias that a module defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("utils.py", True),
        ("string_helpers", True),
        ("ImprovedThing", True),
        ("pool_v2", True),
        ("DilatedAttentionV3", True),
        ("OptimizedCache", True),
        ("commonly_seen", False),
        ("value", False),
        ("conv1d", False),
        ("KV", False),
        ("dv", False),
    ],
)
def test_the_rule_itself(name: str, expected: bool) -> None:
    """The rule finds what it should and leaves the rest."""
    assert expected == ranks(name)


def test_file_names() -> None:
    """No file or folder of the project has a name that ranks or says nothing."""
    code = [name for name in files() if PurePosixPath(name).suffix in {".py", ".cpp", ".h", ".sh", ".md", ""}]
    assert [] == [name for name in code if any(ranks(part) for part in PurePosixPath(name).parts)]


@pytest.mark.parametrize("path", modules(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_symbols(path: Path) -> None:
    """No symbol that ships has such a name, save the seeds' in the attention package."""
    allowed = SEED_NAMES if path.is_relative_to(source("attention")) else set()
    found = {name for name in symbols(ast.parse(path.read_text(encoding="utf-8"))) if ranks(name)}
    assert set() == found - allowed


def test_no_base_name_stands_three_times() -> None:
    """Whoever looks for an idea by its file's name finds it, or one other."""
    many = Counter(path.name for path in modules())
    assert set() == {name for name, times in many.items() if times > 2} - SAME_NAMES.keys()


def test_rooms_stay_small() -> None:
    """No module that ships is longer than 350 lines."""
    lines = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in modules()}
    assert {} == {name: count for name, count in lines.items() if count > MAX_LINES}
