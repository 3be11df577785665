"""Compiles the native row's source with the machine's compiler, once, and loads it.

1. `target` says without compiling which library is wanted and, where that is known already, why there can be none: switched off, an
   unknown machine, no compiler, a cache folder that cannot be written.
2. `library` loads it from the cache folder, or compiles it there first. It is asked for by the first call that the row serves. What
   fails then is remembered as one more reason.
3. A compile writes a file of its own and renames it: of two processes that build at once, neither sees half a file.

A file's name is a hash of source, flags and compiler. LONGATTN_NATIVE=0 switches the row off, another value is the widest level to use.
Read once a process: LONGATTN_CACHE is the folder (default: longattn in the user's cache folder), LONGATTN_NATIVE_FLAGS are further
compiler flags, CXX is the compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from threading import Lock

from longattn.kernels.native.cpu import LEVELS, levels

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-w")
COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT_S = 120

logger = logging.getLogger("longattn.kernels")
_guard = Lock()


class NativeBuildError(RuntimeError):
    """The native library cannot be had; the message says why."""


@dataclass
class Target:
    """The library that a value of LONGATTN_NATIVE asks for.

    Attributes:
        level: one of `LEVELS`. compiler, flags: how it is made. path: where it is kept.
        refusal: why it cannot be had, or None.
        loaded: the library, once it is.
    """

    level: str
    compiler: str | None
    flags: tuple[str, ...]
    path: Path
    refusal: str | None
    loaded: ctypes.CDLL | None = None


def build_native() -> Path:
    """Compile the native row now rather than in the first call that it serves, and load it.

    Returns:
        The library's file in the cache folder.

    Raises:
        NativeBuildError: there is no library to be had; the message is the reason that the row gives.
    """
    library()
    return current().path


def current() -> Target:
    """The target that LONGATTN_NATIVE names now."""
    return target(os.environ.get("LONGATTN_NATIVE", ""))


def refusal() -> str | None:
    """Why there is no native library, as far as is known without compiling; None where there is one or a compiler to make it with."""
    return current().refusal


def library() -> ctypes.CDLL:
    """The loaded library of the current target, compiled first where the cache folder does not have it.

    Raises:
        NativeBuildError: it cannot be had, with the compiler's last line.
    """
    found = loaded()
    if found is None:
        raise NativeBuildError(current().refusal)
    return found


def loaded() -> ctypes.CDLL | None:
    """The loaded library of the current target, or None where it cannot be had; `current().refusal` then says why."""
    wanted = current()
    if wanted.loaded is None and wanted.refusal is None:
        with _guard:
            _load(wanted)
    return wanted.loaded


def _load(wanted: Target) -> None:
    if wanted.refusal is not None or wanted.loaded is not None:
        return
    try:
        if not wanted.path.exists():
            compile_to(wanted)
        wanted.loaded = ctypes.CDLL(str(wanted.path))
    except NativeBuildError as problem:
        wanted.refusal = str(problem)
    except OSError as problem:
        wanted.refusal = f"the library {wanted.path} cannot be made or loaded: {problem}"


@lru_cache
def target(choice: str) -> Target:
    """What a value of LONGATTN_NATIVE asks for; nothing is compiled or written."""
    here = levels()
    named = choice.strip().lower()
    level = named if named in here else here[0] if here else "generic"
    compiler = _compiler()
    flags = (*FLAGS, *LEVELS[level], *os.environ.get("LONGATTN_NATIVE_FLAGS", "").split())
    path = cache_folder() / f"native-{level}-{_hash(flags, compiler)}.so"
    return Target(level, compiler, flags, path, _refusal_of(named, here, compiler, path))


def _refusal_of(named: str, here: tuple[str, ...], compiler: str | None, path: Path) -> str | None:
    if named == "0":
        return "switched off by LONGATTN_NATIVE=0"
    if named not in ("", "1", *LEVELS):
        return f"LONGATTN_NATIVE must be 0, 1 or one of {', '.join(LEVELS)}, got {named!r}"
    if not here:
        return "this machine's processor is not known"
    if named in LEVELS and named not in here:
        return f"LONGATTN_NATIVE={named} is wider than this processor, which has {here[0]}"
    if path.exists():
        return None
    if compiler is None:
        return f"no C++ compiler: CXX is not set, and none of {', '.join(COMPILERS)} is on PATH"
    there = next(folder for folder in (path.parent, *path.parent.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return f"the cache folder {path.parent} cannot be written; LONGATTN_CACHE names another"
    return None


def compile_to(wanted: Target) -> None:
    """Compile the source for a target, as a file that appears whole.

    Raises:
        NativeBuildError: the compiler fails, with its last line.
        OSError: the folder cannot be written.
    """
    assert wanted.compiler is not None
    wanted.path.parent.mkdir(parents=True, exist_ok=True)
    source = files("longattn.kernels.native").joinpath("attend.cpp")
    with tempfile.TemporaryDirectory(dir=wanted.path.parent, prefix="building-") as own:
        made = Path(own) / wanted.path.name
        command = [wanted.compiler, *wanted.flags, str(source), "-o", str(made)]
        logger.debug("native row: %s", " ".join(command))
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired as problem:
            raise NativeBuildError(f"the compiler {wanted.compiler} took longer than {_TIMEOUT_S} s") from problem
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise NativeBuildError(f"the compiler {wanted.compiler} failed: {last}")
        os.replace(made, wanted.path)


def cache_folder() -> Path:
    """Where libraries are kept: LONGATTN_CACHE, or longattn in the user's cache folder."""
    named = os.environ.get("LONGATTN_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~"), ".cache")) / "longattn"


def _compiler() -> str | None:
    preferred = os.environ.get("CXX")
    return next((found for name in ([preferred] if preferred else COMPILERS) if (found := shutil.which(name))), None)


def _hash(flags: tuple[str, ...], compiler: str | None) -> str:
    known = hashlib.sha256(" ".join(flags).encode())
    folder = files("longattn.kernels.native")
    for name in sorted(f.name for f in folder.iterdir() if f.name.endswith((".cpp", ".h"))):
        known.update(name.encode() + folder.joinpath(name).read_bytes())
    if compiler is not None:
        # A compiler that was replaced makes another library.
        about = os.stat(compiler)
        known.update(f"{os.path.realpath(compiler)} {about.st_size} {about.st_mtime_ns}".encode())
    return known.hexdigest()[:20]
