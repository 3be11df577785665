"""What this machine's processor can do, as far as the native row cares."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import lru_cache
from pathlib import Path

import torch

_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c")
_PROCESSORS_TILES = ("-mamx-tile", "-mamx-bf16", "-DLONGATTN_TILES=HardwareTiles")

LEVELS: dict[str, tuple[str, ...]] = {
    "amx": (*_AVX512, "-mavx512bf16", *_PROCESSORS_TILES),
    "avx512bf16": (*_AVX512, "-mavx512bf16"),
    "avx512": _AVX512,
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "bfdot": ("-march=armv8.2-a+bf16",),
    "generic": (),
}
"""Widths of vectors, widest first, and what tells the compiler. "generic" is four floats: SSE2 on x86, NEON on aarch64, where "bfdot" is that with
products of pairs of bfloat16."""

PLAIN_TILES = "amx-plain"
"""The level `amx` with its tiles in plain C++, equal in every bit: slow, for tests on processors without tiles."""

CHOICES = (*LEVELS, PLAIN_TILES)
"""What LONGATTN_NATIVE may name."""

TILED = ("amx", PLAIN_TILES)
"""Levels whose products are made in tiles."""

HALVES = ("avx512bf16", "bfdot", *TILED)
"""Levels that multiply bfloat16 as it is."""

_MACHINES = {"x86_64": "x86", "amd64": "x86", "aarch64": "arm", "arm64": "arm"}
_FLAG_NAMES = {
    "avx512bf16": "avx512_bf16",
    "amx-tile": "amx_tile",
    "amx-bf16": "amx_bf16",
    "arch=armv8.2-a+bf16": "bf16",
}
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@lru_cache
def widest() -> str | None:
    """The widest level of this machine; None where the machine is not known."""
    machine = _MACHINES.get(platform.machine().lower())
    if machine is None:
        return None
    flags = _flags()
    for level in LEVELS:
        if _has(level, flags) and (level != "amx" or tiles_refusal() is None):
            return level
    return None


def levels() -> tuple[str, ...]:
    """All levels that run here, widest first."""
    names = tuple(LEVELS)
    first = widest()
    return () if first is None else tuple(name for name in names[names.index(first) :] if _has(name, _flags()))


def compiler_flags(level: str) -> tuple[str, ...]:
    """What tells the compiler to build a level; tiles in plain C++ have the vectors that this machine has."""
    if level != PLAIN_TILES:
        return LEVELS[level]
    vectors = next((name for name in levels() if name not in TILED), "generic")
    return (*LEVELS[vectors], "-DLONGATTN_TILES=PlainTiles")


def refused() -> str | None:
    """Why this machine's processor has a wider level than it may use; None where it may use all."""
    machine = _MACHINES.get(platform.machine().lower())
    return tiles_refusal() if machine == "x86" and _has("amx", _flags()) else None


@lru_cache
def tiles_refusal() -> str | None:
    """Ask the kernel once for this process's tiles of AMX, which take 8 KiB of every thread; why it refuses, or None."""
    try:
        system_call = ctypes.CDLL(None, use_errno=True).syscall
    except (OSError, AttributeError) as problem:
        return f"AMX cannot be asked for: {problem}"
    if system_call(*(ctypes.c_long(n) for n in (_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA))) == 0:
        return None
    return f"the kernel refuses this process AMX (arch_prctl: {os.strerror(ctypes.get_errno())})"


def _has(level: str, flags: frozenset[str]) -> bool:
    # The kernel lists a flag only where it saves the registers too.
    required = (flag.removeprefix("-m") for flag in LEVELS[level] if flag.startswith("-m"))
    return all(_FLAG_NAMES.get(name, name) in flags for name in required)


def _flags() -> frozenset[str]:
    """The processor's flags (on aarch64 "Features"), as Linux lists them; elsewhere (macOS, Windows) those of the widest level that torch has found there."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        level = torch.backends.cpu.get_cpu_capability().lower()
        return frozenset(flag.removeprefix("-m") for flag in LEVELS.get(level, ()))
    line = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return frozenset(line.partition(":")[2].split())
