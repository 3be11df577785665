"""The listed form: rows named one by one. It is exact for every pattern, and strided for none.

Query rows that see the same keys share a tile; a key that counts twice is listed twice. Built strip by strip, so that a long
rectangle never stands in memory as a dense matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod

import numpy as np
import numpy.typing as npt

from longattn.patterncache.indices import Listed
from longattn.patterncache.plan import Branch, Counts
from longattn.patterncache.planning.intervals import Sides, span_pairs
from longattn.patterncache.planning.limits import add_pairs
from longattn.patterncache.spans import Rectangle, Rows, Span

_DENSE_CELLS = 1 << 24
"""Cells of the dense count matrix that may stand at once while listing."""


def listed_branches(counts: Callable[[Rectangle], Counts], rectangle: Rectangle) -> Iterator[Branch]:
    """Branches that list, for every query row, the key rows it sees, with repetition; per pair of spans, as positions differ."""
    # All of them at once, so that an error about too many comes before any work and names the whole.
    add_pairs(prod(rectangle.shape))
    if rectangle.heads.length:
        for sides in span_pairs(rectangle):
            yield from _listed_spans(counts, rectangle, sides)


def _listed_spans(counts: Callable[[Rectangle], Counts], rectangle: Rectangle, sides: Sides) -> Iterator[Branch]:
    (q, q_row), (k, k_row) = sides
    tiles: dict[tuple[Span, int, int], list[tuple[Rows, Rows]]] = {}
    strip = max(1, _DENSE_CELLS // (rectangle.heads.length * k.length))
    for first in range(0, q.length, strip):
        part = q.take(first, min(strip, q.length - first))
        matrix = counts(replace(rectangle, queries=(part,), keys=(k,)))
        for group in _equal_heads(matrix):
            for rows, keys in _equal_rows(matrix[group.start]):
                tiles.setdefault((group, len(rows), len(keys)), []).append((rows + first + q_row, keys + k_row))
    q_at, k_at = (q.start - q_row * q.step, q.step), (k.start - k_row * k.step, k.step)
    for (group, _, _), members in tiles.items():
        q_rows, k_rows = (Listed(np.stack(rows), 1, 1) for rows in zip(*members, strict=True))
        yield Branch(group, q_rows, k_rows, q_at, k_at)


def listed_part(branch: Branch, shown: Callable[[Rows, Rows], npt.NDArray[np.bool_]]) -> Iterator[Branch]:
    """The pairs of `branch` that `shown` keeps, listed row by row, tile by tile.

    `shown` gets query positions (queries, 1) and key positions (1, keys) of a tile, and returns (queries, keys) bool.
    """
    add_pairs(branch.q.tiles * branch.q.count * branch.k.count)
    visible = branch.visible
    tiles: dict[tuple[int, int], list[tuple[Rows, Rows]]] = {}
    for t, (q, k, i, j) in enumerate(zip(branch.q.rows(), branch.k.rows(), *branch.positions(), strict=True)):
        visible_here = shown(i[:, None], j[None])
        if visible is not None:
            visible_here = visible_here & visible[t if len(visible) > 1 else 0]
        for a, b in _equal_rows(visible_here.astype(np.int64)):
            tiles.setdefault((len(a), len(b)), []).append((q[a], k[b]))
    for members in tiles.values():
        q_rows, k_rows = (Listed(np.stack(rows), 1, 1) for rows in zip(*members, strict=True))
        yield replace(branch, q=q_rows, k=k_rows, band=None)


def _equal_heads(matrix: Counts) -> list[Span]:
    """Runs of neighbouring heads with the same counts."""
    groups: list[Span] = []
    begin = 0
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
