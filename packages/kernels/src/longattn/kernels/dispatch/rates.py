"""Figures of speed: how fast each row is on this processor, for each dtype, head size, direction and form of plan.

1. Shipped: `shipped/*.json`, measured by `python -m tools.measure_rates` with one thread for a processor and a torch, with the native
   library's level as part of the row's name, and taken for the numbers of threads that the file names.
2. Kept: elsewhere a row is measured once, on `Full()` of 1024 tokens and one head (see `probing`), and the figure is kept in the
   cache folder, for this library, torch, processor and number of threads. Of the other forms and head sizes it has that share which the
   row has of its dense rate in the first shipped table.

Times are CPU time, summed over threads: what a row takes of a machine whatever else that does. What is neither shipped nor can be kept is not measured: the same process would choose otherwise each time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch

from longattn.kernels.dispatch.capability import dtype_name
from longattn.kernels.dispatch.keeping import keep_measured
from longattn.kernels.dispatch.processor import processor
from longattn.kernels.dispatch.work import Work

DIRECTIONS = ("forward", "backward")
PROBED = ("dense", 64)
"""Form and head size that a row is measured at where no figures of it are shipped."""

Numbers = dict[str, dict[str, float]]
"""direction -> {"overhead_us": microseconds a call, "<form> <head_dim>": GFLOP a second of CPU time}."""


@dataclass(frozen=True)
class Figures:
    """How fast one row is, for one dtype.

    Attributes:
        numbers: what was measured. source: where, in words.
        like: numbers of a processor on which every form was measured, where `numbers` have the probed one alone: the others are taken
            to have the same share of it. None: `numbers` have every form.
    """

    numbers: Numbers
    source: str
    like: Numbers | None = None

    def seconds(self, work: Work, direction: str) -> float:
        """Expected CPU time of "forward" or "backward"."""
        known = self.numbers[direction]
        if self.like is None:
            rate = _nearest(known, work)
        else:
            of = self.like.get(direction, {_PROBED: 1.0})
            rate = known[_PROBED] * _nearest(of, work) / of[_PROBED]
        return known["overhead_us"] * 1e-6 + work.operations(direction) / (rate * 1e9)


_PROBED = f"{PROBED[0]} {PROBED[1]}"


def _nearest(known: dict[str, float], work: Work) -> float:
    """The rate of a form at the head size that is nearest by ratio; of a form that is not there, the dense one."""
    sizes = [int(name.split()[1]) for name in known if name.startswith(f"{work.form} ")]
    if not sizes:
        return known[_PROBED]
    size = min(sizes, key=lambda size: (abs(math.log(size / work.head_dim)), size))
    return known[f"{work.form} {size}"]


def checked(numbers: Any) -> Numbers | None:
    """What a file said, or None where that is not `Numbers` of at least the probed form."""
    if not isinstance(numbers, dict) or "forward" not in numbers:
        return None
    for direction, known in numbers.items():
        if direction not in DIRECTIONS or not isinstance(known, dict) or not {"overhead_us", _PROBED} <= set(known):
            return None
        if not all(isinstance(x, int | float) and math.isfinite(x) and x > 0 for x in known.values()):
            return None
    return numbers


def torch_version() -> str:
    """Major and minor."""
    return ".".join(torch.__version__.split(".")[:2])


@lru_cache
def shipped() -> tuple[dict[str, Any], ...]:
    """Every shipped table, by file name."""
    folder = files("longattn.kernels.dispatch").joinpath("shipped")
    tables = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    return tuple(json.loads(f.read_text(encoding="utf-8")) for f in tables)


def shipped_figures(row: str, dtype: torch.dtype, threads: int) -> Figures | None:
    """Of this processor, torch and number of threads; `row` with its level, as in "native avx512bf16"."""
    for table in shipped():
        if (table["processor"], table["torch"]) == (processor(), torch_version()) and threads in table["threads"]:
            numbers = table["rows"].get(row, {}).get(dtype_name(dtype))
            if numbers is not None:
                return Figures(numbers, f"shipped for {processor()}, torch {torch_version()}")
    return None


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


@lru_cache
def _like(row: str, dtype: torch.dtype) -> Numbers:
    """What the first shipped table says of a row, whatever its level; nothing of a row that it does not know."""
    for name, by_dtype in shipped()[0]["rows"].items() if shipped() else ():
        if name.split()[0] == row.split()[0] and dtype_name(dtype) in by_dtype:
            numbers: Numbers = by_dtype[dtype_name(dtype)]
            return numbers
    return {}


def figures_of(row: str, revision: str, dtype: torch.dtype, measure: Callable[[], Numbers] | None) -> Figures | str:
    """A row's figures on this processor with this many threads, or why there are none.

    Args:
        row: its name, and level if it has one. revision: of what serves it: the native library, or this package.
        measure: measures it now where nothing is shipped or kept; None: nothing is measured.
    """
    threads = torch.get_num_threads()
    figures = shipped_figures(row, dtype, threads)
    if figures is not None:
        return figures
    numbers = keep_measured("rates", (row, revision, dtype_name(dtype)), checked, measure)
    if isinstance(numbers, str):
        return numbers
    return Figures(numbers, f"measured once on this machine, {_threads(threads)}", _like(row, dtype))
