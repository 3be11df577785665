"""What of triton is here: whether it is installed, whether it interprets, and which of its kernels failed to compile."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import lru_cache
from importlib import metadata

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether triton, once imported, interprets its kernels on tensors of any device."""

FAILURES: list[str] = []
"""Configurations whose compilation failed in this process, and why."""


DISTRIBUTIONS = ("triton", "triton-rocm", "pytorch-triton", "pytorch-triton-rocm")
"""Names under which the package `triton` is distributed; torch's wheels for ROCm depend on one of their own."""


def installed_version() -> str | None:
    """The version of the installed triton, whatever its distribution is called; None where there is none."""
    for distribution in DISTRIBUTIONS:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(distribution)
    return None


@lru_cache
def missing() -> str | None:
    """Why the installed triton cannot be used, or None."""
    version = installed_version()
    if version is None:
        return "triton is not installed: pip install triton"
    major, minor = (int(part) for part in version.split(".")[:2])
    return None if (major, minor) >= (3, 6) else f"triton={version} is older than 3.6"


def refusal() -> str | None:
    """Why triton cannot serve here, or None. Whether a GPU is here is not asked: `explain` speaks of any device."""
    return missing() or (FAILURES[0] if FAILURES else None)
