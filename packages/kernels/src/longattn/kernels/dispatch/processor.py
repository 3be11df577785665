"""Which processor this is: what figures of speed are known by."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

_TELLING = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")
"""Flags that decide how torch and the native row multiply. A virtual machine may hide those of its processor."""


@lru_cache
def processor() -> str:
    """Maker, family, model and vector units, such as "AuthenticAMD-26-2+avx2+avx512f"; elsewhere what Python knows of the machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    # The first processor's, which come first in the file.
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    return processor_of(told, platform.machine(), platform.processor())


def processor_of(told: Mapping[str, str], machine: str, name: str) -> str:
    """The same from the fields of /proc/cpuinfo, and what Python calls machine and processor."""
    for fields in (("vendor_id", "cpu family", "model"), ("CPU implementer", "CPU part")):
        if all(field in told for field in fields):
            flags = set(told.get("flags", told.get("Features", "")).split())
            units = [f"+{flag}" for flag in _TELLING if flag in flags]
            return "-".join(told[field] for field in fields) + "".join(units)
    return "-".join(part for part in (machine, name.replace(" ", "_")) if part)
