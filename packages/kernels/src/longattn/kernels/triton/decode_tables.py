"""Job tables of one query a head: what a decoding model needs anew for each token, worked out with a few numbers for each branch.

A band cuts the keys of a single query at both ends, so every entry is whole and nothing is left for the kernel to mask. The result equals
that of `job_tables`, which is made for blocks of queries, but for the order of jobs and for edges that are dense here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longattn.kernels.lowering.head_classes import head_classes
from longattn.kernels.triton.joblist import ENTRY_FIELDS, JOB_FIELDS, JobTables, Table
from longattn.kernels.triton.row_classes import FAR
from longattn.patterncache import Branch, Plan
from longattn.patterncache.indices import Affine, Index

Run = tuple[int, int, int, int, int]
"""Keys that the query sees: first row, step, count, and position = origin + scale * row."""


def decode_tables(plan: Plan, branches: tuple[Branch, ...], tile: int, members: int, parts: int) -> JobTables | None:
    """Tables of one query for each head; None where there are more, or rows are listed.

    Args:
        tile: keys of a tile. members: query heads of an owner, which the same branches serve. parts: cut the list of each job into so many.
    """
    heads, queries, _ = plan.rectangle.shape
    if queries != 1 or not branches or not all(_is_single(branch) for branch in branches):
        return None
    entries: list[tuple[int, ...]] = []
    jobs: list[Table] = []
    tiles: list[int] = []
    for owners, served in _classes(heads, branches, members):
        runs = [run for branch in served for run in _seen(branch, branch.k)]
        total = sum(-(-count // tile) for _, _, count, _, _ in runs)
        origin, scale = served[0].q_at
        own: list[tuple[int, ...]] = []
        for part in range(parts):
            dense, edges = _cut(runs, tile, total * part // parts, total * (part + 1) // parts)
            first = len(entries)
            entries += dense
            entries += edges
            own.append((0, 0, 1, 1, origin, scale, first, first + len(dense), len(entries), part))
        block = np.empty((len(owners), parts, len(JOB_FIELDS)), np.int32)
        block[:] = np.array(own, np.int64)
        block[:, :, 0] = np.array(owners)[:, None]
        jobs.append(block.reshape(-1, len(JOB_FIELDS)))
        tiles += [-(-total // parts)] * (len(owners) * parts)
    table = np.array(entries, np.int64).astype(np.int32).reshape(-1, len(ENTRY_FIELDS))
    all_jobs = jobs[0] if len(jobs) == 1 else np.concatenate(jobs)
    return JobTables(all_jobs, table, np.zeros(len(table), np.float32), _NO_ROWS, np.array(tiles), False)


_NO_ROWS = np.zeros(1, np.int32)


def _is_single(branch: Branch) -> bool:
    q, k = branch.q, branch.k
    return isinstance(q, Affine) and isinstance(k, Affine) and q.tiles == q.count == k.tiles == 1


def _classes(heads: int, branches: tuple[Branch, ...], members: int) -> list[tuple[Sequence[int], Sequence[Branch]]]:
    """Owners, and the branches that serve them."""
    if all(branch.heads.length == heads for branch in branches):
        return [(range(heads // members), branches)]
    classes = head_classes(heads, branches, members)
    return [(alike.owners, [branch for member, branch in alike.branches if member == 0]) for alike in classes]


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


def _cut(runs: list[Run], tile: int, low: int, high: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Whole tiles, and what is left of runs, of tiles low .. high of all runs."""
    dense: list[tuple[int, ...]] = []
    edges: list[tuple[int, ...]] = []
    for start, step, count, origin, scale in runs:
        tiles = -(-count // tile)
        first, last = max(low, 0) * tile, min(min(high, tiles) * tile, count)
        low, high = low - tiles, high - tiles
        whole = (last - first) // tile * tile
        if last <= first:
            continue
        if whole:
            dense.append((0, start + first * step, step, whole, origin, scale, -FAR, FAR))
        if last - first > whole:
            edges.append((0, start + (first + whole) * step, step, last - first - whole, origin, scale, -FAR, FAR))
    return dense, edges
