"""The machine's C++ compiler: which one is used, and a run of it with a time limit.

CXX is a command line ("ccache g++"). Without it the first of `COMPILERS` on PATH serves, else the compiler that the `ziglang` wheel
brings (the extra `compiler`).
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from longattn.kernels.native.cpu import LEVELS
from longattn.patterncache.spans import shortened

COMPILERS = ("c++", "g++", "clang++")

LONGEST_S = 600
"""Seconds after which a compiler is given up. Usually it takes 10; on a busy machine, or to build its own C++ library first, minutes."""

_ZIG = "ziglang"


class NativeBuildError(RuntimeError):
    """The native library cannot be had; the message says why."""


@dataclass(frozen=True)
class Compiler:
    """A command that compiles C++.

    Attributes:
        words: the command's first words. identity: changes when the compiler does.
    """

    words: tuple[str, ...]
    identity: str

    def command(self, flags: Sequence[str], source: str, made: str) -> list[str]:
        """The whole command."""
        own = zig_flags(flags, platform.machine().lower()) if _ZIG in self.words else flags
        return [*self.words, *own, source, "-o", made]


def find() -> Compiler | str:
    """The compiler to use, or why there is none."""
    preferred = os.environ.get("CXX", "").strip()
    if preferred:
        try:
            words = shlex.split(preferred)
        except ValueError as problem:
            return f"CXX must be a command line, got {shortened(preferred)}: {problem}"
        first = shutil.which(words[0]) if words else None
        return (
            Compiler((first, *words[1:]), _identity(words))
            if first
            else f"no C++ compiler: CXX={preferred} is not to be found"
        )
    for name in COMPILERS:
        if executable := shutil.which(name):
            return Compiler((executable,), _identity([name]))
    if find_spec(_ZIG) is not None:
        try:
            return Compiler((sys.executable, "-m", _ZIG, "c++"), f"{_ZIG} {version(_ZIG)}")
        except PackageNotFoundError:
            pass  # a folder of that name is no wheel
    return (
        f"no C++ compiler: CXX is not set, and none of {', '.join(COMPILERS)} is on PATH; "
        "pip install ziglang brings one"
    )


def _identity(words: Sequence[str]) -> str:
    """Files that the words name, with size and time: a compiler that was replaced makes another library."""
    known = []
    for word in words:
        path = shutil.which(word)
        if path is None:
            known.append(word)
            continue
        about = os.stat(path)
        known.append(f"{os.path.realpath(path)} {about.st_size} {about.st_mtime_ns}")
    return " ".join(known)


def zig_flags(flags: Sequence[str], machine: str) -> list[str]:
    """Flags of a level for zig's driver, which compiles for the machine at hand unless told otherwise, and has one flag for all features."""
    known = {flag for level in LEVELS.values() for flag in level if flag.startswith("-m")}
    features = [re.sub(r"^-m(arch=.*\+)?", "", flag).replace("-", "_") for flag in flags if flag in known]
    base = "x86_64" if machine in ("x86_64", "amd64") else "baseline"
    return [*(flag for flag in flags if flag not in known), f"-mcpu={'+'.join([base, *features])}"]


def run(compiler: Compiler, command: Sequence[str], longest_s: float | None = None) -> None:
    """Run a compiler's command. What it started is gone when this returns, also where it took too long or was interrupted.

    Raises:
        NativeBuildError: it fails, with its first line that says "error:" or else its last one, or takes too long.
        OSError: it cannot be started.
    """
    name, longest_s = " ".join(compiler.words), LONGEST_S if longest_s is None else longest_s
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            said, _ = process.communicate(timeout=longest_s)
        except subprocess.TimeoutExpired as problem:
            raise NativeBuildError(f"the compiler {name} took longer than {longest_s:g} s") from problem
        finally:
            _end(process)
    if process.returncode:
        # Messages of a compiler come in the user's language and encoding.
        lines = said.decode("utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
        first_error = next((line for line in lines if "error:" in line), lines[-1])
        raise NativeBuildError(f"the compiler {name} failed: {first_error}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the session that the process leads: drivers start compilers, which outlive them otherwise. Windows has no sessions."""
    if sys.platform == "win32":
        process.kill()
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
