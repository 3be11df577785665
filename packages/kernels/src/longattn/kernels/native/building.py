"""Compiles the native row's source with the machine's compiler, once, and loads it, in `PARTS`: what few calls need waits for one of them.

1. `target` says without compiling which library is wanted and, where that is known already, why there can be none: switched off, an
   unknown machine, no compiler, a cache folder that cannot be written or is not ours alone.
2. `library` loads the one that came with the package (a platform wheel has one for each level, in `prebuilt`), or one from the cache folder,
   or compiles it there first. It is asked for by the first call that needs the part. What
   fails then is remembered as one more reason.
3. A compile writes a file of its own and renames it: nobody sees half a file. Of processes that want it at once, one compiles; the others wait for it no
   longer than a compiler may take.

A file's name is a hash of source, flags and compiler, and a digest of its bytes. LONGATTN_NATIVE=0 switches the row off, another value is
the widest level to use. Read once a process: LONGATTN_CACHE is the folder (default: longattn in the user's cache folder),
LONGATTN_NATIVE_FLAGS are further compiler flags, CXX is the compiler's command line; where one of these two is set, nothing prebuilt serves.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from threading import Lock

from longattn.kernels import cachefolder
from longattn.kernels.dispatch.settings import NATIVE
from longattn.kernels.native import compiling, cpu
from longattn.kernels.native.compiling import COMPILERS, Compiler, NativeBuildError
from longattn.kernels.native.cpu import CHOICES, LEVELS, PLAIN_TILES, levels
from longattn.patterncache.progress import progress
from longattn.patterncache.spans import shortened

__all__ = [
    "COMPILERS",
    "FLAGS",
    "PARTS",
    "NativeBuildError",
    "Target",
    "build_native",
    "current",
    "library",
    "loaded",
    "refusal",
    "target",
]

FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-w"),
    # Windows looks for MinGW's runtime libraries beside python.exe, where they are not.
    *(("-static",) if sys.platform == "win32" else ()),
)
PREBUILT = Path(__file__).parent / "prebuilt"
"""Libraries of a platform wheel; a pure one has no such folder."""


@dataclass(frozen=True)
class Part:
    """A library of its own.

    Attributes:
        source: its file. subject: what it holds, in messages. entries: its functions.
    """

    source: str
    subject: str
    entries: tuple[str, ...]


_PAGED = ("sizes", "paged_scratch", "decode_paged")
_ROW = ("sizes", "scratch", "attend", "attend_backward", "short_scratch", "attend_short", "attend_shards")

PARTS = {
    "native": Part("attend.cpp", "the native row", _ROW),
    "decode": Part("decode.cpp", "the native decode steps", (*_PAGED, "decode_scratch", "decode")),
    "quantized": Part("quantized.cpp", "the native decode steps over 8 bits", _PAGED),
}
"""{how a library's name begins: what it is}."""

logger = logging.getLogger("longattn.kernels")
_guard = Lock()


@dataclass
class Target:
    """The library that a value of LONGATTN_NATIVE asks for.

    Attributes:
        part: one of `PARTS`. level: one of `CHOICES`. compiler, flags: how it is made. folder, stem: where it is kept, and how its name begins.
        refusal: why it cannot be had, or None.
        prebuilt: the library that came with the package, or None. path: its file, once it is there. loaded: the library, once it is.
    """

    part: str
    level: str
    compiler: Compiler | None
    flags: tuple[str, ...]
    folder: Path
    stem: str
    refusal: str | None
    prebuilt: Path | None = None
    path: Path | None = None
    loaded: ctypes.CDLL | None = None


def build_native(part: str = "native") -> Path:
    """Compile the native row now rather than in the first call that it serves, and load it.

    Args:
        part: "native", the row; "decode", decode steps; "quantized", decode steps over pages of 8 bits. `python -m longattn.kernels build`
            makes all three.

    Returns:
        The library's file in the cache folder.

    Raises:
        NativeBuildError: there is no library to be had; the message is the reason that the row gives.
        ValueError: an unknown part.
    """
    if not isinstance(part, str) or part not in PARTS:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {shortened(part)}")
    library(part)
    path = current(part).path
    assert path is not None
    return path


def current(part: str = "native") -> Target:
    """The target that LONGATTN_NATIVE names now."""
    return target(NATIVE.value(), part)


def refusal(part: str = "native") -> str | None:
    """Why there is no native library, as far as is known without compiling; None where there is one or a compiler to make it with."""
    return current(part).refusal


def library(part: str = "native") -> ctypes.CDLL:
    """The loaded library of the current target, compiled first where the cache folder does not have it.

    Raises:
        NativeBuildError: it cannot be had, with the compiler's last line.
    """
    handle = loaded(part)
    if handle is None:
        raise NativeBuildError(current(part).refusal)
    return handle


def loaded(part: str = "native") -> ctypes.CDLL | None:
    """The loaded library of the current target, or None where it cannot be had; `current().refusal` then says why."""
    binary = current(part)
    if binary.loaded is None and binary.refusal is None:
        with _guard:
            _load(binary)
    return binary.loaded


def _load(binary: Target) -> None:
    if binary.refusal is not None or binary.loaded is not None:
        return
    try:
        binary.path = file_of(binary) or compile_for(binary)
        binary.loaded = _opened(binary.path, PARTS[binary.part].entries)
    except NativeBuildError as problem:
        binary.refusal = str(problem)
    except OSError as problem:
        binary.refusal = f"the library {binary.folder / binary.stem} cannot be made or loaded: {problem}"


def file_of(binary: Target) -> Path | None:
    """The target's library where it is there already: prebuilt, or in the cache folder."""
    return binary.prebuilt or cachefolder.find(binary.folder, binary.stem)


def _opened(path: Path, entries: tuple[str, ...]) -> ctypes.CDLL:
    """The loaded library, checked to have every function that is called in it. A file without one of them is moved aside."""
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as problem:
        if path.parent != PREBUILT:
            cachefolder.set_aside(path, "cannot be loaded")
        raise NativeBuildError(f"the library {path} cannot be loaded: {problem}") from problem
    missing = [name for entry in entries if not hasattr(handle, name := f"longattn_{entry}")]
    if missing:
        if path.parent != PREBUILT:
            cachefolder.set_aside(path, f"has no {missing[0]}")
        raise NativeBuildError(f"the library {path} is not ours: it has no {', '.join(missing)}")
    return handle


@lru_cache
def target(choice: str, part: str = "native") -> Target:
    """What a value of LONGATTN_NATIVE asks for; nothing is compiled or written."""
    here = levels()
    named = choice.strip().lower()
    level = named if named in (*here, PLAIN_TILES) else here[0] if here else "generic"
    flags = (*flags_of(level), *os.environ.get("LONGATTN_NATIVE_FLAGS", "").split())
    binary = Target(part, level, None, flags, Path(), f"{part}-{level}", _not_for_here(named, here))
    if binary.refusal is None:
        try:
            binary.prebuilt = _prebuilt(level, part)
            if binary.prebuilt is None:
                binary.refusal = _look(binary)
            else:
                binary.stem = binary.prebuilt.name.partition(".")[0]
        except OSError as problem:
            binary.refusal = f"compiler, source or cache folder cannot be read: {problem}"
    return binary


def flags_of(level: str) -> tuple[str, ...]:
    """What a level is compiled with, unless the user adds to it."""
    return (*FLAGS, *cpu.compiler_flags(level))


def prebuilt_stem(level: str, part: str = "native") -> str:
    """How the name of a level's prebuilt library begins: with a hash of its source and flags, so that no other one serves."""
    return f"{part}-{level}-{_hash(flags_of(level), None)}"


def _prebuilt(level: str, part: str) -> Path | None:
    """The whole library of a level that came with the package, where the user asks for nothing else."""
    if os.environ.get("CXX", "").strip() or os.environ.get("LONGATTN_NATIVE_FLAGS", "").strip():
        return None
    # It is as much to be trusted as the package's own source, so only damage is looked for.
    for path in sorted(PREBUILT.glob(f"{prebuilt_stem(level, part)}.*.so")):
        if path.name.split(".")[-2] == cachefolder.digest(path):
            return path
        logger.warning("native row: %s is damaged, and not used; install longattn-kernels again", path)
    return None


def _not_for_here(named: str, here: tuple[str, ...]) -> str | None:
    if named == "0":
        return "switched off by LONGATTN_NATIVE=0"
    if named not in ("", "1", *CHOICES):
        return f"LONGATTN_NATIVE must be 0, 1 or one of {', '.join(CHOICES)}, got {shortened(named)}"
    if not here:
        return "this machine's processor is not known"
    if named == "amx" and (refused := cpu.refused()) is not None:
        return f"LONGATTN_NATIVE={named}: {refused}"
    if named in LEVELS and named not in here:
        return f"LONGATTN_NATIVE={named} needs another processor than this one, which has {here[0]}"
    return None


def _look(binary: Target) -> str | None:
    """Find compiler and folder, or say why they cannot be used."""
    folder, compiler = cachefolder.cache_folder(), compiling.find()
    if isinstance(folder, str):
        return folder
    binary.folder = folder
    binary.compiler = None if isinstance(compiler, str) else compiler
    binary.stem = f"{binary.part}-{binary.level}-{_hash(binary.flags, binary.compiler)}"
    wrong = cachefolder.refusal_of(folder)
    if wrong is not None or (folder.is_dir() and any(folder.glob(f"{binary.stem}.*.so"))):
        return wrong
    return compiler if isinstance(compiler, str) else cachefolder.unwritable(folder)


def compile_for(binary: Target) -> Path:
    """Compile the source for a target; the file gets its name once it is complete. `progress` says what, where and how long.

    Raises:
        NativeBuildError: there is no compiler, or it fails, with its last line.
        OSError: the folder cannot be written.
    """
    compiler = binary.compiler
    if compiler is None:
        raise NativeBuildError(str(compiling.find()))
    cachefolder.make(binary.folder)
    part = PARTS[binary.part]
    source = files("longattn.kernels.native").joinpath(part.source)
    words = " ".join(compiler.words)
    what = f"compiling {part.subject} ({binary.level}) with {words} into {binary.folder} (once, usually under a minute; python -m longattn.kernels build does so beforehand)"
    with progress(what, logger, after=0), cachefolder.workshop(binary.folder, compiling.LONGEST_S) as own:
        by_another = cachefolder.find(binary.folder, binary.stem)
        if by_another is not None:
            return by_another
        made = own / "native.so"
        command = compiler.command(binary.flags, str(source), str(made))
        logger.debug("native row: %s", " ".join(command))
        compiling.run(compiler, command)
        if not made.exists():
            raise NativeBuildError(f"the compiler {words} ended well and wrote no library")
        return cachefolder.keep(made, binary.folder, binary.stem)


def _hash(flags: tuple[str, ...], compiler: Compiler | None) -> str:
    known = hashlib.sha256(os.fsencode(" ".join(flags)))
    folder = files("longattn.kernels.native")
    for name in sorted(f.name for f in folder.iterdir() if f.name.endswith((".cpp", ".h"))):
        known.update(name.encode() + folder.joinpath(name).read_bytes())
    if compiler is not None:
        known.update(os.fsencode(compiler.identity))
    return known.hexdigest()[:20]
