"""Job tables: what each program of a kernel owns, and the flattened list of tiles that it streams.

A *job* is a block of rows of one head. Its list has *dense* entries first, whole tiles in which every pair is visible, then *edge*
entries, which the kernel masks: what a band cuts, and ragged tails. An entry is a strided run, never a row: 36 bytes, whatever its
length. Only where a pattern lists single rows do entries point into a table of rows. Jobs are sorted longest first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from longattn.kernels.lowering.head_classes import HeadClass
from longattn.kernels.triton.row_classes import FAR, RowClass, RowRuns, row_classes
from longattn.patterncache.spans import Rows

JOB_FIELDS = ("head", "start", "step", "count", "origin", "scale", "dense", "edge", "end", "part")
"""Columns of `jobs`: an owned block of rows; entries dense .. edge are dense, edge .. end are edges."""

ENTRY_FIELDS = ("member", "start", "step", "count", "origin", "scale", "low", "high")
"""Columns of `entries`: a run of met rows, its positions and the band in which owner's position - position must lie."""


Table = npt.NDArray[np.int32]


@dataclass(frozen=True)
class JobTables:
    """Tables of one launch.

    Attributes:
        jobs: (jobs, len(JOB_FIELDS)) int32; positions wrap, for only differences and low bits of them are read.
        entries: (entries, len(ENTRY_FIELDS)) int32.
        weights: (entries,) float32, log2 of how often its rows count.
        rows: (rows,) int32: where rows are gathered, what `start` counts from; else one unused number.
        tiles: (jobs,) int64, how many tiles each streams.
        listed: whether rows are gathered.
        packed: (numbers,) int32, of which the first four are views, as `pack` lays them out; None: they stand alone.
    """

    jobs: Table
    entries: Table
    weights: npt.NDArray[np.float32]
    rows: Table
    tiles: Rows
    listed: bool
    packed: Table | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        return self.jobs.nbytes + self.entries.nbytes + self.weights.nbytes + self.rows.nbytes


_LINE = 32
"""Numbers of 4 bytes that a table begins at a multiple of: 128 bytes."""


def packed_sizes(tables: JobTables) -> list[int]:
    """Numbers that each of jobs, entries, weights and rows takes in one array, with what fills the line up."""
    return [-(-x.size // _LINE) * _LINE for x in (tables.jobs, tables.entries, tables.weights, tables.rows)]


def pack(tables: JobTables) -> Table:
    """Jobs, entries, weights and rows one after the other, so that one copy takes them to a device."""
    sizes = packed_sizes(tables)
    packed = np.empty(sum(sizes), np.int32)
    arrays = (tables.jobs, tables.entries, tables.weights.view(np.int32), tables.rows)
    for at, x in zip(accumulate(sizes, initial=0), arrays, strict=False):
        packed[at : at + x.size] = x.reshape(-1)
    return packed


@dataclass
class _Building:
    block: tuple[int, int]
    listed: bool
    jobs: list[Rows] = field(default_factory=list)
    entries: list[Rows] = field(default_factory=list)
    weights: list[npt.NDArray[np.float64]] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    tiles: list[Rows] = field(default_factory=list)
    entry_count: int = 0
    row_count: int = 0
    # Entries and the rows that they point to are shared by all classes that meet the same.
    shared: dict[int, tuple[RowRuns, tuple[Rows, ...]]] = field(default_factory=dict)


def job_tables(
    classes: Iterable[HeadClass],
    *,
    own_keys: bool,
    unique: bool,
    listed: bool,
    block: tuple[int, int],
    parts: int = 1,
) -> JobTables:
    """Tables of one launch.

    Args:
        classes: heads that own, and the (member, branch) pairs that they share; see `row_classes`.
        own_keys, unique: as in `row_classes`. listed: whether rows are gathered.
        block: rows of a job, rows of a tile of the other side.
        parts: cut each list into so many.
    """
    building = _Building(block, listed)
    for head_class in classes:
        for row_class in row_classes(head_class.branches, own_keys=own_keys, unique=unique):
            for part in split_keys(row_class, parts, block[1]):
                _add_class(building, np.asarray(head_class.owners, np.int64), part)
    if not building.jobs:
        building.jobs, building.tiles = [np.zeros((0, len(JOB_FIELDS)), np.int64)], [np.zeros(0, np.int64)]
    jobs, tiles = np.concatenate(building.jobs), np.concatenate(building.tiles)
    order = np.lexsort((np.arange(len(jobs)), jobs[:, 0], -tiles))
    entries = np.concatenate(building.entries or [np.zeros((0, len(ENTRY_FIELDS)), np.int64)])
    weights = np.concatenate(building.weights or [np.zeros(0)]).astype(np.float32)
    rows = np.concatenate(building.rows or [np.zeros(1, np.int64)])
    jobs, entries, rows = (x.astype(np.int32) for x in (jobs[order], entries, rows))
    return JobTables(jobs, entries, weights, rows, tiles[order], listed)


def split_keys(row_class: RowClass, parts: int, tile: int) -> list[RowClass]:
    """The class with its list cut into `parts` of nearly equally many tiles; each gets one, if an empty one."""
    if parts == 1:
        return [row_class]
    met = row_class.met
    tiles_of_run = -(-met.count // tile)
    ends = np.cumsum(tiles_of_run)
    cuts = np.linspace(0, ends[-1] if len(ends) else 0, parts + 1).astype(np.int64)
    split = []
    for part in range(parts):
        low = np.clip(cuts[part] - (ends - tiles_of_run), 0, tiles_of_run) * tile
        high = np.minimum(np.clip(cuts[part + 1] - (ends - tiles_of_run), 0, tiles_of_run) * tile, met.count)
        nonempty = np.flatnonzero(high > low)
        part_runs = met.take(nonempty)
        part_runs = replace(
            part_runs, start=part_runs.start + low[nonempty] * part_runs.step, count=(high - low)[nonempty]
        )
        split.append(RowClass(row_class.owned, part_runs, part))
    return split


def _add_class(building: _Building, heads: Rows, row_class: RowClass) -> None:
    """Jobs of one class for all heads that share it."""
    owned, size = row_class.owned, building.block[0]
    total = len(owned) if building.listed else int(owned.count[0])
    first = np.arange(0, total, size, dtype=np.int64)
    count = np.minimum(size, total - first)
    if building.listed:
        start, step = first + building.row_count, 1
        building.rows.append(owned.start)
        building.row_count += len(owned)
    else:
        start, step = owned.start[0] + first * owned.step[0], int(owned.step[0])
    origin, scale = int(owned.origin[0]), int(owned.scale[0])
    if building.listed or not row_class.met.banded:
        dense, edge, end, tiles = _entries_for_all(building, row_class.met)
    else:
        nearest = origin + scale * start
        dense, edge, end, tiles = _entries_by_block(
            building, row_class.met, nearest, nearest + scale * step * (count - 1)
        )
    columns = (start, step, count, origin, scale, dense, edge, end, row_class.part)
    block = np.stack([np.broadcast_to(c, first.shape) for c in columns], 1)
    building.jobs.append(np.concatenate([np.insert(block, 0, head, axis=1) for head in heads]))
    building.tiles.append(np.tile(np.broadcast_to(tiles, first.shape), len(heads)))


def _entries_for_all(building: _Building, met: RowRuns) -> tuple[Rows, ...]:
    """One list for every block of a class: nothing is banded, or rows are gathered and the kernel masks by position."""
    shared = building.shared.get(id(met))
    if shared is None:
        runs = _gathered_runs(building, met) if building.listed else met
        # A gathered run whose rows a band may hide has no dense part.
        inner_end = np.where((runs.low > -FAR) | (runs.high < FAR), 0, runs.count)
        zero = np.zeros_like(inner_end)
        # `met` is held, so that its id stays its own.
        shared = building.shared[id(met)] = met, _append(building, runs, (zero, zero, inner_end, runs.count))
    return shared[1]


def _gathered_runs(building: _Building, met: RowRuns) -> RowRuns:
    """Rows of `met` in the table of rows, one run per way of counting them."""
    ways = np.stack([met.member, met.origin, met.scale, met.low, met.high, met.times])
    parts = []
    for way in np.unique(ways, axis=1).T if len(met) else []:
        runs = met.take(np.flatnonzero((ways == way[:, None]).all(0)))
        rows = np.concatenate(
            [s + np.arange(n) * step for s, n, step in zip(runs.start, runs.count, runs.step, strict=True)]
        )
        building.rows.append(rows)
        first_run = runs.take(slice(0, 1))
        parts.append(
            replace(first_run, start=np.array([building.row_count]), step=np.array([1]), count=np.array([len(rows)]))
        )
        building.row_count += len(rows)
    if not parts:
        return met
    return RowRuns(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])})


def _entries_by_block(building: _Building, met: RowRuns, nearest: Rows, farthest: Rows) -> tuple[Rows, ...]:
    """A list for each block, whose positions go from `nearest` to `farthest`: which members of each run the band shows, and shows all."""
    first, step = met.origin + met.scale * met.start, met.scale * met.step
    p, last = nearest[:, None], farthest[:, None]
    begin = np.clip(-((met.high - p + first) // step), 0, met.count)
    end = np.clip((last - met.low - first) // step + 1, begin, met.count)
    full_begin = np.clip(-((met.high - last + first) // step), begin, end)
    full_end = np.clip((p - met.low - first) // step + 1, full_begin, end)
    return _append(building, met, (begin, full_begin, full_end, end))


def _append(building: _Building, met: RowRuns, bounds: tuple[Rows, Rows, Rows, Rows]) -> tuple[Rows, ...]:
    """Append the entries of (blocks, runs) bounds; (dense, edge, end, tiles) of each block."""
    begin, full_begin, full_end, end = (np.atleast_2d(b) for b in bounds)
    tile = building.block[1]
    num_dense = (full_end - full_begin) // tile * tile
    # Without a whole tile inside, one edge entry does.
    left_end = np.where(num_dense > 0, full_begin, end)
    kinds = (
        (full_begin, num_dense),
        (begin, left_end - begin),
        (left_end + num_dense, np.where(num_dense > 0, end - left_end - num_dense, 0)),
    )
    at, count = (np.stack([np.broadcast_to(kind[i], end.shape) for kind in kinds], 1) for i in (0, 1))
    block, kind, run = np.nonzero(count > 0)
    picked = met.take(run)
    pieces = replace(picked, start=picked.start + at[block, kind, run] * picked.step, count=count[block, kind, run])
    building.entries.append(np.stack([getattr(pieces, name) for name in ENTRY_FIELDS], 1))
    building.weights.append(np.log2(pieces.times))
    per_kind = (count > 0).sum(2)
    stop = building.entry_count + np.cumsum(per_kind.sum(1))
    building.entry_count += len(run)
    dense = stop - per_kind.sum(1)
    return dense, dense + per_kind[:, 0], stop, (-(-count // tile)).sum((1, 2))
