"""`installation`: what of this machine the rows of the dispatch table use, and what they lack. Nothing is compiled, measured or launched."""

# torch's own types are partial.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import os
from typing import Any

import torch

from longattn.kernels import cachefolder
from longattn.kernels.dispatch.processor import processor
from longattn.kernels.dispatch.settings import CHOICE, NATIVE
from longattn.kernels.dispatch.table import TABLE, row
from longattn.kernels.native import building, cpu
from longattn.kernels.native import row as native_row
from longattn.kernels.problem import architecture_of
from longattn.kernels.triton import availability

SETTINGS = (
    "LONGATTN_NATIVE",
    "LONGATTN_CHOICE",
    "LONGATTN_CACHE",
    "LONGATTN_SELF_CHECK",
    "LONGATTN_NATIVE_FLAGS",
    "CXX",
)
"""Environment variables that change which row serves, or how it is built."""


def installation() -> dict[str, Any]:
    """What a person asks first when a call is slow or a row does not serve.

    Returns:
        What JSON can say: `processor` (maker, family, model, vector units) and `threads`; `native` (level and how it was chosen, the wider level
        that the operating system refuses, compiler, library file or None where the first call builds it, and so for each of its parts in `libraries`, why
        it cannot be had or None); `triton`
        (version, why it cannot be used); `devices` (name and architecture of each GPU); `cache_folder` (path, or why there is none); `choice` (how
        a row is preferred); `settings` (those of `SETTINGS` that are set); `rows` (name: why this machine cannot run it, or None).
    """
    folder = cachefolder.cache_folder()
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "native": _native(),
        "triton": {"version": availability.installed_version(), "refusal": availability.refusal()},
        "devices": [_device(number) for number in range(torch.cuda.device_count())],
        "cache_folder": str(folder),
        "cache_folder_refusal": folder if isinstance(folder, str) else cachefolder.refusal_of(folder),
        "choice": "fixed order" if CHOICE.value() == "fixed" else "expected time",
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "rows": {name: refusal() if (refusal := row(name).refusal) is not None else None for name in TABLE},
    }


def _native() -> dict[str, Any]:
    target = building.current()
    libraries: dict[str, str | None] = {}
    for part in building.PARTS:
        binary = building.current(part)
        path = building.file_of(binary) if binary.refusal is None else None
        libraries[part] = None if path is None else str(path)
    named = NATIVE.value().strip().lower() in cpu.CHOICES
    return {
        "level": target.level,
        "chosen_by": f"LONGATTN_NATIVE={NATIVE.value()}" if named else "the widest of this processor",
        "levels": list(cpu.levels()),
        "remark": native_row.remark(),
        "compiler": None if target.compiler is None else " ".join(target.compiler.words),
        "library": libraries["native"],
        "libraries": libraries,
        "refusal": target.refusal,
    }


def _device(number: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(number)
    architecture = architecture_of(torch.device("cuda", number))
    return {"name": properties.name, "architecture": architecture, "memory": properties.total_memory}
