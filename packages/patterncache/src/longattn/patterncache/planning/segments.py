"""From one dilated branch to tiles: one per segment, gathered into branches of equal tiles."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from longattn.patterncache.indices import Affine, index_of
from longattn.patterncache.plan import Band, Branch
from longattn.patterncache.planning.residue_cuts import Residue
from longattn.patterncache.spans import Rows, Span, congruent_indices

Side = tuple[Span, int]
"""Positions of one side of a rectangle, and the row at which they begin."""


def segment_branches(heads: Span, residue: Residue, q_side: Side, k_side: Side) -> Iterator[Branch]:
    """The segments of a residue, for heads that have its offset, over one pair of spans."""
    s, r, offset = residue.size, residue.rate, residue.offset
    (q, q_row), (k, k_row) = q_side, k_side
    tiles = q.length // s if _is_regular(residue, q, k) else 0
    if tiles:
        # The usual case needs no arrays: whole segments, all alike. What is left of a short last one is below.
        yield _whole_segments(heads, residue, tiles, q_side, k_side)
        left = q.take(tiles * s, q.length - tiles * s)
        if left.length:
            yield from segment_branches(heads, residue, (left, q_row + tiles * s), (left, k_row + tiles * s))
        return
    low = np.arange(max(q.start, k.start) // s, min(q.last, k.last) // s + 1, dtype=np.int64) * s
    # Where r does not divide s the residue of a segment's members moves from segment to segment.
    first = low + offset
    q_rate = r if residue.both else 1
    q_first, q_count, q_step = congruent_indices(q, low, low + s, first, q_rate)
    k_first, k_count, k_step = congruent_indices(k, low, low + s, first, r)
    q_begin, k_begin = q.start + q.step * q_first, k.start + k.step * k_first
    shown = (q_count > 0) & (k_count > 0)
    nearest = q_begin - (k_begin + (k_count - 1) * k_step * k.step)
    farthest = q_begin + (q_count - 1) * q_step * q.step - k_begin
    banded = np.zeros(len(low), bool)
    if residue.causal:
        shown &= farthest >= 0
        banded = nearest < 0
    # Tiles of one branch share their size and, where a band cuts them, their geometry.
    kind = np.stack([q_count, k_count, banded, np.where(banded, q_begin - k_begin, 0)])
    q_at, k_at = (q.start - q_row * q.step, q.step), (k.start - k_row * k.step, k.step)
    for members in _equal_columns(kind, np.flatnonzero(shown)):
        at = members[0]
        yield Branch(
            heads,
            index_of(q_first[members] + q_row, int(q_count[at]), q_step),
            index_of(k_first[members] + k_row, int(k_count[at]), k_step),
            q_at,
            k_at,
            Band(0, None) if banded[at] else None,
        )


def _is_regular(residue: Residue, q: Span, k: Span) -> bool:
    """Whether tiles follow from figures alone: the same contiguous positions, from a border on, the same residues in each segment."""
    s, r = residue.size, residue.rate
    return q == k and q.step == 1 and q.start % s == 0 and s % r == 0 and residue.both


def _whole_segments(heads: Span, residue: Residue, tiles: int, q_side: Side, k_side: Side) -> Branch:
    s, r = residue.size, residue.rate
    q, k = (Affine(row + residue.offset, tiles, s if tiles > 1 else 0, s // r, r) for _, row in (q_side, k_side))
    q_at, k_at = ((span.start - row, 1) for span, row in (q_side, k_side))
    return Branch(heads, q, k, q_at, k_at, Band(0, None) if residue.causal and s > r else None)


def _equal_columns(kind: Rows, members: Rows) -> Iterator[Rows]:
    """Groups of `members` whose columns of `kind` are equal; the usual case, all alike but the last, costs one comparison."""
    while len(members):
        alike = (kind[:, members] == kind[:, members[:1]]).all(axis=0)
        yield members[alike]
        members = members[~alike]
