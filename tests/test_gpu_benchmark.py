"""`python -m benchmarks.gpu` without a GPU: the whole path in triton's interpreter, one row failing on purpose."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: the extra longattn-kernels[triton]")

ROOT = Path(__file__).resolve().parents[1]

BARE = (
    "import sys\n"
    "for name in ('hypothesis', 'pytest', 'transformers', 'matplotlib', 'rich'): sys.modules[name] = None\n"
    "import runpy; runpy.run_module('benchmarks.gpu', run_name='__main__', alter_sys=True)\n"
)
"""The command on a machine that has python, torch and triton alone."""


def test_a_failing_row_costs_itself_alone(tmp_path: Path):
    """Rows before and after it are there; its own says why, and its output is kept."""
    command = [
        sys.executable,
        "-c",
        BARE,
        "--dry",
        "--results",
        str(tmp_path / "rows.csv"),
        "--failures",
        str(tmp_path / "failures"),
    ]
    run = subprocess.run(
        [*command, "--only", "D16 forward"], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    rows = {row["key"]: row for row in csv.DictReader((tmp_path / "rows.csv").read_text().splitlines())}
    assert list(rows) == ["flash", "flash-cudnn", "broken", "flash-fa3", "decode", "sweep", "flash-dense"]
    assert rows["broken"]["verdict"] == "failed: exit status 1: RuntimeError: this row fails on purpose"
    assert not rows["broken"]["ms"] and all(float(row["ms"]) > 0 for key, row in rows.items() if key != "broken")
    assert "fa3 does not serve: No module named" in rows["flash-fa3"]["verdict"]
    assert [file.name for file in (tmp_path / "failures").iterdir()] == ["broken-D16-forward.txt"]
    assert "gate: outputs, lse and gradients agree with the oracle" in run.stdout and "7 rows, 1 failed" in run.stdout
    assert "gate: the warp-specialised kernel agrees too" in run.stdout
