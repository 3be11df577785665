"""The generic form on another architecture: compiled for aarch64 and run by qemu, where both are installed."""

import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

from longattn.kernels.native.building import FLAGS

DRIVER = Path(__file__).with_name("native_driver.cpp")


def build_and_run(compiler: str, made: Path, *emulator: str) -> str:
    """What the driver prints; it fails where a number differs from the definition's."""
    flags = [flag for flag in FLAGS if flag not in ("-shared", "-fPIC")]
    command = [compiler, *flags, "-static", f"-I{files('longattn.kernels.native')}", str(DRIVER), "-o", str(made)]
    subprocess.run(command, check=True, timeout=300)
    done = subprocess.run([*emulator, str(made)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("compiler", "emulator"), [("aarch64-linux-gnu-g++", ("qemu-aarch64",)), ("c++", ())], ids=["aarch64", "here"]
)
def test_the_definition_holds_without_python(compiler: str, emulator: tuple[str, ...], tmp_path: Path):
    """Forward and backward of two heads that share keys, causal, with keys that count twice; vectors of four floats."""
    for tool in (compiler, *emulator):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool} here")
    assert "4 floats a vector" in build_and_run(compiler, tmp_path / "driver", *emulator)
