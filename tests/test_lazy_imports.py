"""Importing a package costs little and never needs what is not in use."""

import json
import subprocess
import sys
from functools import cache

import pytest

from tests.workspace import PACKAGES

HEAVY = {"triton", "matplotlib", "hypothesis", "pytest"}


@cache
def loaded(*statements: str) -> tuple[set[str], ...]:
    """The top-level modules, and longattn packages, that a fresh interpreter holds after each of the statements."""
    show = "print(json.dumps(sorted(sys.modules)))"
    script = "\n".join(["import json, sys", *(line for statement in statements for line in (statement, show))])
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    held = [json.loads(line) for line in answer.stdout.splitlines()]
    kept = [{n for n in names if n.startswith("longattn.")} for names in held]
    return tuple({name.split(".")[0] for name in names} | own for names, own in zip(held, kept, strict=True))


def of_package(package: str) -> tuple[set[str], ...]:
    """What is held after the package was imported, and after each of its public names was."""
    return loaded(f"import longattn.{package}", f"from longattn.{package} import *")


@pytest.mark.parametrize("package", PACKAGES)
def test_import_alone(package: str) -> None:
    """`import longattn.x` loads no optional dependency, no test tool, no sibling."""
    modules, _ = of_package(package)
    siblings = {f"longattn.{name}" for name in PACKAGES if name != package}
    assert set() == modules & (HEAVY | siblings | {f"longattn.{package}.testing"})


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name(package: str) -> None:
    """Not even all the public names together load one."""
    _, modules = of_package(package)
    assert set() == modules & (HEAVY | {f"longattn.{package}.testing"})


def test_patterncache_needs_no_torch() -> None:
    """All of patterncache's public names work without torch."""
    assert "torch" not in of_package("patterncache")[1]


def test_flops_are_counted_by_a_counter_that_is_imported_later() -> None:
    """torch's counter, whose import tries triton, is not loaded by ours; once somebody loads it, it knows our ops."""
    script = """
import sys
import torch
from longattn.kernels import attend
from longattn.patterncache import Window
assert "torch.utils.flop_counter" not in sys.modules
finders = len(sys.meta_path)
from torch.utils.flop_counter import FlopCounterMode
assert len(sys.meta_path) == finders - 1
q = torch.randn(1, 8, 2, 4)
with FlopCounterMode(display=False) as counter:
    attend(q, q, q, Window(2, causal=True), backend="sdpa")
assert counter.get_total_flops() == 2 * (4 + 4) * 2 * 15, counter.get_flop_counts()
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
