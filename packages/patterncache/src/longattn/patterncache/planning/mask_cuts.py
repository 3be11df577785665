"""A branch cut by a matrix of blocks: at block borders, pair of runs by pair of runs; or row by row where it is not made of runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from longattn.patterncache.indices import Listed
from longattn.patterncache.plan import Branch
from longattn.patterncache.planning.block_runs import Runs, cut_runs, made_of_runs, regroup
from longattn.patterncache.planning.limits import CUT_AGAIN, add_pairs
from longattn.patterncache.planning.listing import listed_part
from longattn.patterncache.spans import Rows

Mask = npt.NDArray[np.bool_]

_GATHERED_CELLS = 1 << 18
"""Mask cells of small tiles that are looked up in one go."""


def cut_by_mask(branch: Branch, mask: Mask, block_size: int) -> Iterator[Branch]:
    """The pairs of `branch`, within its band, whose blocks (position // block_size) the mask shows."""
    if not made_of_runs(branch, branch.band):
        yield from listed_part(branch, _Lookup(mask, block_size))
        return
    q, k = (cut_runs(index, at, block_size) for index, at in ((branch.q, branch.q_at), (branch.k, branch.k_at)))
    cost = CUT_AGAIN if isinstance(branch.k, Listed) else 1
    yield from regroup(branch, q[0], k[0], _allowed_pairs(mask, q, k, cost), branch.band)


@dataclass(frozen=True)
class _Lookup:
    """Whether a mask shows pairs of positions."""

    mask: Mask
    block_size: int

    def __call__(self, i: Rows, j: Rows) -> Mask:
        return self.mask[i // self.block_size, j // self.block_size]


def _allowed_pairs(mask: Mask, q_side: tuple[Runs, Rows], k_side: tuple[Runs, Rows], cost: int) -> tuple[Rows, Rows]:
    """(query runs, key runs) of one tile each whose blocks the mask lets see; the pairs of a query run stand together.

    Each pair counts as `cost` pairs of rows towards the limit of a plan.
    """
    (q, q_block), (k, k_block) = q_side, k_side
    tiles = np.arange(int(q.tile[-1]) + 2)
    q_begin, k_begin = np.searchsorted(q.tile, tiles), np.searchsorted(k.tile, tiles)
    shapes = np.stack([np.diff(q_begin), np.diff(k_begin)], 1)
    add_pairs(cost * int(shapes.prod(axis=1).sum()))
    allowed: list[tuple[Rows, Rows]] = []
    for nq, nk in np.unique(shapes, axis=0).tolist():
        alike = np.flatnonzero((shapes == (nq, nk)).all(axis=1))
        at_once = max(1, _GATHERED_CELLS // (nq * nk))
        for first in range(0, len(alike), at_once):
            some = alike[first : first + at_once]
            q_of = _ranges(q_begin[some], nq)
            k_of = _ranges(k_begin[some], nk)
            shown = _gather(mask, q_block[q_of], k_block[k_of])
            flat = np.flatnonzero(shown)
            rows = np.arange(len(some) * nq + 1, dtype=np.int64)
            row = np.repeat(rows[:-1], np.diff(np.searchsorted(flat, rows * nk)))  # pyright: ignore[reportUnknownArgumentType]
            allowed.append((q_of.ravel()[row], k_of[row // nq, flat - row * nk]))
    return np.concatenate([a for a, _ in allowed]), np.concatenate([b for _, b in allowed])


def _ranges(begin: Rows, count: int) -> Rows:
    """(ranges, count) int64: `count` numbers from each beginning on."""
    return begin[:, None] + np.arange(count, dtype=np.int64)


def _gather(mask: Mask, a: Rows, b: Rows) -> Mask:
    """mask[a, b] for blocks a (tiles, queries) and b (tiles, keys), as (tiles, queries, keys)."""
    if len(a) == 1:
        (a0, a1), (b0, b1) = ((int(x[0, 0]), int(x[0, -1]) + 1) for x in (a, b))
        if (np.diff(a) == 1).all() and (np.diff(b) == 1).all():
            return mask[a0:a1, b0:b1][None]
    return mask[a[:, :, None], b[:, None, :]]
