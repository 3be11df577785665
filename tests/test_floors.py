"""Imports point only down: the contracts of pyproject.toml hold, and would notice if they did not."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from longattn import kernels
from longattn.kernels import interface
from tests.workspace import PACKAGES, ROOT, source

MODULES = {
    f"{package}/{name}.py": "" for package in PACKAGES for name in ("__init__", "testing", "inner")
}  # a house in miniature


def contracts_between_packages() -> str:
    """pyproject.toml without the contracts inside a package, whose rooms a house in miniature lacks."""
    mark = "[[tool.importlinter.contracts]]"
    first, *contracts = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split(mark)
    return mark.join([first, *(contract for contract in contracts if "containers =" not in contract)])


def lint_imports(config: Path, search: list[Path]) -> subprocess.CompletedProcess[str]:
    """Run the contracts of `config` over the packages found in `search`."""
    script = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", script, "--no-cache", "--config", str(config)],
        cwd=config.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, search))},
        capture_output=True,
        text=True,
        check=False,
    )


def test_contracts_hold() -> None:
    """No import in the four packages points up or sideways."""
    answer = lint_imports(ROOT / "pyproject.toml", [ROOT / "packages" / package / "src" for package in PACKAGES])
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("bufmgr/inner.py", "import longattn.patterncache.inner"),
        ("patterncache/inner.py", "from longattn.bufmgr import inner"),
        ("kernels/inner.py", "import longattn.bufmgr.inner"),
        ("kernels/inner.py", "from longattn.attention import inner"),
        ("patterncache/inner.py", "def late():\n    import longattn.kernels.inner"),
        ("attention/inner.py", "from longattn.attention.testing import x"),
        ("attention/inner.py", "import longattn.kernels.testing"),
        ("kernels/__init__.py", "from longattn.kernels import testing"),
    ],
)
def test_contracts_notice(tmp_path: Path, module: str, line: str) -> None:
    """Each way of breaking a floor is found."""
    config = tmp_path / "pyproject.toml"
    config.write_text(contracts_between_packages(), encoding="utf-8")
    for name, text in {**MODULES, module: line}.items():
        path = tmp_path / "longattn" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    answer = lint_imports(config, [tmp_path])
    assert answer.returncode == 1, answer.stdout + answer.stderr
    assert "1 broken" in answer.stdout


def test_contracts_allow_what_the_floors_allow(tmp_path: Path) -> None:
    """Imports downward, and a testing module's imports of another, break nothing."""
    down = {
        "kernels/inner.py": "import longattn.patterncache.inner",
        "attention/inner.py": "import longattn.kernels.inner, longattn.bufmgr.inner, longattn.patterncache.inner",
        "kernels/testing.py": "import longattn.patterncache.testing, longattn.kernels.inner",
    }
    config = tmp_path / "pyproject.toml"
    config.write_text(contracts_between_packages(), encoding="utf-8")
    for name, text in {**MODULES, **down}.items():
        path = tmp_path / "longattn" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    answer = lint_imports(config, [tmp_path])
    assert answer.returncode == 0, answer.stdout + answer.stderr


def inner_imports(path: Path) -> list[str]:
    """Imports of modules of kernels other than its public names and its interface, by statement or by name, at any depth."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "longattn":
            names = [f"longattn.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "longattn.kernels":
            names = [
                node.module if alias.name in kernels.__all__ else f"{node.module}.{alias.name}" for alias in node.names
            ]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith("longattn.kernels.")
        ):
            names = [node.value.partition(":")[0]] if " " not in node.value else []
        found += [f"{path.name}:{node.lineno}: {name}" for name in names if name.startswith("longattn.kernels.")]  # type: ignore[attr-defined]
    return [line for line in found if not line.endswith(": longattn.kernels.interface")]


def test_attention_comes_in_by_the_door() -> None:
    """The attention package imports from kernels what is public and what is in the declared interface, nothing else."""
    assert [] == [line for path in sorted(source("attention").rglob("*.py")) for line in inner_imports(path)]


@pytest.mark.parametrize(
    "line",
    [
        "import longattn.kernels.state",
        "from longattn.kernels import entry",
        "def late():\n    from longattn.kernels.state import state_dtype",
        "import_module('longattn.kernels.check')",
    ],
)
def test_another_door_is_noticed(tmp_path: Path, line: str) -> None:
    """Each way of going around the interface is found, and the interface is not."""
    path = tmp_path / "inner.py"
    path.write_text("from longattn.kernels import attend\nfrom longattn.kernels.interface import OpArguments\n")
    assert [] == inner_imports(path)
    path.write_text(f"{line}\n")
    assert 1 == len(inner_imports(path))


def test_the_door_has_a_list() -> None:
    """Every name of the interface is listed, exists, and is used: what nobody needs is not promised."""
    there = {name for name in vars(interface) if not name.startswith("__")}
    assert there == set(interface.__all__) and len(interface.__all__) == len(there)
    texts = [path.read_text(encoding="utf-8") for path in source("attention").rglob("*.py")]
    assert [] == [name for name in there if not any(re.search(rf"\b{name}\b", text) for text in texts)]
