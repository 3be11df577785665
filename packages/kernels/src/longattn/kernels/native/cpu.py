"""What this machine's processor can do, as far as the native row cares."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

LEVELS: dict[str, tuple[str, ...]] = {
    "avx512bf16": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "generic": (),
}
"""Widths of vectors, widest first, and what tells the compiler. "generic" is four floats: SSE2 on x86, NEON on aarch64."""

_MACHINES = {"x86_64": "x86", "amd64": "x86", "aarch64": "arm", "arm64": "arm"}


@lru_cache
def widest() -> str | None:
    """The widest level of this machine; None where the machine is not known."""
    machine = _MACHINES.get(platform.machine().lower())
    if machine is None:
        return None
    flags = _flags() if machine == "x86" else frozenset()
    for level, needed in LEVELS.items():
        # The kernel lists a flag only where it saves the registers too.
        if all(flag.removeprefix("-m").replace("avx512bf16", "avx512_bf16") in flags for flag in needed):
            return level
    return None


def levels() -> tuple[str, ...]:
    """All levels that run here, widest first."""
    names = tuple(LEVELS)
    first = widest()
    return () if first is None else names[names.index(first) :]


def _flags() -> frozenset[str]:
    """The processor's flags, as Linux lists them; empty elsewhere, which leaves "generic"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.startswith("flags")), ":")
    return frozenset(found.partition(":")[2].split())
