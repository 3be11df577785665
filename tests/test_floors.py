"""Imports point only down: the contracts of pyproject.toml hold, and would notice if they did not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workspace import PACKAGES, ROOT

MODULES = {
    f"{package}/{name}.py": "" for package in PACKAGES for name in ("__init__", "testing", "inner")
}  # a house in miniature


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
    config.write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"), encoding="utf-8")
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
    config.write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"), encoding="utf-8")
    for name, text in {**MODULES, **down}.items():
        path = tmp_path / "longattn" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    answer = lint_imports(config, [tmp_path])
    assert answer.returncode == 0, answer.stdout + answer.stderr
