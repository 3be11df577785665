"""Where arithmetic progressions of rows overlap, and how often: how tiles of several branches become one softmax.

Rows are cut where a progression begins or ends; in each piece everything repeats with the least common multiple of the steps, so a
piece says all it knows in one period.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np

from longattn.patterncache.spans import Rows

LONGEST_PERIOD = 4096
"""Rows that a period may have: rates that share no factor multiply."""


@dataclass(frozen=True, slots=True)
class Progression:
    """Rows start, start + step, ..., `count` of them, at least one."""

    start: int
    step: int
    count: int

    @property
    def last(self) -> int:
        """The last row."""
        return self.start + (self.count - 1) * self.step


@dataclass(frozen=True, slots=True)
class PeriodicRows:
    """Rows start + i // block * period + offsets[i % block], for i < count, where block = len(offsets).

    Attributes:
        offsets: ascending, below `period`.
        times: how often each of them counts.
    """

    start: int
    period: int
    offsets: tuple[int, ...]
    times: tuple[int, ...]
    count: int


def borders(progressions: Sequence[Progression]) -> list[int]:
    """Ascending rows that cut all progressions into pieces: few, for a progression may begin a little before its first row."""
    rows: list[int] = []
    for p in sorted(progressions, key=lambda p: p.step):
        # Any row in (last member before, first member] begins it as well, any in (last, next member] ends it.
        _add_border(rows, p.start - p.step + 1, p.start, p.start)
        _add_border(rows, p.last + 1, p.last + p.step, p.last + 1)
    return rows


def _add_border(rows: list[int], low: int, high: int, new_border: int) -> None:
    """See that there is a border in low .. high: one that is there, or another."""
    at = bisect_left(rows, low)
    if at == len(rows) or rows[at] > high:
        insort(rows, new_border)


def pieces(progressions: Sequence[Progression]) -> Iterator[tuple[int, int, list[int]]]:
    """(begin, end, which progressions have members in it), ascending; together they hold every member."""
    cuts = borders(progressions)
    # Those of one step hardly overlap, so a sweep meets few at a time.
    order = sorted(range(len(progressions)), key=lambda i: progressions[i].start)
    active: list[int] = []
    coming = 0
    for begin, end in pairwise(cuts):
        while coming < len(order) and progressions[order[coming]].start < end:
            active.append(order[coming])
            coming += 1
        active = [i for i in active if progressions[i].last >= begin]
        if active:
            yield begin, end, sorted(active)


def period_of(progressions: Sequence[Progression]) -> int:
    """After how many rows all of them repeat together."""
    return math.lcm(*(p.step for p in progressions))


@lru_cache(maxsize=4096)
def residues(phases: tuple[tuple[int, int], ...]) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """For progressions as (first offset modulo step, step): (members, offsets in a period) for every set of them that meet."""
    period = math.lcm(*(step for _, step in phases))
    at = np.arange(period)
    present = np.stack([at % step == first for first, step in phases])
    distinct, set_of_offset = np.unique(present, axis=1, return_inverse=True)
    set_of_offset = set_of_offset.reshape(-1)
    return tuple(
        (tuple(np.flatnonzero(column).tolist()), tuple(np.flatnonzero(set_of_offset == index).tolist()))
        for index, column in enumerate(distinct.T)
        if column.any()
    )


def phases_at(begin: int, progressions: Sequence[Progression]) -> tuple[tuple[int, int], ...]:
    """Where each progression stands in its step, seen from row `begin`."""
    return tuple(((p.start - begin) % p.step, p.step) for p in progressions)


def periodic(
    begin: int, end: int, period: int, offsets: tuple[int, ...], times: tuple[int, ...]
) -> PeriodicRows | None:
    """The rows begin + a multiple of the period + an offset that lie below `end`; None where there are none."""
    periods, remainder = divmod(end - begin, period)
    count = periods * len(offsets) + bisect_left(offsets, remainder)
    return PeriodicRows(begin, period, offsets, times, count) if count else None


def multiset(progressions: Sequence[Progression]) -> tuple[PeriodicRows, ...]:
    """All rows of the progressions, each once, with how often it stands among them, piece by piece, ascending."""
    base = min(p.start for p in progressions)
    at_zero = _multiset(tuple((p.start - base, p.step, p.count) for p in progressions))
    return tuple(replace(p, start=p.start + base) for p in at_zero)


# Segments repeat: most of a long sequence is the same few constellations somewhere else.
@lru_cache(maxsize=4096)
def _multiset(shapes: tuple[tuple[int, int, int], ...]) -> tuple[PeriodicRows, ...]:
    progressions = [Progression(*shape) for shape in shapes]
    multiset_pieces = []
    for begin, end, active in pieces(progressions):
        meeting = [progressions[i] for i in active]
        groups = residues(phases_at(begin, meeting))
        pairs = sorted((offset, len(members)) for members, offsets in groups for offset in offsets)
        offsets, times = tuple(o for o, _ in pairs), tuple(n for _, n in pairs)
        piece = periodic(begin, end, period_of(meeting), offsets, times)
        if piece is not None:
            multiset_pieces.append(piece)
    return tuple(multiset_pieces)


def rows_of(piece: PeriodicRows) -> Rows:
    """(count,) int64."""
    i, block = np.arange(piece.count, dtype=np.int64), len(piece.offsets)
    return piece.start + i // block * piece.period + np.asarray(piece.offsets, np.int64)[i % block]
