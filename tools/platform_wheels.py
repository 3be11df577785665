"""Wheels of kernels with the native library prebuilt, one for each platform, made from the pure one.

`python -m tools.platform_wheels PURE_WHEEL FOLDER`: zig, which the wheel `ziglang` brings, compiles every part and level for x86-64 and aarch64 against the C
library of glibc 2.17; auditwheel says what each wheel may be called. A library's name holds the hash of its source and flags, so that it serves no
other version, and the digest of its bytes. With the same inputs and SOURCE_DATE_EPOCH the bytes are the same.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import as_file, files
from pathlib import Path

from longattn.kernels import cachefolder
from longattn.kernels.native import building
from longattn.kernels.native.compiling import zig_flags
from longattn.kernels.native.cpu import LEVELS

GLIBC = "2.17"
"""That of manylinux2014, the oldest that torch's own wheels have run on."""

MACHINES = {"x86_64": tuple(level for level in LEVELS if level != "bfdot"), "aarch64": ("bfdot", "generic")}
"""{machine: the levels that its wheel has}."""


def zig_command(machine: str, level: str, source: Path, made: Path) -> list[str]:
    """How a level is compiled."""
    words = [sys.executable, "-m", "ziglang", "c++", "-target", f"{machine}-linux-gnu.{GLIBC}"]
    return [*words, *zig_flags(building.flags_of(level), machine), "-s", str(source), "-o", str(made)]


def compile_part(machine: str, level: str, part: str, folder: Path) -> Path:
    """One library, under the name that `building` looks for."""
    with as_file(files("longattn.kernels.native")) as sources:
        made = folder / f"{part}-{machine}-{level}.so"
        subprocess.run(zig_command(machine, level, sources / building.PARTS[part].source, made), check=True)
    target = folder / f"{building.prebuilt_stem(level, part)}.{cachefolder.digest(made)}.so"
    made.rename(target)
    return target


def platform_of(wheel: Path) -> str:
    """The oldest manylinux tag that auditwheel allows a wheel."""
    told = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", str(wheel)], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r'consistent\s+with\s+the\s+following\s+platform\s+tag:\s+"(manylinux_[0-9_a-z]+)"', told)
    if found is None:
        raise ValueError(f"auditwheel allows {wheel.name} no manylinux tag: {told}")
    return found[1]


def with_tag(unpacked: Path, platform: str, folder: Path) -> Path:
    """Pack an unpacked wheel for a platform."""
    (about,) = unpacked.glob("*.dist-info/WHEEL")
    text = about.read_text(encoding="utf-8")
    text = re.sub(r"^Root-Is-Purelib: .*$", "Root-Is-Purelib: false", text, flags=re.MULTILINE)
    text = re.sub(r"^Tag: .*$", f"Tag: py3-none-{platform}", text, flags=re.MULTILINE)
    about.write_text(text, encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"*{platform}.whl"):
        old.unlink()
    pack = [sys.executable, "-m", "wheel", "pack", "--dest-dir", str(folder), str(unpacked)]
    subprocess.run(pack, check=True, stdout=subprocess.DEVNULL)
    (made,) = folder.glob(f"*-{platform}.whl")
    return made


def make(pure: Path, machine: str, folder: Path) -> Path:
    """The wheel of a machine, beside the pure one."""
    with tempfile.TemporaryDirectory() as own:
        unpack = [sys.executable, "-m", "wheel", "unpack", "--dest", own, str(pure)]
        subprocess.run(unpack, check=True, stdout=subprocess.DEVNULL)
        (unpacked,) = Path(own).glob("longattn_kernels-*")
        prebuilt = unpacked / "longattn" / "kernels" / "native" / "prebuilt"
        for source in (*prebuilt.parent.glob("*.h"), *prebuilt.parent.glob("*.cpp")):
            here = files("longattn.kernels.native").joinpath(source.name)
            if not here.is_file() or here.read_bytes() != source.read_bytes():
                raise ValueError(f"{pure.name} must hold the sources that are compiled, got another {source.name}")
        prebuilt.mkdir()
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            every = itertools.product(MACHINES[machine], building.PARTS)
            list(threads.map(lambda library: compile_part(machine, library[0], library[1], prebuilt), every))
        audited = platform_of(with_tag(unpacked, f"linux_{machine}", Path(own) / "untagged"))
        shutil.rmtree(Path(own) / "untagged")
        return with_tag(unpacked, audited, folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the wheels that are asked for, and print their files."""
    parser = argparse.ArgumentParser(prog="python -m tools.platform_wheels", description=main.__doc__)
    parser.add_argument("pure", type=Path, help="the pure wheel of kernels")
    parser.add_argument("folder", type=Path, help="where the others go")
    parser.add_argument("--machine", choices=MACHINES, action="append", help="default: all")
    options = parser.parse_args(arguments)
    for machine in options.machine or MACHINES:
        print(make(options.pure.resolve(), machine, options.folder.resolve()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
