"""Every example runs as a reader starts it, at small size, and finds what it promises."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys

import pytest

from tests.workspace import ROOT

EXAMPLES = ROOT / "examples"

# In this process: what is imported already is not imported again.
HERE = {
    "own_kernel.py": ("--length", "40", "--heads", "2"),
    "kernels_alone.py": ("--length", "100"),
    "replace_multihead.py": ("--steps", "20"),
    "patches_2d.py": ("--height", "16", "--width", "24", "--tile", "4"),
    "llama.py": ("--length", "40", "--steps", "10"),
}
# As processes of their own, which start others.
APART = {
    "bufmgr_mlp.py": ((), ("--samples", "16", "--workers", "1")),
    "ring_torchrun.py": (
        (
            *("-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
        ),
        ("--length", "90"),
    ),
}


@pytest.mark.parametrize("name", HERE)
def test_example(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends well and says something."""
    if name == "llama.py" and importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    monkeypatch.setattr(sys, "argv", [name, *HERE[name]])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", APART)
def test_example_that_starts_processes(name: str) -> None:
    """So do those with workers and ranks."""
    before, after = APART[name]
    done = subprocess.run(
        [sys.executable, *before, str(EXAMPLES / name), *after],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_every_example_is_run_and_listed() -> None:
    """The README lists files that are there; each example is started by some test."""
    listed = set(re.findall(r"^\| `(\w+\.py)`", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.M))
    assert {*HERE, *APART} <= listed
    assert set() == {name for name in listed if not (EXAMPLES / name).is_file()}
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert set() == {path.name for path in EXAMPLES.glob("*.py") if path.name not in tests}
