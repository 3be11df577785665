"""`Plan`: who sees whom in one rectangle, in strides.

A plan is a tuple of branches. The counts of a plan are the *sum* over its branches, so a key that two branches reach counts twice;
within one branch every (query, key) pair counts once, unless a list names the key twice, and no query row stands in two tiles (keys may).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from longattn.patterncache.indices import Affine, Index, Listed
from longattn.patterncache.spans import Rectangle, Rows, Span

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Band:
    """Visible iff low <= query position - key position <= high; None is no bound.

    Causal is Band(0, None), a causal window of w is Band(0, w - 1).
    """

    low: int | None = None
    high: int | None = None

    def sees(self, distance: Rows) -> npt.NDArray[np.bool_]:
        """Elementwise, for `distance` = query position - key position."""
        visible = np.ones(distance.shape, bool)
        if self.low is not None:
            visible &= distance >= self.low
        if self.high is not None:
            visible &= distance <= self.high
        return visible

    def __and__(self, other: Band) -> Band:
        lows = [b.low for b in (self, other) if b.low is not None]
        highs = [b.high for b in (self, other) if b.high is not None]
        return Band(max(lows, default=None), min(highs, default=None))

    def covers(self, nearest: int, farthest: int) -> bool:
        """Whether every distance from `nearest` to `farthest` is visible."""
        return (self.low is None or nearest >= self.low) and (self.high is None or farthest <= self.high)

    def misses(self, nearest: int, farthest: int) -> bool:
        """Whether no distance from `nearest` to `farthest` is visible."""
        empty = self.low is not None and self.high is not None and self.low > self.high
        below = self.low is not None and farthest < self.low
        above = self.high is not None and nearest > self.high
        return empty or below or above


@dataclass(frozen=True, eq=False)
class Branch:
    """One family of equal tiles: tile t lets rows q[t] of every head in `heads` see the rows k[t], within `band`.

    Attributes:
        heads: rows of the head axis (local to the rectangle), a Span.
        q, k: row indices, same number of tiles.
        q_at, k_at: (origin, step): position = origin + step * row, for the span these rows come from.
        band: None where every pair of a tile is visible.

    Where there is a band, every tile has the same geometry: q position - k position of its first rows is one number
    (`offset`) unless an index is a list of several runs.
    """

    heads: Span
    q: Index
    k: Index
    q_at: tuple[int, int] = (0, 1)
    k_at: tuple[int, int] = (0, 1)
    band: Band | None = None

    @cached_property
    def steps(self) -> tuple[int, int]:
        """Position distance between neighbouring rows of a tile, for queries and keys."""
        return self.q.step * self.q_at[1], self.k.step * self.k_at[1]

    @cached_property
    def uniform(self) -> bool:
        """Whether all tiles share one geometry, so that one mask serves them all."""
        single = all(isinstance(i, Affine) or i.starts.shape[1] == 1 for i in (self.q, self.k))
        if not single or self.q.tiles == 1:
            return single
        distances = self._first(self.q, self.q_at) - self._first(self.k, self.k_at)
        return bool((distances == distances[0]).all())

    @staticmethod
    def _first(index: Index, at: tuple[int, int]) -> Rows:
        if isinstance(index, Affine):
            rows = index.start + np.arange(index.tiles, dtype=np.int64) * index.tile_step
        else:
            rows = index.starts[:, 0]
        return at[0] + at[1] * rows

    @cached_property
    def offset(self) -> int:
        """Query position - key position of the first rows of every tile (uniform branches)."""
        q, k = (index.start if isinstance(index, Affine) else index.starts[0, 0] for index in (self.q, self.k))
        return int(self.q_at[0] + self.q_at[1] * q - self.k_at[0] - self.k_at[1] * k)

    def positions(self) -> tuple[Rows, Rows]:
        """Query and key positions, (tiles, count) each."""
        return (self.q_at[0] + self.q_at[1] * self.q.rows(), self.k_at[0] + self.k_at[1] * self.k.rows())

    @cached_property
    def visible(self) -> npt.NDArray[np.bool_] | None:
        """Which pairs a tile shows: None (all), or (1 or tiles, q count, k count) bool, read-only."""
        if self.band is None:
            return None
        if self.uniform:
            a = np.arange(self.q.count, dtype=np.int64)[:, None] * self.steps[0]
            b = np.arange(self.k.count, dtype=np.int64)[None] * self.steps[1]
            distance = (self.offset + a - b)[None]
        else:
            q, k = self.positions()
            distance = q[:, :, None] - k[:, None, :]
        shown = self.band.sees(distance)
        shown.flags.writeable = False
        return shown

    @cached_property
    def seeing(self) -> npt.NDArray[np.bool_]:
        """(q count,) bool, read-only: rows that see a key in every tile. All True where there is no band, or tiles differ."""
        if self.band is None or not self.uniform:
            seeing = np.ones(self.q.count, bool)
        else:
            begin, end = self.key_range()
            seeing = begin <= end
        seeing.flags.writeable = False
        return seeing

    def key_range(self) -> tuple[Rows, Rows]:
        """First and last key row of its tile that each query row of a uniform, banded branch sees; last < first: none."""
        assert self.band is not None and self.uniform
        q_step, k_step = self.steps
        nearest = self.offset + np.arange(self.q.count, dtype=np.int64) * q_step
        begin, end = np.zeros_like(nearest), np.full_like(nearest, self.k.count - 1)
        if self.band.high is not None:
            begin = np.maximum(begin, -_quotient(self.band.high - nearest, k_step))
        if self.band.low is not None:
            end = np.minimum(end, _quotient(nearest - self.band.low, k_step))
        return begin, end

    @cached_property
    def pairs(self) -> int:
        """How many (query, key) pairs one head sees, over all tiles."""
        if self.band is None:
            return self.q.tiles * self.q.count * self.k.count
        if not self.uniform:
            assert self.visible is not None
            return int(self.visible.sum())
        low, high = self.band.low, self.band.high
        near = self.q.count * self.k.count if low is None else self._pairs_from(low)
        return self.q.tiles * max(0, near - (0 if high is None else self._pairs_from(high + 1)))

    def _pairs_from(self, distance: int) -> int:
        """Pairs of a tile at that distance or farther: query row a sees floor((offset - distance + a * q step) / k step) + 1 keys, 0 to all of them."""
        (q_step, k_step), rest = self.steps, self.offset - distance
        first, full = (max(0, -((rest - k_step * keys) // q_step)) for keys in (0, self.k.count - 1))
        first, full = min(first, self.q.count), min(full, self.q.count)
        partly = _floor_sum(full - first, k_step, q_step, rest + first * q_step) + full - first
        return partly + (self.q.count - full) * self.k.count

    @cached_property
    def triangle(self) -> bool:
        """Whether row a of a tile sees exactly its keys 0 .. a: what kernels call causal."""
        return (
            self.band is not None
            and self.band.high is None
            and self.band.low is not None
            and self.uniform
            and self.steps[0] == self.steps[1]
            and self.q.count == self.k.count
            and 0 <= self.offset - self.band.low < self.steps[1]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of index data held."""
        return self.q.nbytes + self.k.nbytes


@dataclass(frozen=True, eq=False)
class Plan:
    """The branches of one rectangle. Immutable; what is derived from it, such as its pieces, is kept in `derived`."""

    rectangle: Rectangle
    branches: tuple[Branch, ...]

    @property
    def empty(self) -> bool:
        """No query sees a key: nothing to launch, nothing to send."""
        return not self.branches

    @property
    def listed(self) -> bool:
        """Whether any branch names rows by a list rather than by strides."""
        return any(isinstance(i, Listed) for b in self.branches for i in (b.q, b.k))

    @property
    def nbytes(self) -> int:
        """Bytes of index data held: 0 for affine plans."""
        return sum(b.nbytes for b in self.branches)

    @property
    def wide_nbytes(self) -> int:
        """Bytes of the same index data unpacked, 8 a number; over `nbytes`, that is the ratio of compression."""
        return sum(i.wide_nbytes for b in self.branches for i in (b.q, b.k))

    def counts(self) -> Counts:
        """(heads, queries, keys) int64: how many times each query sees each key. Dense, for tests and small sizes."""
        total = np.zeros(self.rectangle.shape, np.int64)
        for branch in self.branches:
            add_branch_counts(total, branch)
        return total

    @cached_property
    def derived(self) -> dict[str, Any]:
        """What rows compute once from this plan and keep beside it, by name. Values are never part of the plan's meaning."""
        return {}


def _quotient(distance: Rows, step: int) -> Rows:
    # Dividing a million numbers by one takes as long as by any other.
    return distance if step == 1 else distance // step


def _floor_sum(many: int, divisor: int, slope: int, at: int) -> int:
    """Sum of (slope * i + at) // divisor for i below `many`, none of them negative: Euclid's algorithm on the lattice points under a line."""
    total = 0
    while many > 0:
        total += many * (many - 1) // 2 * (slope // divisor) + many * (at // divisor)
        slope, at = slope % divisor, at % divisor
        many, at = divmod(slope * many + at, divisor)
        divisor, slope = slope, divisor
    return total


def add_branch_counts(total: Counts, branch: Branch) -> None:
    """Add the pairs of one branch to `total` (heads, queries, keys), in place."""
    heads = branch.heads.positions()
    q, k = branch.q.rows(), branch.k.rows()
    visible = branch.visible
    for t in range(branch.q.tiles):
        block = np.ones((q.shape[1], k.shape[1]), np.int64)
        if visible is not None:
            block = visible[t if len(visible) > 1 else 0].astype(np.int64)
        np.add.at(total, (heads[:, None, None], q[t][None, :, None], k[t][None, None, :]), block[None])


def make_plan(rectangle: Rectangle, branches: Iterable[Branch]) -> Plan:
    """A plan of the branches that show at least one pair."""
    visible = (b for b in branches if b.heads.length and b.q.tiles and b.q.count and b.k.count)
    return Plan(rectangle, tuple(visible))
