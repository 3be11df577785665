"""Row classes: rows of one side of a plan that meet the same tiles, and the runs of rows that they meet on the other side.

A kernel's program owns rows of one side (queries in the forward pass, keys for dk and dv) and streams the other side's. Branches of a
plan overlap: a query of LongNet is in one tile per branch. So the owned side is cut at the ends of all runs and, where runs have steps,
by residue; rows of a cell are in the same tiles, and cells of one stretch that are in the same tiles are joined again to wider strides.
The same cutting of the other side, by how often a key is met instead of by whom, gives unique keys with a multiplicity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from longattn.patterncache import Branch
from longattn.patterncache.indices import Affine, Index
from longattn.patterncache.spans import Rows

SHORT_RUN = 16
"""Lists of runs shorter than this are gathered row by row; longer ones are strided runs of their own."""

FAR = (1 << 31) - 1
"""No bound of a band, in 32 bits."""


@dataclass(frozen=True)
class Runs:
    """Runs of equally spaced rows; arrays of one length.

    Attributes:
        start, step, count: rows start, start + step, ... (`count` of them).
        origin, scale: position = origin + scale * row.
        low, high: visible iff low <= owner's position - position <= high.
        member: which query head of a kv head's group they belong to, counted from 0.
        tile: a number per (member, branch, tile), the same on both sides.
        times: how often a row counts.
    """

    start: Rows
    step: Rows
    count: Rows
    origin: Rows
    scale: Rows
    low: Rows
    high: Rows
    member: Rows
    tile: Rows
    times: Rows

    def __len__(self) -> int:
        return len(self.start)

    def take(self, picked: Rows | slice) -> Runs:
        """Some of them."""
        return Runs(**{name: values[picked] for name, values in vars(self).items()})

    @property
    def banded(self) -> bool:
        """Whether a band hides anything of any of them."""
        return bool((self.low > -FAR).any() or (self.high < FAR).any())

    @property
    def rows(self) -> int:
        """All of them, added."""
        return int(self.count.sum())


@dataclass(frozen=True)
class RowClass:
    """Rows that meet the same: one run of the owned side (length-1 arrays) and the runs it streams.

    Attributes:
        owned: one run, or, where rows are gathered, one run per row.
        met: runs of the other side.
        part: which part of the keys this is, where a class is split over them.
    """

    owned: Runs
    met: Runs
    part: int = 0


def gathered(branches: Sequence[Branch]) -> bool:
    """Whether a kernel has to gather rows by number: some list has many short runs."""
    return any(_short_runs(index) for branch in branches for index in (branch.q, branch.k))


def _short_runs(index: Index) -> bool:
    return not isinstance(index, Affine) and index.starts.shape[1] > 1 and index.run < SHORT_RUN


def branch_runs(branches: Sequence[tuple[int, Branch]]) -> tuple[Runs, Runs]:
    """Query runs and key runs of (member, branch) pairs. The band is said for an owner of queries."""
    sides: tuple[list[Runs], list[Runs]] = ([], [])
    tiles = 0
    for member, branch in branches:
        band = branch.band
        low = -FAR if band is None or band.low is None else band.low
        high = FAR if band is None or band.high is None else band.high
        for side, index, at in ((sides[0], branch.q, branch.q_at), (sides[1], branch.k, branch.k_at)):
            side.append(_index_runs(index, at, (low, high), member, tiles))
        tiles += branch.q.tiles
    queries, keys = (_concatenate(side) for side in sides)
    return queries, keys


def _index_runs(index: Index, at: tuple[int, int], band: tuple[int, int], member: int, first_tile: int) -> Runs:
    if isinstance(index, Affine):
        start, each = index.start + np.arange(index.tiles, dtype=np.int64) * index.tile_step, 1
        count = index.count
    else:
        start, each, count = index.starts.ravel(), index.starts.shape[1], index.run
    tile = first_tile + np.repeat(np.arange(index.tiles, dtype=np.int64), each)
    fixed = (index.step if count > 1 else 1, count, *at, *band, member)
    step, counts, origin, scale, low, high, members = (np.full(len(start), value, np.int64) for value in fixed)
    return Runs(start, step, counts, origin, scale, low, high, members, tile, np.ones(len(start), np.int64))


def _concatenate(parts: Sequence[Runs]) -> Runs:
    return Runs(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])})


def row_classes(branches: Sequence[tuple[int, Branch]], *, own_keys: bool, unique: bool) -> Iterator[RowClass]:
    """The classes of the rows that the branches write, each with what it meets.

    Args:
        branches: (member of the group, branch) pairs; one kv head's, or one query head's with member 0.
        own_keys: whether keys own, and queries are met.
        unique: join keys that are met more than once into one with a multiplicity. Only without bands.
    """
    if not branches:
        return
    queries, keys = branch_runs(branches)
    owned, other = (keys, queries) if own_keys else (queries, keys)
    if own_keys:
        # The band speaks of query minus key; seen from a key its sign turns.
        other = replace(other, low=-other.high, high=-other.low)
    order = np.argsort(other.tile, kind="stable")
    other = other.take(order)
    met: dict[bytes, Runs] = {}
    listed = gathered([branch for _, branch in branches])
    for mine, by in cells(owned, listed):
        tiles = np.sort(owned.tile[by])
        key = tiles.tobytes()
        if key not in met:
            begin, end = (np.searchsorted(other.tile, tiles, side) for side in ("left", "right"))
            found = other.take(_ranges(begin, end))
            met[key] = _unique(found) if unique and len(tiles) > 1 else found
        yield RowClass(mine, met[key])


def _unique(met: Runs) -> Runs:
    """The same rows, each once, with how often it counts. Positions differ by span, so spans stay apart."""
    parts = []
    for at in np.unique(np.stack([met.member, met.origin, met.scale]), axis=1).T:
        some = met.take(np.flatnonzero((met.member == at[0]) & (met.origin == at[1]) & (met.scale == at[2])))
        for mine, by in cells(some, False, by_count=True):
            parts.append(replace(mine, times=np.full(len(mine), len(by))))
    return _concatenate(parts)


@dataclass(frozen=True)
class _Cells:
    """Cells in row order: the first row of each, where its stretch ends (exclusive), and the runs it lies in."""

    row: Rows
    end: Rows
    begin: Rows
    owner: Rows

    @classmethod
    def group(cls, row: Rows, end: Rows, owner: Rows) -> _Cells:
        order = np.lexsort((owner, row))
        row, end, owner = row[order], end[order], owner[order]
        begin = np.flatnonzero(np.diff(row, prepend=row[:1] - 1))
        return cls(row[begin], end[begin], np.append(begin, len(row)), owner)

    def by(self, at: int) -> Rows:
        """The runs that cell `at` lies in."""
        return self.owner[self.begin[at] : self.begin[at + 1]]


def cells(runs: Runs, listed: bool, *, by_count: bool = False) -> Iterator[tuple[Runs, Rows]]:
    """Disjoint runs that together are the rows of `runs`, each with the sorted indices of the runs that it lies in.

    listed: rows may be gathered, so that a cell is all rows that lie in the same runs, one run per row.
    by_count: cells that lie in equally many runs may be joined.
    """
    modulus = int(np.lcm.reduce(runs.step))
    found = None if listed else _cut(runs, modulus)
    found = _single_rows(runs) if found is None else found
    alike: dict[tuple[int, object], list[int]] = {}
    for at in range(len(found.row)):
        by = found.by(at)
        said: object = len(by) if by_count else by.tobytes()
        alike.setdefault((0 if listed else int(found.end[at]), said), []).append(at)
    for members in alike.values():
        by, first = found.by(members[0]), np.sort(found.row[members])
        if listed:
            yield _like(runs, by, first, 1, np.ones(len(first), np.int64)), by
            continue
        # Evenly spread residues are one run of a smaller step: all odd rows, say.
        step = max(1, modulus // len(first))
        if modulus % len(first) or ((first - first[0]) % step).any():
            step = modulus
        end = found.end[members[0]]
        for start in first[:1] if step < modulus else first:
            yield _like(runs, by, np.array([start]), step, np.array([-((start - end) // step)])), by


def _like(runs: Runs, by: Rows, start: Rows, step: int, count: Rows) -> Runs:
    """Runs of these rows with the positions of the runs that they lie in."""
    steps = np.where(count > 1, step, 1)
    return replace(runs.take(np.full(len(start), by[0])), start=start, step=steps, count=count)


def _cut(runs: Runs, modulus: int) -> _Cells | None:
    """Cells by stretch between two ends of runs and by residue; None where single rows would be fewer."""
    last = runs.start + (runs.count - 1) * runs.step
    cuts = np.unique(np.concatenate([runs.start, last + 1]))
    low, high = np.searchsorted(cuts, runs.start), np.searchsorted(cuts, last + 1)
    residues = modulus // runs.step
    size = (high - low) * residues
    if size.sum() > max(4 * len(runs), runs.rows):
        return None
    owner = np.repeat(np.arange(len(runs), dtype=np.int64), size)
    stretch, turn = np.divmod(_counted(size), residues[owner])
    stretch += low[owner]
    residue = runs.start[owner] + runs.step[owner] * turn
    row = cuts[stretch] + (residue - cuts[stretch]) % modulus
    there = row < cuts[stretch + 1]
    return _Cells.group(row[there], cuts[stretch + 1][there], owner[there])


def _single_rows(runs: Runs) -> _Cells:
    """Every row a cell of its own."""
    owner = np.repeat(np.arange(len(runs), dtype=np.int64), runs.count)
    row = runs.start[owner] + runs.step[owner] * _counted(runs.count)
    return _Cells.group(row, row + 1, owner)


def _counted(sizes: Rows) -> Rows:
    """0 .. size - 1 for each size, one after the other."""
    return np.arange(int(sizes.sum()), dtype=np.int64) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _ranges(begin: Rows, end: Rows) -> Rows:
    """begin .. end - 1 of each pair, one after the other."""
    return np.repeat(begin, end - begin) + _counted(end - begin)
