"""The listed form of any pattern: exact for everything, strided for nothing.

Query rows that see the same keys share a tile; a key that counts twice is listed twice. Built strip by strip, so that a long
rectangle never stands in memory as a dense matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from longattn.patterncache.index import Listed, Rectangle, Rows, Span
from longattn.patterncache.plan import Branch, Counts

_DENSE_CELLS = 1 << 24
"""Cells of the dense count matrix that may stand at once while listing."""


def listed_branches(counts: Callable[[Rectangle], Counts], rectangle: Rectangle) -> Iterator[Branch]:
    """Branches that list, for every query row, the key rows it sees, with repetition."""
    heads, queries, keys = rectangle.shape
    if not heads or not queries or not keys:
        return
    tiles: dict[tuple[Span, int, int], list[tuple[Rows, Rows]]] = {}
    for first, strip in _strips(rectangle, max(1, _DENSE_CELLS // (heads * keys))):
        matrix = counts(strip)
        for group in _equal_heads(matrix):
            for q, k in _equal_rows(matrix[group.start]):
                tiles.setdefault((group, len(q), len(k)), []).append((q + first, k))
    for (group, _, _), members in tiles.items():
        q = Listed(np.stack([m[0] for m in members]), 1, 1)
        k = Listed(np.stack([m[1] for m in members]), 1, 1)
        yield Branch(group, q, k)


def listed_part(branch: Branch, shown: Callable[[Rows, Rows], npt.NDArray[np.bool_]]) -> Iterator[Branch]:
    """The pairs of `branch` that `shown` keeps, listed row by row, tile by tile.

    `shown` gets query positions (queries, 1) and key positions (1, keys) of a tile, and returns (queries, keys) bool.
    """
    visible = branch.visible
    tiles: dict[tuple[int, int], list[tuple[Rows, Rows]]] = {}
    for t, (q, k, i, j) in enumerate(zip(branch.q.rows(), branch.k.rows(), *branch.positions(), strict=True)):
        kept = shown(i[:, None], j[None])
        if visible is not None:
            kept = kept & visible[t if len(visible) > 1 else 0]
        for a, b in _equal_rows(kept.astype(np.int64)):
            tiles.setdefault((len(a), len(b)), []).append((q[a], k[b]))
    for members in tiles.values():
        q_rows, k_rows = (Listed(np.stack(rows), 1, 1) for rows in zip(*members, strict=True))
        yield replace(branch, q=q_rows, k=k_rows, band=None)


def _strips(rectangle: Rectangle, rows: int) -> Iterator[tuple[int, Rectangle]]:
    first = 0
    for span in rectangle.queries:
        for begin in range(0, span.length, rows):
            count = min(rows, span.length - begin)
            yield first + begin, replace(rectangle, queries=(span.take(begin, count),))
        first += span.length


def _equal_heads(matrix: Counts) -> list[Span]:
    """Runs of neighbouring heads with the same counts."""
    groups, begin = [], 0
    for h in range(1, len(matrix) + 1):
        if h == len(matrix) or not np.array_equal(matrix[h], matrix[begin]):
            groups.append(Span(begin, h - begin))
            begin = h
    return groups


def _equal_rows(matrix: Counts) -> Iterator[tuple[Rows, Rows]]:
    """(query rows, key rows) for every distinct non-empty row of a (queries, keys) count matrix."""
    distinct, which = np.unique(matrix, axis=0, return_inverse=True)
    which = which.reshape(-1)
    for index, row in enumerate(distinct):
        if row.any():
            yield np.flatnonzero(which == index), np.repeat(np.arange(len(row)), row)
