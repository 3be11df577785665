"""Lifetimes of tensors, and their offsets in one block.

Source: Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", MLSys 2020 workshop, arXiv 2001.03288:
tensors in order of size, the largest first, each into the tightest gap between those that live at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longattn.bufmgr.strategy import block_size


@dataclass(frozen=True)
class Lifetime:
    """One tensor's memory: bytes, the operation that makes it, and the last one during which it lives (both inclusive).

    name: the operation's name.
    """

    nbytes: int
    first: int
    last: int
    name: str


@dataclass(frozen=True)
class MemoryLayout:
    """The offset of each lifetime in one block, in order, and the block's bytes."""

    offsets: tuple[int, ...]
    block_bytes: int


def live_peak(lifetimes: Sequence[Lifetime]) -> int:
    """Return the most bytes that live at once: no layout is smaller."""
    changes = sorted(
        [(lifetime.first, 1, lifetime.nbytes) for lifetime in lifetimes]
        + [(lifetime.last + 1, 0, -lifetime.nbytes) for lifetime in lifetimes]
    )
    live = peak = 0
    for _, _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def lay_out(lifetimes: Sequence[Lifetime]) -> MemoryLayout:
    """Return offsets, multiples of 64, at which no two lifetimes that overlap in time overlap in memory."""
    offsets = [0] * len(lifetimes)
    placed: list[int] = []  # in order of offset
    end = 0
    for index in sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].nbytes, lifetimes[i].first)):
        lifetime, size = lifetimes[index], block_size(lifetimes[index].nbytes)
        best, best_gap, free_from = None, 0, 0
        for other in placed:
            if lifetimes[other].first > lifetime.last or lifetimes[other].last < lifetime.first:
                continue
            gap = offsets[other] - free_from
            if gap >= size and (best is None or gap < best_gap):
                best, best_gap = free_from, gap
            free_from = max(free_from, offsets[other] + block_size(lifetimes[other].nbytes))
        offsets[index] = free_from if best is None else best
        end = max(end, offsets[index] + size)
        placed.append(index)
        placed.sort(key=lambda i: offsets[i])
    return MemoryLayout(tuple(offsets), end)
