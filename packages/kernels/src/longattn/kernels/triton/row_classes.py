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
class RowRuns:
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

    def take(self, picked: Rows | slice) -> RowRuns:
        """Some of them."""
        return RowRuns(**{name: values[picked] for name, values in vars(self).items()})

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

    owned: RowRuns
    met: RowRuns
    part: int = 0


def gathered(branches: Sequence[Branch]) -> bool:
    """Whether a kernel has to gather rows by number: some list has many short runs."""
    return any(_short_runs(index) for branch in branches for index in (branch.q, branch.k))


def _short_runs(index: Index) -> bool:
    return not isinstance(index, Affine) and index.starts.shape[1] > 1 and index.run < SHORT_RUN


def branch_runs(branches: Sequence[tuple[int, Branch]]) -> tuple[RowRuns, RowRuns]:
    """Query runs and key runs of (member, branch) pairs. The band is said for an owner of queries."""
    sides: tuple[list[RowRuns], list[RowRuns]] = ([], [])
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


def _index_runs(index: Index, at: tuple[int, int], band: tuple[int, int], member: int, first_tile: int) -> RowRuns:
    if isinstance(index, Affine):
        start, runs_per_tile = index.start + np.arange(index.tiles, dtype=np.int64) * index.tile_step, 1
        count = index.count
    else:
        start, runs_per_tile, count = index.starts.ravel(), index.starts.shape[1], index.run
    tile = first_tile + np.repeat(np.arange(index.tiles, dtype=np.int64), runs_per_tile)
    columns = (index.step if count > 1 else 1, count, *at, *band, member)
    step, counts, origin, scale, low, high, members = (np.full(len(start), value, np.int64) for value in columns)
    return RowRuns(start, step, counts, origin, scale, low, high, members, tile, np.ones(len(start), np.int64))


def _concatenate(parts: Sequence[RowRuns]) -> RowRuns:
    return RowRuns(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])})


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
    met_by_tiles: dict[bytes, RowRuns] = {}
    listed = gathered([branch for _, branch in branches])
    for owned_run, run_indices in cells(owned, listed):
        tiles = np.sort(owned.tile[run_indices])
        key = tiles.tobytes()
        if key not in met_by_tiles:
            begin, end = (np.searchsorted(other.tile, tiles, side) for side in ("left", "right"))
            runs = other.take(_ranges(begin, end))
            met_by_tiles[key] = _unique(runs) if unique and len(tiles) > 1 else runs
        yield RowClass(owned_run, met_by_tiles[key])


def _unique(met: RowRuns) -> RowRuns:
    """The same rows, each once, with how often it counts. Positions differ by span, so spans stay apart."""
    parts = []
    for position in np.unique(np.stack([met.member, met.origin, met.scale]), axis=1).T:
        runs = met.take(
            np.flatnonzero((met.member == position[0]) & (met.origin == position[1]) & (met.scale == position[2]))
        )
        for cell_runs, run_indices in cells(runs, False, by_count=True):
            parts.append(replace(cell_runs, times=np.full(len(cell_runs), len(run_indices))))
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


def cells(runs: RowRuns, listed: bool, *, by_count: bool = False) -> Iterator[tuple[RowRuns, Rows]]:
    """Disjoint runs that together are the rows of `runs`, each with the sorted indices of the runs that it lies in.

    listed: rows may be gathered, so that a cell is all rows that lie in the same runs, one run per row.
    by_count: cells that lie in equally many runs may be joined.
    """
    modulus = int(np.lcm.reduce(runs.step))
    table = None if listed else _stretch_cells(runs, modulus)
    table = _single_rows(runs) if table is None else table
    groups: dict[tuple[int, object], list[int]] = {}
    for at in range(len(table.row)):
        inside = table.by(at)
        signature: object = len(inside) if by_count else inside.tobytes()
        groups.setdefault((0 if listed else int(table.end[at]), signature), []).append(at)
    for members in groups.values():
        inside, first = table.by(members[0]), np.sort(table.row[members])
        if listed:
            yield _with_positions_of(runs, inside, first, 1, np.ones(len(first), np.int64)), inside
            continue
        # Evenly spread residues are one run of a smaller step: all odd rows, say.
        step = max(1, modulus // len(first))
        if modulus % len(first) or ((first - first[0]) % step).any():
            step = modulus
        end = table.end[members[0]]
        for start in first[:1] if step < modulus else first:
            count = np.array([-((start - end) // step)])
            yield _with_positions_of(runs, inside, np.array([start]), step, count), inside


def _with_positions_of(runs: RowRuns, run_indices: Rows, start: Rows, step: int, count: Rows) -> RowRuns:
    """Runs of these rows with the positions of the runs that they lie in."""
    steps = np.where(count > 1, step, 1)
    return replace(runs.take(np.full(len(start), run_indices[0])), start=start, step=steps, count=count)


def _stretch_cells(runs: RowRuns, modulus: int) -> _Cells | None:
    """Cells by stretch between two ends of runs and by residue; None where single rows would be fewer."""
    last = runs.start + (runs.count - 1) * runs.step
    cuts = np.unique(np.concatenate([runs.start, last + 1]))
    low, high = np.searchsorted(cuts, runs.start), np.searchsorted(cuts, last + 1)
    residues = modulus // runs.step
    size = (high - low) * residues
    if size.sum() > max(4 * len(runs), runs.rows):
        return None
    owner = np.repeat(np.arange(len(runs), dtype=np.int64), size)
    stretch, number = np.divmod(_enumerate_each(size), residues[owner])
    stretch += low[owner]
    residue = runs.start[owner] + runs.step[owner] * number
    row = cuts[stretch] + (residue - cuts[stretch]) % modulus
    inside = row < cuts[stretch + 1]
    return _Cells.group(row[inside], cuts[stretch + 1][inside], owner[inside])


def _single_rows(runs: RowRuns) -> _Cells:
    """Every row a cell of its own."""
    owner = np.repeat(np.arange(len(runs), dtype=np.int64), runs.count)
    row = runs.start[owner] + runs.step[owner] * _enumerate_each(runs.count)
    return _Cells.group(row, row + 1, owner)


def _enumerate_each(sizes: Rows) -> Rows:
    """0 .. size - 1 for each size, one after the other."""
    return np.arange(int(sizes.sum()), dtype=np.int64) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _ranges(begin: Rows, end: Rows) -> Rows:
    """begin .. end - 1 of each pair, one after the other."""
    return np.repeat(begin, end - begin) + _enumerate_each(end - begin)
