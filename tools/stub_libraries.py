"""Stands in for CUDA's libraries, so that an index's torch for CUDA runs its CPU kernels where those gigabytes are not wanted.

`python -m tools.stub_libraries` in an environment with such a torch, installed without its dependencies: beside torch's own libraries it writes
one for each that they miss. Every function in them returns cudaErrorInsufficientDriver, so that torch sees no device. Needs binutils and a C
compiler, on Linux.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

ERROR = 35
"""cudaErrorInsufficientDriver."""
_RETURN = {"x86_64": f"mov ${ERROR}, %eax\nret", "aarch64": f"mov w0, #{ERROR}\nret"}


def symbols(libraries: Iterable[Path], which: str) -> dict[str, str]:
    """{dynamic symbol: its version, or ""} that libraries define ("--defined-only") or want ("--undefined-only")."""
    command = ["nm", "-D", "-P", which, *map(str, libraries)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    named = (line.split() for line in lines if line and not line.endswith(":"))
    # w, v: weak, which nobody needs.
    parted = (name.replace("@@", "@").partition("@") for name, kind, *_ in named if kind not in "wv")
    return {name: version for name, _, version in parted}


def needed(libraries: Iterable[Path]) -> tuple[set[str], set[Path]]:
    """The names of libraries that cannot be found, and the files of those that can."""
    missing: set[str] = set()
    there: set[Path] = set()
    for library in libraries:
        told = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
        missing.update(re.findall(r"^\s*(\S+) => not found$", told, re.M))
        there.update(Path(path) for path in re.findall(r"=> (/\S+) \(0x", told))
    return missing, there


def versions(libraries: Iterable[Path]) -> dict[str, str]:
    """{version of symbols that libraries want: the library that has it}."""
    command = ["readelf", "-V", "-W", *map(str, libraries)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    homes: dict[str, str] = {}
    library = ""
    for kind, name in re.findall(r"\b(File|Name): (\S+)", told):
        if kind == "File":
            library = name
        else:
            homes[name] = library
    return homes


def write_stubs(torch: Path) -> list[Path]:
    """Write the missing libraries of a torch, and return their files."""
    own = sorted({*torch.glob("lib/*.so*"), *torch.glob("_C*.so")})
    missing, there = needed(own)
    wanted, had = symbols(own, "--undefined-only"), symbols({*own, *there}, "--defined-only")
    homes = versions(own)
    stubs = {library: dict[str, list[str]]() for library in sorted(missing)}
    for version, library in homes.items():
        if library in missing:
            stubs[library][version] = []
    for name, version in wanted.items():
        library = homes.get(version, min(missing, default=""))  # one without a version may be anywhere
        if name not in had and library in missing:
            stubs[library].setdefault(version or library, []).append(name)
    return [_stub(torch / "lib" / library, parts) for library, parts in stubs.items()]


def _stub(library: Path, parts: dict[str, list[str]]) -> Path:
    """Write one library of {version: symbols}."""
    names = [name for part in parts.values() for name in part]
    text = "".join(f".globl {name}\n.type {name}, %function\n{name}:\n" for name in names)
    note = '.section .note.GNU-stack,"",%progbits\n'  # without it the stack would be executable
    nodes = [f"{version} {{ global: {' '.join(f'{name};' for name in part)} }};" for version, part in parts.items()]
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder) / "stub.s", Path(folder) / "versions"
        source.write_text(f".text\n{text}{_RETURN[platform.machine()]}\n{note}", encoding="utf-8")
        script.write_text("\n".join(nodes) or "{ global: *; };", encoding="utf-8")
        options = ["-shared", "-nostdlib", f"-Wl,-soname,{library.name}", f"-Wl,--version-script,{script}"]
        subprocess.run(["cc", *options, "-o", str(library), str(source)], check=True)
    return library


if __name__ == "__main__":
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("no torch in this environment")
    for path in write_stubs(Path(spec.origin).parent):
        print(path)
