"""Branches whose tiles are intervals of positions: what patterns made of segments, strides and documents plan with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from longattn.patterncache.indices import Index, Listed, index_of
from longattn.patterncache.plan import Band, Branch
from longattn.patterncache.spans import Rectangle, Rows, Span, congruent_indices


@dataclass(frozen=True)
class Intervals:
    """Intervals [low, high) of positions; of each, the positions equal to `residue` modulo `modulus`. Three (intervals,) arrays."""

    low: Rows
    high: Rows
    residue: Rows
    modulus: int

    @classmethod
    def between(cls, borders: Rows) -> Intervals:
        """All positions between neighbouring borders, where there are any."""
        low, high = borders[:-1][borders[1:] > borders[:-1]], borders[1:][borders[1:] > borders[:-1]]
        return cls(low, high, np.zeros_like(low), 1)

    def segments(self, size: int) -> tuple[Rows, Rows]:
        """Each interval cut from its start on into parts of `size`, the last one short: (low, high) of all parts."""
        owner, part = expand(-(-(self.high - self.low) // size))
        low = self.low[owner] + part * size
        return low, np.minimum(low + size, self.high[owner])

    def meeting(self, sides: Sides) -> Intervals:
        """Those that have positions of both sides."""
        begin, end = max(span.start for span, _ in sides), min(span.last for span, _ in sides)
        meets = (self.high > begin) & (self.low <= end)
        return Intervals(self.low[meets], self.high[meets], self.residue[meets], self.modulus)


Sides = tuple[tuple[Span, int], tuple[Span, int]]
"""((queries, their first row), (keys, their first row)): one span of either side of a rectangle."""


def span_pairs(rectangle: Rectangle) -> Iterator[Sides]:
    """Every pair of non-empty spans of a rectangle, where a plan's positions are of one form."""
    q_row = 0
    for q in rectangle.queries:
        k_row = 0
        for k in rectangle.keys:
            if q.length and k.length:
                yield (q, q_row), (k, k_row)
            k_row += k.length
        q_row += q.length


def expand(counts: Rows) -> tuple[Rows, Rows]:
    """For each c of counts: its index c times, beside 0 .. c - 1."""
    owner = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    return owner, np.arange(len(owner), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)


def interval_branches(
    heads: Span, sides: Sides, queries: Intervals, keys: Intervals, band: Band | None
) -> Iterator[Branch]:
    """Tile t: the queries of window t see its keys, within `band`. Intervals of queries must not overlap.

    Tiles of one branch share their size and, where the band cuts them, their geometry.
    """
    (q, q_row), (k, k_row) = sides
    q_first, q_count, q_step = congruent_indices(q, queries.low, queries.high, queries.residue, queries.modulus)
    k_first, k_count, k_step = congruent_indices(k, keys.low, keys.high, keys.residue, keys.modulus)
    q_begin, k_begin = q.start + q.step * q_first, k.start + k.step * k_first
    shown = (q_count > 0) & (k_count > 0)
    nearest = q_begin - (k_begin + (k_count - 1) * k_step * k.step)
    farthest = q_begin + (q_count - 1) * q_step * q.step - k_begin
    cut = np.zeros(len(shown), bool)
    if band is not None:
        low = -np.inf if band.low is None else band.low
        high = np.inf if band.high is None else band.high
        shown &= (farthest >= low) & (nearest <= high)
        cut = (nearest < low) | (farthest > high)
    members = np.flatnonzero(shown)
    if not len(members):
        return
    q_at, k_at = (q.start - q_row * q.step, q.step), (k.start - k_row * k.step, k.step)
    kind = np.stack([np.where(cut, q_begin - k_begin, 0), cut, k_count, q_count])[:, members]
    order = np.lexsort(kind)
    borders = np.flatnonzero((np.diff(kind[:, order], axis=1) != 0).any(axis=0)) + 1
    for some in np.split(members[order], borders):
        at = some[0]
        branch = Branch(
            heads,
            query_tiles(q_first[some] + q_row, int(q_count[at]), q_step),
            index_of(k_first[some] + k_row, int(k_count[at]), k_step),
            q_at,
            k_at,
            band if cut[at] else None,
        )
        if not cut[at] or band is None or lands(branch, band):
            yield branch


def lands(branch: Branch, band: Band) -> bool:
    """Whether a band that reaches into a uniform branch shows a pair of it: wide strides can step over a narrow band."""
    if band.low is None or band.high is None or band.high - band.low + 1 >= max(branch.steps):
        return True
    return bool(branch.seeing.any())


def query_tiles(starts: Rows, count: int, step: int) -> Index:
    """Query tiles: affine only where the strides alone say that no row stands in two."""
    index = index_of(starts, count, step)
    return index if isinstance(index, Listed) or index.distinct else Listed(starts[:, None], count, step)


def moved(branch: Branch, rows: tuple[int, int], shift: int) -> Branch:
    """`branch`, its query and key rows `rows` further on and its positions `shift` further on."""
    q, k = (
        replace(index, starts=index.starts + by)
        if isinstance(index, Listed)
        else replace(index, start=index.start + by)
        for index, by in zip((branch.q, branch.k), rows, strict=True)
    )
    q_at, k_at = (
        (origin + shift - step * by, step) for (origin, step), by in zip((branch.q_at, branch.k_at), rows, strict=True)
    )
    return replace(branch, q=q, k=k, q_at=q_at, k_at=k_at)
