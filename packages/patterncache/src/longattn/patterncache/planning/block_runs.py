"""Cutting branches into runs of rows, and putting the pairs that stay together again in few branches.

A tile of a branch is cut at block borders, its query runs are paired with its key runs, a filter drops pairs, and `regroup` makes
branches of what is left: one list of key runs per query run where everything is seen, one uniform branch per geometry where a band
cuts. Everything is vectorised over pairs; what is not made of runs at all is listed instead (`listed_part`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from longattn.patterncache.indices import Affine, Index, Listed, index_of
from longattn.patterncache.plan import Band, Branch
from longattn.patterncache.planning.intervals import expand, lands, query_tiles
from longattn.patterncache.planning.limits import check_runs
from longattn.patterncache.planning.listing import listed_part
from longattn.patterncache.spans import Rows


@dataclass(frozen=True)
class Runs:
    """Runs of equally spaced rows, tile by tile; four (runs,) arrays.

    Attributes:
        tile: the tile that a run belongs to.
        row, position: of its first member.
        count: its members.
    """

    tile: Rows
    row: Rows
    position: Rows
    count: Rows


def runs_of(index: Index, at: tuple[int, int]) -> Runs:
    """The runs an index is made of; `at` is (origin, step) of its positions."""
    if isinstance(index, Affine):
        row = index.start + np.arange(index.tiles, dtype=np.int64) * index.tile_step
        each, count = 1, index.count
    else:
        row = index.starts.ravel()
        each, count = index.starts.shape[1], index.run
    tile = np.repeat(np.arange(index.tiles, dtype=np.int64), each)
    return Runs(tile, row, at[0] + at[1] * row, np.full(len(row), count, np.int64))


def cut_runs(index: Index, at: tuple[int, int], size: int) -> tuple[Runs, Rows]:
    """The runs of an index cut at multiples of `size` positions, and the block (position // size) of each."""
    whole, step = runs_of(index, at), index.step * at[1]
    if step > size:
        # Neighbours are blocks apart: every row is a run of its own.
        check_runs(int(whole.count.sum()))
        owner, first = expand(whole.count)
        count = np.ones_like(first)
        block = (whole.position[owner] + first * step) // size
    else:
        low = whole.position // size
        blocks = (whole.position + (whole.count - 1) * step) // size - low + 1
        check_runs(int(blocks.sum()))
        owner, block = expand(blocks)
        block += low[owner]
        begin = whole.position[owner]
        first = np.maximum(-((begin - block * size) // step), 0)
        count = np.minimum(((block + 1) * size - 1 - begin) // step, whole.count[owner] - 1) - first + 1
    runs = Runs(whole.tile[owner], whole.row[owner] + first * index.step, whole.position[owner] + first * step, count)
    return runs, block


def made_of_runs(branch: Branch, band: Band | None) -> bool:
    """Whether pairs of runs say what `band` leaves of this branch in few branches: not where single keys would be cut one by one."""
    q_runs, k_runs = (1 if isinstance(i, Affine) else i.starts.shape[1] for i in (branch.q, branch.k))
    single_keys = k_runs > 1 and isinstance(branch.k, Listed) and branch.k.run == 1
    return q_runs == 1 and (band is None or not single_keys or branch.q.count == 1)


def regroup(branch: Branch, q: Runs, k: Runs, pairs: tuple[Rows, Rows], band: Band | None) -> Iterator[Branch]:
    """Branches, like `branch` otherwise, of pairs (query run, key run) seen through `band`.

    Args:
        branch: where the runs come from: heads, steps and positions.
        q, k: runs; a query row stands in one run only.
        pairs: two (pairs,) arrays, indices into q and k; the pairs of one query run stand together.
        band: what to see of every pair, or None: all.
    """
    q_of, k_of = pairs
    if band is not None:
        q_step, k_step = branch.steps
        offset = q.position[q_of] - k.position[k_of]
        nearest, farthest = offset - (k.count[k_of] - 1) * k_step, offset + (q.count[q_of] - 1) * q_step
        covered, missed = covered_and_missed(band, nearest, farthest)
        cut = ~covered & ~missed
        # Banded branches come first: a diagonal writes every row, so later branches merge into rows that are already written.
        yield from _banded(branch, q, k, (q_of[cut], k_of[cut]), offset[cut], band)
        q_of, k_of = q_of[covered], k_of[covered]
    branch = replace(branch, band=None)
    count = k.count[k_of]
    for width in np.unique(count) if len(count) and count.min() != count.max() else count[:1]:
        alike = slice(None) if count.min() == count.max() else count == width
        yield from _dense(branch, q, k, (q_of[alike], k_of[alike]))


def covered_and_missed(
    band: Band, nearest: Rows, farthest: Rows
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which ranges of distances, elementwise, a band shows whole, and which not at all if distances are dense."""
    covered, missed = np.ones(nearest.shape, bool), np.zeros(nearest.shape, bool)
    if band.low is not None:
        covered &= nearest >= band.low
        missed |= farthest < band.low
    if band.high is not None:
        covered &= farthest <= band.high
        missed |= nearest > band.high
    if band.low is not None and band.high is not None and band.low > band.high:
        missed[:] = True
    return covered, missed


def _dense(branch: Branch, q: Runs, k: Runs, pairs: tuple[Rows, Rows]) -> Iterator[Branch]:
    """Pairs whose key runs are equally long: per query run one list of key runs, grouped by length so that nothing is padded."""
    q_of, k_of = pairs
    begin = np.flatnonzero(np.diff(q_of, prepend=-1))
    length = np.diff(begin, append=len(q_of))
    owner = q_of[begin]
    for members in _alike(q.row[owner], length, q.count[owner]):
        listed = k_of[begin[members][:, None] + np.arange(int(length[members[0]]), dtype=np.int64)]
        yield replace(
            branch,
            q=query_tiles(q.row[owner[members]], int(q.count[owner[members[0]]]), branch.q.step),
            k=_key_runs(k.row[listed], int(k.count[listed[0, 0]]), branch.k.step),
        )


def _banded(branch: Branch, q: Runs, k: Runs, pairs: tuple[Rows, Rows], offset: Rows, band: Band) -> Iterator[Branch]:
    """Pairs that the band cuts: a uniform branch per geometry. One query run meets one key run at most at one offset."""
    q_of, k_of = pairs
    for members in _alike(q.row[q_of], q.count[q_of], k.count[k_of], offset):
        a, b = q_of[members], k_of[members]
        cut = replace(
            branch,
            q=query_tiles(q.row[a], int(q.count[a[0]]), branch.q.step),
            k=index_of(k.row[b], int(k.count[b[0]]), branch.k.step),
            band=band,
        )
        if lands(cut, band):
            yield cut


def _alike(order: Rows, *keys: Rows) -> Iterator[Rows]:
    """Indices grouped by equal keys, each group sorted by `order`."""
    if not len(order):
        return
    ranked = np.lexsort((order, *keys))
    changed = np.zeros(len(ranked) - 1, bool)
    for key in keys:
        changed |= np.diff(key[ranked]) != 0
    yield from np.split(ranked, np.flatnonzero(changed) + 1)


def _key_runs(starts: Rows, run: int, step: int) -> Index:
    """Key runs of each tile: joined to one where all follow one another."""
    # The first tile nearly always tells, and costs nothing.
    if all((np.diff(some, axis=1) == run * step).all() for some in (starts[:1], starts)):
        return index_of(starts[:, 0], starts.shape[1] * run, step)
    return Listed(starts, run, step)


def restrict_band(branch: Branch, band: Band) -> Iterator[Branch]:
    """`branch` seen through `band`: itself, or narrowed, or none, or one branch per geometry where its tiles differ."""
    tighter = band if branch.band is None else branch.band & band
    if tighter == Band():
        yield branch
        return
    if not (branch.q.tiles and branch.q.count and branch.k.count):
        return
    if branch.uniform:
        q_step, k_step = branch.steps
        nearest = branch.offset - (branch.k.count - 1) * k_step
        farthest = branch.offset + (branch.q.count - 1) * q_step
        if tighter.covers(nearest, farthest):
            yield branch if branch.band is None else replace(branch, band=None)
        elif not tighter.misses(nearest, farthest):
            narrowed = replace(branch, band=tighter)
            if lands(narrowed, tighter):
                yield narrowed
    elif made_of_runs(branch, tighter):
        q, k = runs_of(branch.q, branch.q_at), runs_of(branch.k, branch.k_at)
        each = len(k.tile) // branch.k.tiles
        pairs = np.repeat(np.arange(len(q.tile), dtype=np.int64), each), np.arange(len(k.tile), dtype=np.int64)
        yield from regroup(branch, q, k, pairs, tighter)
    else:
        yield from listed_part(branch, lambda i, j: tighter.sees(i - j))


def exclude_band(branch: Branch, band: Band) -> Iterator[Branch]:
    """`branch` without the pairs that `band` shows: what is nearer, and what is farther."""
    if band.low is not None:
        yield from restrict_band(branch, Band(None, band.low - 1))
    if band.high is not None:
        yield from restrict_band(branch, Band(band.high + 1, None))
