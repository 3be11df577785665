"""`python -m benchmarks.gpu` without a GPU: the whole path in triton's interpreter, one row failing on purpose."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

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
    names = [
        "flash",
        "flash-cudnn",
        "broken",
        "flash-fa3",
        "decode",
        "growing",
        "sweep",
        "flash-dense",
        "flash-second-ptxas",
    ]
    assert list(rows) == names
    assert rows["broken"]["verdict"] == "failed: exit status 1: RuntimeError: this row fails on purpose"
    assert not rows["broken"]["ms"] and all(float(row["ms"]) > 0 for key, row in rows.items() if key != "broken")
    assert "fa3 does not serve: No module named" in rows["flash-fa3"]["verdict"]
    assert [file.name for file in (tmp_path / "failures").iterdir()] == ["broken-D16-forward.txt"]
    assert "gate: outputs, lse and gradients agree with the oracle" in run.stdout and "9 rows, 1 failed" in run.stdout
    assert "gate: the warp-specialised kernel agrees too" in run.stdout
    # Targets are shares of what this device reached in the same run, and the second assembler is another one.
    assert "product" in rows["flash-second-ptxas"]["verdict"] and "copy" in rows["decode"]["verdict"]
    assert rows["flash-second-ptxas"]["ptxas"] != rows["flash"]["ptxas"] != ""


def test_times_of_kernels_come_from_the_profiler():
    """What ran on the device, and nothing of the host."""
    from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]  # it stands in no __all__

    from benchmarks.gpu.device import kernel_times

    seen = [
        SimpleNamespace(key="aten::empty", device_type=DeviceType.CPU, self_device_time_total=0.0),
        SimpleNamespace(key="forward_kernel", device_type=DeviceType.CUDA, self_device_time_total=1250.0),
        SimpleNamespace(key="merge_kernel", device_type=DeviceType.CUDA, self_device_time_total=7.5),
    ]
    assert kernel_times(seen) == "forward_kernel 1.2500; merge_kernel 0.0075"


def test_every_experiment_of_a_gpu_has_a_name_of_its_own():
    """Four or five tiles of each kernel are tried, and what the model predicts stands beside dense rows."""
    from benchmarks.gpu.experiments import experiments
    from benchmarks.gpu.measuring import predicted

    listed = list(experiments(False))
    assert len({experiment.name for experiment in listed}) == len(listed)
    swept = Counter((e.key, e.direction, e.head_dim) for e in listed if e.tile)
    assert len(swept) == 9 and {*swept.values()} == {4}
    assert {e.target[0] for e in listed if e.target} == {"product", "copy", "ratio", "us"}
    found = {
        (e.direction, e.dense, e.deterministic): predicted(e)
        for e in listed
        if e.key.startswith("flash-") and predicted(e)
    }
    assert len(found) >= 4
