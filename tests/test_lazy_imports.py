"""Importing a package costs little and never needs what is not in use."""

import json
import subprocess
import sys

import pytest

from tests.workspace import PACKAGES

HEAVY = {"triton", "matplotlib", "hypothesis", "pytest"}


def loaded(statement: str) -> set[str]:
    """Return the top-level modules, and longattn packages, that a fresh interpreter holds after the statement."""
    script = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    names = json.loads(answer.stdout.splitlines()[-1])
    kept = {name for name in names if name.startswith("longattn.") or name == "torch.utils.flop_counter"}
    return {name.split(".")[0] for name in names} | kept


@pytest.mark.parametrize("package", PACKAGES)
def test_import_alone(package: str) -> None:
    """`import longattn.x` loads no optional dependency, no test tool, no sibling."""
    modules = loaded(f"import longattn.{package}")
    siblings = {f"longattn.{name}" for name in PACKAGES if name != package}
    assert set() == modules & (HEAVY | siblings | {f"longattn.{package}.testing"})


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name(package: str) -> None:
    """Not even all the public names together load one, but for what torch's own FLOP counter loads: it tries triton."""
    modules = loaded(f"from longattn.{package} import *")
    if "torch.utils.flop_counter" in modules:
        modules -= loaded("import torch.utils.flop_counter")
    assert set() == modules & (HEAVY | {f"longattn.{package}.testing"})


def test_patterncache_needs_no_torch() -> None:
    """All of patterncache's public names work without torch."""
    assert "torch" not in loaded("from longattn.patterncache import *")
