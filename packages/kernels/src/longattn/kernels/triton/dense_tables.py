"""Job tables of the kernel for dense tiles, and what is left of a launch for the kernel that masks.

Of each job's list the dense entries become tiles of `BLOCK_N` rows, a modulus apart, that a descriptor of (rows / modulus, modulus) addresses:
(first, phase) is rows (first + i) * modulus + phase. The modulus is one for a job: the least that all its entries' steps divide; an entry of
a smaller step becomes several runs. What whole tiles leave of a run, and the edges, stay entries.
"""

from __future__ import annotations

from math import lcm
from typing import NamedTuple

import numpy as np

from longattn.kernels.triton.joblist import ENTRY_FIELDS, JobTables
from longattn.patterncache.spans import Rows

DENSE_JOB_FIELDS = ("head", "start", "step", "count", "begin", "end", "modulus", "unused")
"""Columns of a dense launch's `jobs`: an owned block of rows, its tiles begin .. end; its `entries` are (first, phase) of each tile."""

MOST_MODULUS = 256
"""Entries whose steps have no smaller common multiple stay with the kernel that masks."""


class DenseSplit(NamedTuple):
    """One launch in two.

    Attributes:
        dense: jobs of DENSE_JOB_FIELDS, entries (tiles, 2). rest: the same jobs over what is left, all of it edges; None: nothing is.
        pays: whether at least half of the streamed rows are in dense tiles.
    """

    dense: JobTables
    rest: JobTables | None
    pays: bool


def split_dense(tables: JobTables, tile: int, owned: int) -> DenseSplit:
    """The launch of these tables in two.

    Args:
        tables: not of listed rows. tile: rows of a dense tile. owned: rows of a job of the rest, which divide those of a job.
    """
    lists, list_of_job = np.unique(tables.jobs[:, 6:9], axis=0, return_inverse=True)
    runs = [_runs(tables, int(dense), int(edge), tile) for dense, edge, _ in lists]
    begin, end, tiles, weights = _shared_tiles(runs, tile)
    moduli = np.array([run.modulus for run in runs], np.int64)
    columns = (begin, end, moduli, np.zeros_like(begin))
    jobs = np.concatenate([tables.jobs[:, :4], np.stack(columns, 1)[list_of_job.ravel()]], 1).astype(np.int32)
    streamed = (end - begin)[list_of_job.ravel()]
    dense = JobTables(jobs, tiles, weights, np.zeros(1, np.int32), streamed, False)
    rest, left = _rest(tables, lists, list_of_job.ravel(), runs, owned)
    return DenseSplit(dense, rest, bool(streamed.sum() * tile >= left))


class _Runs(NamedTuple):
    """Dense entries of one list as runs of the modulus.

    Attributes:
        first, phase, tiles, weight: of each run with a whole tile. left, left_weights: entries of what is left over.
    """

    modulus: int
    first: Rows
    phase: Rows
    tiles: Rows
    weight: np.ndarray
    left: np.ndarray
    left_weights: np.ndarray


def _runs(tables: JobTables, begin: int, end: int, tile: int) -> _Runs:
    entries, weights = tables.entries[begin:end].astype(np.int64), tables.weights[begin:end]
    modulus = lcm(*entries[:, 2].tolist())
    if modulus > MOST_MODULUS:
        nothing = np.zeros(0, np.int64)
        return _Runs(1, nothing, nothing, nothing, weights[:0], entries, weights)
    pieces = modulus // entries[:, 2]
    at = np.repeat(np.arange(len(entries)), pieces)
    piece = np.arange(len(at)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = entries[at, 1] + piece * entries[at, 2]
    count = -((piece - entries[at, 3]) // pieces[at])
    tiles = count // tile
    some, over = np.flatnonzero(tiles), np.flatnonzero(count % tile)
    left = entries[at[over]]
    left[:, 1], left[:, 2], left[:, 3] = start[over] + tiles[over] * tile * modulus, modulus, count[over] % tile
    kept = start[some]
    return _Runs(
        modulus, kept // modulus, kept % modulus, tiles[some], weights[at[some]], left, weights[at[over]]
    )  # fmt: skip


def _shared_tiles(runs: list[_Runs], tile: int) -> tuple[Rows, Rows, np.ndarray, np.ndarray]:
    """(begin, end) of each list in one table of tiles, and that table with its weights.

    Lists of one run are stretches of one long list, as a causal block's is of the next one's; equal lists are one.
    """
    stretches: dict[tuple[int, ...], list[int]] = {}
    for own in runs:
        if len(own.first) == 1:
            first = int(own.first[0])
            ends = stretches.setdefault(_stretch(own, tile), [first, first])
            ends[0], ends[1] = min(ends[0], first), max(ends[1], first + int(own.tiles[0]) * tile)
    begins: dict[tuple[object, ...], int] = {}
    firsts: list[Rows] = [np.zeros(0, np.int64)]
    phases: list[Rows] = [np.zeros(0, np.int64)]
    weights: list[np.ndarray] = [np.zeros(0, np.float32)]
    total = 0
    where: list[tuple[int, int]] = []
    for own in runs:
        skipped, key, many = 0, (), int(own.tiles.sum())
        first, phase, weight, tiles = own.first, own.phase, own.weight, own.tiles
        if len(first) == 1:
            key = _stretch(own, tile)
            low, high = stretches[key]
            skipped, first, tiles = (int(own.first[0]) - low) // tile, np.array([low]), np.array([(high - low) // tile])
        else:
            key = tuple(x.tobytes() for x in (first, phase, weight, tiles))
        if key not in begins:
            begins[key] = total
            number = np.arange(int(tiles.sum())) - np.repeat(np.cumsum(tiles) - tiles, tiles)
            firsts.append(np.repeat(first, tiles) + number * tile)
            phases.append(np.repeat(phase, tiles))
            weights.append(np.repeat(weight, tiles))
            total += len(number)
        where.append((begins[key] + skipped, begins[key] + skipped + many))
    begin, end = np.array(where, np.int64).reshape(-1, 2).T
    table = np.stack([np.concatenate(firsts), np.concatenate(phases)], 1).astype(np.int32)
    return begin, end, table, np.concatenate(weights).astype(np.float32)


def _stretch(own: _Runs, tile: int) -> tuple[int, ...]:
    weight = int(own.weight.astype(np.float32).view(np.int32)[0])
    return own.modulus, int(own.phase[0]), int(own.first[0]) % tile, weight


def _rest(
    tables: JobTables, lists: np.ndarray, list_of_job: Rows, runs: list[_Runs], owned: int
) -> tuple[JobTables | None, int]:
    """The tables of what is left, in jobs of `owned` rows, and the rows that they stream."""
    entries: list[np.ndarray] = [np.zeros((0, len(ENTRY_FIELDS)), np.int32)]
    weights: list[np.ndarray] = [np.zeros(0, np.float32)]
    ends, rows = [0], []
    for (_, edge, end), own in zip(lists, runs, strict=True):
        entries += [own.left.astype(np.int32), tables.entries[edge:end]]
        weights += [own.left_weights, tables.weights[edge:end]]
        ends.append(ends[-1] + len(own.left) + int(end - edge))
        rows.append(int(own.left[:, 3].sum() + tables.entries[edge:end, 3].sum()))
    if not ends[-1]:
        return None, 0
    bounds, streamed = np.array(ends, np.int64), np.array(rows, np.int64)
    jobs = tables.jobs.astype(np.int64)
    jobs[:, 6] = jobs[:, 7] = bounds[list_of_job]
    jobs[:, 8] = bounds[list_of_job + 1]
    blocks = -(-jobs[:, 3] // owned)
    at = np.repeat(np.arange(len(jobs)), blocks)
    first = (np.arange(len(at)) - np.repeat(np.cumsum(blocks) - blocks, blocks)) * owned
    cut = jobs[at]
    cut[:, 1] += first * cut[:, 2]
    cut[:, 3] = np.minimum(owned, cut[:, 3] - first)
    rest = JobTables(
        cut.astype(np.int32), np.concatenate(entries), np.concatenate(weights), np.zeros(1, np.int32), streamed[list_of_job[at]], False
    )  # fmt: skip
    return rest, int(streamed[list_of_job].sum())
