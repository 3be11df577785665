"""The generic form elsewhere: compiled for aarch64 and run by qemu, for Windows by MinGW and run by wine, where both are installed."""

import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest

from longattn.kernels.native.building import FLAGS
from longattn.kernels.native.cpu import LEVELS

DRIVER = Path(__file__).with_name("native_driver.cpp")


def build_and_run(compiler: str, made: Path, level: str, *emulator: str) -> str:
    """What the driver prints; it fails where a number differs from the definition's."""
    # Half of -O3's time to compile; what the compiler must get right is the source's dialect.
    flags = ["-O1" if flag == "-O3" else flag for flag in FLAGS if flag not in ("-shared", "-fPIC")]
    static = ["-static"] if emulator else []
    command = [
        *shlex.split(compiler),
        *flags,
        *LEVELS[level],
        *static,
        f"-I{files('longattn.kernels.native')}",
        str(DRIVER),
        "-o",
        str(made),
    ]
    subprocess.run(command, check=True, timeout=600)
    done = subprocess.run([*emulator, str(made)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("compiler", "level", "emulator"),
    [
        ("aarch64-linux-gnu-g++", "generic", ("qemu-aarch64", "qemu-aarch64-static")),
        ("aarch64-linux-gnu-g++", "bfdot", ("qemu-aarch64", "qemu-aarch64-static")),
        ("x86_64-w64-mingw32-g++-posix", "generic", ("wine64", "wine", "/usr/lib/wine/wine64")),
        ("c++", "generic", ()),
    ],
    ids=["aarch64", "aarch64-bfdot", "windows", "here"],
)
def test_the_definition_holds_without_python(compiler: str, level: str, emulator: tuple[str, ...], tmp_path: Path):
    """Forward and backward of two heads that share keys, causal and in a window, with keys that count twice, and in bfloat16; vectors of four floats."""
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler} here")
    # Debian's package of programs without shared libraries names them otherwise.
    command = next((path for name in emulator if (path := shutil.which(name)) is not None), None)
    if emulator and command is None:
        pytest.skip(f"there is none of {', '.join(emulator)} here")
    # Only qemu has processors to choose from; its widest has products of bfloat16.
    words = [] if command is None else [command, "-cpu", "max"] if "qemu" in command else [command]
    told = build_and_run(compiler, tmp_path / "driver.exe", level, *words)
    assert "4 floats a vector" in told and ("pairs of bfloat16" in told) == (level == "bfdot")


@pytest.mark.parametrize("compiler", ["clang++", f"{sys.executable} -m ziglang c++"], ids=["clang", "zig"])
def test_clang_builds_a_library_that_serves(compiler: str, tmp_path: Path):
    """Its vectors are another dialect; the wheel of the extra `compiler` is a Clang as well."""
    there = find_spec("ziglang") if "ziglang" in compiler else shutil.which(compiler)
    if there is None:
        pytest.skip(f"there is no {compiler.split()[-2:][0]} here")
    code = """
        import torch
        from longattn.kernels.testing import Case, check_backend
        from longattn.patterncache import Dilated
        pattern = Dilated((8, 16, 32), (1, 2, 4), causal=True)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check_backend("native", Case(pattern, (300, 300), head_dim=40, dtype=dtype))
            check_backend("native", Case(pattern, (3, 300), head_dim=40, dtype=dtype))
    """
    environment = {**os.environ, "CXX": compiler, "LONGATTN_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    environment["LONGATTN_NATIVE_FLAGS"] = "-O1"  # the dialect is what is tested; optimizing takes most of a minute
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment, timeout=900)
