"""Job tables of one query a head: what a decoding model needs anew for each token, worked out with a few numbers for each branch.

A band cuts the keys of a single query at both ends, so every entry is whole and nothing is left for the kernel to mask. The result equals
that of `job_tables`, which is made for blocks of queries, but for the order of jobs and for edges that are dense here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from longattn.kernels.triton.joblist import ENTRY_FIELDS, JOB_FIELDS, JobTables, Table, pack, packed_sizes
from longattn.kernels.triton.row_classes import FAR
from longattn.patterncache import Branch, Plan
from longattn.patterncache.indices import Affine, Index
from longattn.patterncache.spans import Rows

Run = tuple[int, int, int, int, int]
"""Keys that the query sees: first row, step, count, and position = origin + scale * row."""


def decode_tables(plan: Plan, branches: tuple[Branch, ...], tile: int, members: int, parts: int) -> JobTables | None:
    """Tables of one query for each head; None where there are more, or rows are listed.

    Args:
        tile: keys of a tile. members: query heads of an owner, which the same branches serve. parts: cut the list of each job into so many.
    """
    if not is_single(plan, branches) or not branches or any(not _is_run(branch.k) for branch in branches):
        return None
    # Of each run the last count is that of its tail: whole tiles have theirs in the layout.
    runs: list[Run] = []
    shapes: list[tuple[Sequence[int], tuple[tuple[int, bool], ...]]] = []
    positions: list[tuple[int, int]] = []
    for owners, served in classes_of(plan.rectangle.shape[0], branches, members):
        own = [run for number in served for run in _seen(branches[number], branches[number].k)]
        runs += [(start, step, count % tile, origin, scale) for start, step, count, origin, scale in own]
        shapes.append((owners, tuple((run[2] // tile, run[2] % tile > 0) for run in own)))
        positions.append(branches[served[0]].q_at)
    layout = _layout(tuple(shapes), tile, parts)
    packed = layout.packed.copy()
    jobs = packed[: layout.jobs * len(JOB_FIELDS)].reshape(-1, len(JOB_FIELDS))
    entries = packed[layout.entries_at : layout.weights_at][: layout.entries * len(ENTRY_FIELDS)]
    entries = entries.reshape(-1, len(ENTRY_FIELDS))
    own, met = np.array(positions, np.int64), np.array(runs, np.int64).reshape(-1, 5)
    jobs[:, 4:6] = own if len(own) == 1 else own[layout.owner]
    entries[:, 1:6] = met if len(met) == 1 else met[layout.run]
    entries[:, 1] += layout.first * entries[:, 2]
    entries[layout.whole, 3] = layout.counts
    weights = packed[layout.weights_at : layout.weights_at + layout.entries].view(np.float32)
    return JobTables(jobs, entries, weights, _NO_ROWS, layout.tiles, False, packed)


_NO_ROWS = np.zeros(1, np.int32)


class _Layout(NamedTuple):
    """What tables of runs that have equally many tiles share: a cache that grows has the same for as many tokens as a tile has keys.

    Attributes:
        packed: the tables, as `pack` lays them out, without positions, first rows, steps and the lengths of tails. jobs, entries: how many.
        entries_at, weights_at: where those begin. tiles: as in `JobTables`. owner: the number of each job's class.
        run: of each entry. first: the member of its run that it begins at. whole: the entries of whole tiles. counts: the rows of those.
    """

    packed: Table
    jobs: int
    entries: int
    entries_at: int
    weights_at: int
    tiles: Rows
    owner: Rows
    run: Rows
    first: Table
    whole: Rows
    counts: Table


@lru_cache(maxsize=1024)
def _layout(shapes: tuple[tuple[Sequence[int], tuple[tuple[int, bool], ...]], ...], tile: int, parts: int) -> _Layout:
    """The layout of classes of owners, each with (whole tiles, whether there is a tail) of its runs."""
    pieces: list[tuple[int, int, int, bool]] = []  # run, first member, members, whether a tail
    jobs: list[Table] = [np.zeros((0, len(JOB_FIELDS)), np.int32)]
    tiles: list[int] = []
    owner: list[int] = []
    begun = 0
    for number, (owners, runs) in enumerate(shapes):
        total = sum(whole + tail for whole, tail in runs)
        own: list[tuple[int, ...]] = []
        for part in range(parts):
            dense, tails = _cut(runs, begun, tile, total * part // parts, total * (part + 1) // parts)
            first = len(pieces)
            pieces += dense
            pieces += tails
            own.append((0, 0, 1, 1, 0, 0, first, first + len(dense), len(pieces), part))
        block = np.tile(np.array(own, np.int32), (len(owners), 1))
        block[:, 0] = np.repeat(np.array(owners, np.int32), parts)
        jobs.append(block)
        tiles += [-(-total // parts)] * (len(owners) * parts)
        owner += [number] * (len(owners) * parts)
        begun += len(runs)
    run, first, count, tail = np.array(pieces, np.int64).reshape(-1, 4).T
    entries = np.zeros((len(pieces), len(ENTRY_FIELDS)), np.int32)
    entries[:, 6], entries[:, 7] = -FAR, FAR
    whole = np.flatnonzero(tail == 0)
    table = np.concatenate(jobs)
    streamed = np.array(tiles, np.int64)
    tables = JobTables(table, entries, np.zeros(len(pieces), np.float32), _NO_ROWS, streamed, False)
    sizes = packed_sizes(tables)
    return _Layout(
        pack(tables), len(table), len(pieces), sizes[0], sizes[0] + sizes[1], streamed, np.array(owner, np.int64), run,
        first.astype(np.int32), whole, count[whole].astype(np.int32),
    )  # fmt: skip


def is_single(plan: Plan, branches: tuple[Branch, ...]) -> bool:
    """Whether a plan has one query, which each of the branches names once."""
    return plan.rectangle.shape[1] == 1 and all(_is_run(branch.q) and branch.q.count == 1 for branch in branches)


def _is_run(index: Index) -> bool:
    return isinstance(index, Affine) and index.tiles == 1


def classes_of(heads: int, branches: tuple[Branch, ...], members: int) -> Sequence[tuple[Sequence[int], Sequence[int]]]:
    """Owners, and the numbers of the branches that serve their first heads."""
    return _classes(heads, tuple(branch.heads.numbers for branch in branches), members)


@lru_cache(maxsize=1024)
def _classes(
    heads: int, served: tuple[tuple[int, int, int], ...], members: int
) -> Sequence[tuple[Sequence[int], Sequence[int]]]:
    alike: dict[tuple[int, ...], list[int]] = {}
    rows = [range(start, start + length * step, step) for start, length, step in served]
    for owner in range(heads // members):
        own = tuple(number for number, heads_served in enumerate(rows) if owner * members in heads_served)
        alike.setdefault(own, []).append(owner)
    return [(tuple(owners), numbers) for numbers, owners in alike.items() if numbers]


def _seen(branch: Branch, keys: Index) -> list[Run]:
    """The keys of a branch that its band shows the query."""
    assert isinstance(keys, Affine)
    origin, scale = branch.k_at
    begin, end, band = 0, keys.count, branch.band
    if band is not None:
        query, first, step = branch.q_at[0], origin + scale * keys.start, scale * keys.step
        if band.high is not None:
            begin = min(max(-((band.high - query + first) // step), 0), keys.count)
        if band.low is not None:
            end = min(max((query - band.low - first) // step + 1, begin), keys.count)
    return [(keys.start + begin * keys.step, keys.step, end - begin, origin, scale)] if end > begin else []


def _cut(
    runs: tuple[tuple[int, bool], ...], number: int, tile: int, low: int, high: int
) -> tuple[list[tuple[int, int, int, bool]], list[tuple[int, int, int, bool]]]:
    """Whole tiles, and tails, of tiles low .. high of all runs; runs are counted from `number`."""
    dense: list[tuple[int, int, int, bool]] = []
    tails: list[tuple[int, int, int, bool]] = []
    for at, (whole, tail) in enumerate(runs, number):
        if high <= 0:
            break
        first, last = max(low, 0), min(high, whole)
        if first < last:
            dense.append((at, first * tile, (last - first) * tile, False))
        if tail and low <= whole < high:
            tails.append((at, whole * tile, 0, True))
        low, high = low - whole - tail, high - whole - tail
    return dense, tails
