"""Branches whose tiles are windows of positions: what patterns made of segments, strides and documents plan with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from longattn.patterncache.indices import Listed, index_of
from longattn.patterncache.plan import Band, Branch
from longattn.patterncache.spans import Rectangle, Rows, Span, congruent_indices


@dataclass(frozen=True)
class Windows:
    """Windows [low, high) of positions; of each, the positions equal to `residue` modulo `modulus`. Three (windows,) arrays."""

    low: Rows
    high: Rows
    residue: Rows
    modulus: int


Sides = tuple[tuple[Span, int], tuple[Span, int]]
"""((queries, their first row), (keys, their first row)): one span of either side of a rectangle."""


def span_pairs(rectangle: Rectangle) -> Iterator[Sides]:
    """Every pair of non-empty spans of a rectangle, where a plan's positions are of one form."""
    q_row = 0
    for q in rectangle.queries:
        k_row = 0
        for k in rectangle.keys:
            if q.length and k.length:
                yield (q, q_row), (k, k_row)
            k_row += k.length
        q_row += q.length


def window_branches(heads: Span, sides: Sides, queries: Windows, keys: Windows, band: Band | None) -> Iterator[Branch]:
    """Tile t: the queries of window t see its keys, within `band`. Windows of queries must not overlap.

    Tiles of one branch share their size and, where the band cuts them, their geometry.
    """
    (q, q_row), (k, k_row) = sides
    q_first, q_count, q_step = congruent_indices(q, queries.low, queries.high, queries.residue, queries.modulus)
    k_first, k_count, k_step = congruent_indices(k, keys.low, keys.high, keys.residue, keys.modulus)
    q_begin, k_begin = q.start + q.step * q_first, k.start + k.step * k_first
    shown = (q_count > 0) & (k_count > 0)
    nearest = q_begin - (k_begin + (k_count - 1) * k_step * k.step)
    farthest = q_begin + (q_count - 1) * q_step * q.step - k_begin
    cut = np.zeros(len(shown), bool)
    if band is not None:
        low = -np.inf if band.low is None else band.low
        high = np.inf if band.high is None else band.high
        shown &= (farthest >= low) & (nearest <= high)
        cut = (nearest < low) | (farthest > high)
    kind = np.stack([q_count, k_count, cut, np.where(cut, q_begin - k_begin, 0)])
    q_at, k_at = (q.start - q_row * q.step, q.step), (k.start - k_row * k.step, k.step)
    members = np.flatnonzero(shown)
    if not len(members):
        return
    which = np.unique(kind[:, members], axis=1, return_inverse=True)[1].reshape(-1)
    for some in np.split(members[np.argsort(which, kind="stable")], np.cumsum(np.bincount(which))[:-1]):
        at = some[0]
        queries_of = index_of(q_first[some] + q_row, int(q_count[at]), q_step)
        if not queries_of.distinct:
            queries_of = Listed((q_first[some] + q_row)[:, None], int(q_count[at]), q_step)
        branch = Branch(
            heads,
            queries_of,
            index_of(k_first[some] + k_row, int(k_count[at]), k_step),
            q_at,
            k_at,
            band if cut[at] else None,
        )
        if not cut[at] or branch.seeing.any():
            yield branch


def moved(branch: Branch, rows: tuple[int, int], shift: int) -> Branch:
    """`branch`, its query and key rows `rows` further on and its positions `shift` further on."""
    q, k = (
        replace(index, starts=index.starts + by)
        if isinstance(index, Listed)
        else replace(index, start=index.start + by)
        for index, by in zip((branch.q, branch.k), rows, strict=True)
    )
    q_at, k_at = (
        (origin + shift - step * by, step) for (origin, step), by in zip((branch.q_at, branch.k_at), rows, strict=True)
    )
    return replace(branch, q=q, k=k, q_at=q_at, k_at=k_at)
