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
    token = _token_of(plan, branches, tile, members)
    return None if token is None else _filled(_layout(token.shapes, tile, parts), [token])[0]


def tables_of_tokens(plans: Sequence[Plan], tile: int, members: int, parts: int) -> list[JobTables | None]:
    """`decode_tables` of several plans, all branches of each: those of one layout are worked out together."""
    tokens = [_token_of(plan, plan.branches, tile, members) for plan in plans]
    alike: dict[object, list[int]] = {}
    for at, token in enumerate(tokens):
        alike.setdefault(None if token is None else token.shapes, []).append(at)
    tables: list[JobTables | None] = [None] * len(plans)
    for numbers in alike.values():
        same = [token for token in (tokens[at] for at in numbers) if token is not None]
        for at, filled in zip(
            numbers, _filled(_layout(same[0].shapes, tile, parts), same) if same else (), strict=False
        ):
            tables[at] = filled
    return tables


class _Token(NamedTuple):
    """What one query a head is told beside a layout.

    Attributes:
        shapes: of each class its owners, and (whole tiles, whether there is a tail) of its runs. positions: of each class, (origin, scale) of its query.
        runs: of all classes; the count is that of the tail, whole tiles have theirs in the layout.
    """

    shapes: tuple[tuple[Sequence[int], tuple[tuple[int, bool], ...]], ...]
    positions: list[tuple[int, int]]
    runs: list[Run]


def _token_of(plan: Plan, branches: tuple[Branch, ...], tile: int, members: int) -> _Token | None:
    if not is_single(plan, branches) or not branches or any(not _is_run(branch.k) for branch in branches):
        return None
    runs: list[Run] = []
    shapes: list[tuple[Sequence[int], tuple[tuple[int, bool], ...]]] = []
    positions: list[tuple[int, int]] = []
    for owners, served in classes_of(plan.rectangle.shape[0], branches, members):
        own = [run for number in served for run in _seen(branches[number], branches[number].k)]
        runs += [(start, step, count % tile, origin, scale) for start, step, count, origin, scale in own]
        shapes.append((owners, tuple((run[2] // tile, run[2] % tile > 0) for run in own)))
        positions.append(branches[served[0]].q_at)
    return _Token(tuple(shapes), positions, runs)


def _filled(layout: _Layout, tokens: list[_Token]) -> list[JobTables]:
    """The tables of tokens of one layout."""
    packed = np.repeat(layout.packed[None], len(tokens), 0)
    shape = (len(tokens), layout.jobs, len(JOB_FIELDS))
    jobs = packed[:, : layout.jobs * len(JOB_FIELDS)].reshape(shape)
    shape = (len(tokens), layout.entries, len(ENTRY_FIELDS))
    entries = packed[:, layout.entries_at : layout.entries_at + layout.entries * len(ENTRY_FIELDS)].reshape(shape)
    own, met = (np.array([each[at] for each in tokens], np.int64).astype(np.int32) for at in (1, 2))
    jobs[:, :, 4:6] = own if own.shape[1] == 1 else own[:, layout.owner]
    if layout.entries:
        entries[:, :, 1:6] = met if met.shape[1] == 1 else met[:, layout.run]
        entries[:, :, 1] += layout.first * entries[:, :, 2]
        entries[:, layout.whole, 3] = layout.counts
    weights = packed[:, layout.weights_at : layout.weights_at + layout.entries].view(np.float32)
    return [
        JobTables(jobs[at], entries[at], weights[at], _NO_ROWS, layout.tiles, False, packed[at])
        for at in range(len(tokens))
    ]


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
    pieces: list[tuple[Rows, ...]] = []  # run, first member, members of whole tiles, whether a tail
    jobs: list[Table] = [np.zeros((0, len(JOB_FIELDS)), np.int32)]
    tiles: list[int] = []
    owner: list[int] = []
    begun = count = 0
    for number, (owners, runs) in enumerate(shapes):
        own, cut = _cut(runs, tile, parts)
        pieces.append((cut[0] + begun, *cut[1:]))
        block = np.tile(own, (len(owners), 1))
        block[:, 6:9] += count
        block[:, 0] = np.repeat(np.array(owners, np.int32), parts)
        jobs.append(block)
        total = sum(whole + tail for whole, tail in runs)
        tiles += [-(-total // parts)] * (len(owners) * parts)
        owner += [number] * (len(owners) * parts)
        begun, count = begun + len(runs), count + len(cut[0])
    run, first, members, tail = (np.concatenate(column) for column in zip(*pieces, strict=True))
    entries = np.zeros((count, len(ENTRY_FIELDS)), np.int32)
    entries[:, 6], entries[:, 7] = -FAR, FAR
    whole = np.flatnonzero(tail == 0)
    table = np.concatenate(jobs)
    streamed = np.array(tiles, np.int64)
    tables = JobTables(table, entries, np.zeros(count, np.float32), _NO_ROWS, streamed, False)
    sizes = packed_sizes(tables)
    return _Layout(
        pack(tables), len(table), count, sizes[0], sizes[0] + sizes[1], streamed, np.array(owner, np.int64), run,
        first.astype(np.int32), whole, members[whole].astype(np.int32),
    )  # fmt: skip


def is_single(plan: Plan, branches: tuple[Branch, ...]) -> bool:
    """Whether a plan has one query, which each of the branches names once."""
    return plan.rectangle.shape[1] == 1 and all(_is_run(branch.q) and branch.q.count == 1 for branch in branches)


def _is_run(index: Index) -> bool:
    return isinstance(index, Affine) and index.tiles == 1


def sees_all_heads(plan: Plan) -> bool:
    """Whether every head has a branch."""
    heads = plan.rectangle.shape[0]
    return sum(len(owners) for owners, _ in classes_of(heads, plan.branches, 1)) == heads


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


@lru_cache(maxsize=1024)
def _cut(runs: tuple[tuple[int, bool], ...], tile: int, parts: int) -> tuple[Table, tuple[Rows, Rows, Rows, Rows]]:
    """(parts, len(JOB_FIELDS)) jobs over the tiles of all runs in equal parts, and their pieces: of each part whole tiles first, then tails."""
    whole, tail = np.array(runs, np.int64).reshape(-1, 2).T
    begin = np.cumsum(whole + tail) - whole - tail
    bounds = int((whole + tail).sum()) * np.arange(parts + 1) // parts
    # Of each part and run.
    low, high = bounds[:-1, None] - begin, bounds[1:, None] - begin
    first, last = np.maximum(low, 0), np.minimum(high, whole)
    shown = np.stack([first < last, (tail > 0) & (low <= whole) & (whole < high)], 1)
    part, kind, run = np.nonzero(shown)
    at = np.where(kind == 0, first[part, run], whole[run]) * tile
    members = np.where(kind == 0, (last - first)[part, run] * tile, 0)
    dense, tails = shown.sum(2).T
    end = np.cumsum(dense + tails)
    jobs = np.zeros((parts, len(JOB_FIELDS)), np.int32)
    jobs[:, 2:4] = 1
    jobs[:, 6:] = np.stack([end - dense - tails, end - tails, end, np.arange(parts)], 1)
    return jobs, (run, at, members, kind)
