"""`Dilated`: LongNet's dilated attention (Ding et al. 2023, arXiv:2307.02486, equations 3 to 8).

A branch (segment s, rate r, offset o) lets i and j see each other iff i // s == j // s and (i % s) % r == (j % s) % r == o.
Branches mix by their softmax denominators, which is: counts add.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import numpy as np

from longattn.patterncache.analysis.results import Gap
from longattn.patterncache.indices import Affine, index_of
from longattn.patterncache.pattern import Pattern, above, check_causal
from longattn.patterncache.plan import Band, Branch, Counts
from longattn.patterncache.planning.intervals import Intervals, interval_branches, moved, span_pairs
from longattn.patterncache.planning.residue_cuts import Residue, hidden_by, shown_by
from longattn.patterncache.spans import Rectangle, Rows, Span, check_int, congruent_index, congruent_indices, shortened

HEADS = ("shared", "blocks", "split")
QUERIES = ("dilated", "all")


@dataclass(frozen=True)
class Dilated(Pattern, name="dilated"):
    """Dilated attention over any length: the last segment is short, nothing needs to divide, padding keys are never invented.

    Args:
        segment_lengths: segment s of each branch, in positions, integers >= 1.
        dilation_rates: rate r of each branch, integers >= 1, as many as segments. r > s is legal.
        heads: how heads are assigned. "shared" (default, the LongNet paper): every head does every branch, at offset h % r.
            "blocks" (torchscale's layout): offset h // ceil(H / r). "split" (fkodom's): branch i serves only its own contiguous
            group of heads, at offset i % r; group sizes differ by at most one, extras to the first groups.
        queries: "dilated" (default): queries are dilated like keys. "all": every query of the segment sees the dilated keys.
        causal: hide j > i. Default False.
        shift: positions before the first that the first segments have, >= 0: segment and residue are those of i + shift. Layers of shifts
            0 and s / 2 join segments; a shift below the rate serves other residues. Default 0.

    Raises:
        TypeError, ValueError: a list that is empty or not of integers >= 1, lists of different lengths, an unknown choice.
    """

    segment_lengths: Sequence[int]
    dilation_rates: Sequence[int]
    heads: str = "shared"
    queries: str = "dilated"
    causal: bool = False
    shift: int = 0

    def __post_init__(self) -> None:
        for name in ("segment_lengths", "dilation_rates"):
            object.__setattr__(self, name, _check_list(name, getattr(self, name)))
        if len(self.segment_lengths) != len(self.dilation_rates):
            raise ValueError(
                "dilation_rates must have as many entries as segment_lengths, "
                f"got {len(self.dilation_rates)} rates {shortened(self.dilation_rates)} "
                f"and {len(self.segment_lengths)} segments {shortened(self.segment_lengths)}"
            )
        for name, choices in (("heads", HEADS), ("queries", QUERIES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {shortened(getattr(self, name))}")
        check_causal(self.causal)
        object.__setattr__(self, "shift", check_int("shift", self.shift, minimum=0))

    @classmethod
    def for_length(
        cls, N: int, layers: int, budget: float | None = None, num_heads: int = 8, causal: bool = True
    ) -> Pattern:
        """The cheapest `Dilated((N,), (rate,)) + Window(width)` with which `layers` layers join every token to all that it may hear of.

        Of rates 1, 2, 3, 4, 6, 8, 12, ... each has its narrowest such window, found exactly (`reach`). That a path over layers exists is
        necessary for a model to use a token, not sufficient: what it learns readily is what some head of some layer sees directly. A
        budget buys that.

        Args:
            N: tokens, at least 1. Shorter sequences are joined too; longer ones are cut into segments of N, which only the window joins.
            layers: of the model, at least 1. In one layer every residue needs a head in which all queries see it.
            budget: keys a query and head may see in the mean. It is spent on the pattern that shows most pairs directly: on residues that
                heads share out, seen by one query in `rate` or by all of them (`queries="all"`), and then on a wider window. With N / 2
                keys over the number of heads and some for a window, every token is seen by some head. Default None: the cheapest.
            num_heads: query heads of a layer, at least 1. Default 8.
            causal: hide j > i. Default True.

        Raises:
            TypeError, ValueError: not such values; or a budget that the cheapest pattern exceeds.
        """
        return above("analysis.joining", "for_length")(N, layers, budget, num_heads, causal)

    @property
    def binary(self) -> bool:
        """Where every head has one branch at most."""
        return len(self.segment_lengths) == 1 or self.heads == "split"

    @property
    def addends(self) -> tuple[Pattern, ...]:
        """One pattern for each branch; itself where no head has two."""
        if self.binary:
            return (self,)
        pairs = zip(self.segment_lengths, self.dilation_rates, strict=True)
        return tuple(replace(self, segment_lengths=(s,), dilation_rates=(r,)) for s, r in pairs)

    @property
    def repeats(self) -> tuple[int | None, bool]:
        """Segments of all branches end together there; shifted ones end elsewhere."""
        return lcm(*self.segment_lengths), not self.shift

    def stretches(self, length: int) -> Iterator[tuple[Pattern, int, int]]:
        """What a shift leaves of the first one, then whole ones."""
        first = min(length, -self.shift % lcm(*self.segment_lengths))
        if self.shift and first:
            yield self, first, 1
        yield from Pattern.stretches(self._unshifted, length - first if self.shift else length)

    @property
    def _unshifted(self) -> Dilated:
        return replace(self, shift=0) if self.shift else self

    def count(self, h: Rows, i: Rows, j: Rows, num_heads: int) -> Counts:
        """The branches' conditions, added."""
        i, j = i + self.shift, j + self.shift
        total = np.zeros(np.broadcast_shapes(h.shape, i.shape, j.shape), np.int64)
        for b, (s, r) in enumerate(zip(self.segment_lengths, self.dilation_rates, strict=True)):
            offset = self._offset(b, h, num_heads)
            shown = (i // s == j // s) & ((j % s) % r == offset) & (offset >= 0)
            if self.queries == "dilated":
                shown = shown & ((i % s) % r == offset)
            if self.causal:
                shown = shown & (j <= i)
            total += shown
        return total

    def _offset(self, b: int, h: Rows, num_heads: int) -> Rows:
        """Offset of branch b for global heads h; -1 where the branch does not serve the head."""
        r = self.dilation_rates[b]
        if self.heads == "shared":
            return h % r
        if self.heads == "blocks":
            return h // -(-num_heads // r)
        begin, end = self._group(b, num_heads)
        return np.where((h >= begin) & (h < end), b % r, -1)

    def _group(self, b: int, num_heads: int) -> tuple[int, int]:
        """Heads [begin, end) of branch b under "split"."""
        branches = len(self.segment_lengths)
        if branches > num_heads:
            raise ValueError(
                f'heads="split" must have at most one branch per head, got {branches} branches for num_heads={num_heads}'
            )
        size, extra = divmod(num_heads, branches)
        begin = b * size + min(b, extra)
        return begin, begin + size + (b < extra)

    def head_classes(self, b: int, rectangle: Rectangle, only: range | None = None) -> Iterator[tuple[Span, int]]:
        """For branch b: (rows of the rectangle's head axis, their offset), one pair per offset that has heads; of `only` these offsets, if shared."""
        r, num_heads, heads = self.dilation_rates[b], rectangle.num_heads, rectangle.heads
        if self.heads == "shared":
            for offset in range(min(r, num_heads)) if only is None else only:
                yield Span(*heads.congruent(offset, r)), offset
            return
        if self.heads == "blocks":
            size = -(-num_heads // r)
            groups = [(o * size, min(num_heads, (o + 1) * size), o) for o in range(min(r, -(-num_heads // size)))]
        else:
            groups = [(*self._group(b, num_heads), b % r)]
        for begin, end, offset in groups:
            first, count, step = congruent_indices(heads, np.array([begin]), np.array([end]), np.zeros(1, np.int64), 1)
            yield Span(int(first[0]), int(count[0]), step), offset

    def gaps(self, rectangle: Rectangle) -> Iterator[Gap]:
        """Of each branch the residues, of queries that are there, that none of the heads has as its offset."""
        length = max((span.last + 1 for span in rectangle.queries if span.length), default=0)
        for b, (segment, rate) in enumerate(zip(self.segment_lengths, self.dilation_rates, strict=True)):
            covered = {offset for heads, offset in self.head_classes(b, rectangle) if heads.length}
            missing = tuple(residue for residue in range(min(rate, segment, length)) if residue not in covered)
            if missing:
                yield Gap(segment, rate, missing)

    def with_causal(self, causal: bool) -> Dilated:
        """The same with `causal` replaced."""
        return replace(self, causal=causal)

    def to_spec(self) -> dict[str, Any]:
        """Lists and choices as JSON values."""
        spec = {
            "segment_lengths": list(self.segment_lengths),
            "dilation_rates": list(self.dilation_rates),
            "heads": self.heads,
            "queries": self.queries,
            "causal": self.causal,
        }
        # Without a shift the text is what it was before there were any.
        return spec | {"shift": self.shift} if self.shift else spec

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Dilated:
        """From `to_spec`."""
        return cls(**spec)

    def branches(self, rectangle: Rectangle) -> Iterator[Branch]:
        """Strided tiles: one per segment, gathered into branches of equal tiles."""
        if self.shift:
            for branch in self._unshifted.branches(_shifted(rectangle, self.shift)):
                yield moved(branch, (0, 0), -self.shift)
            return
        one = self.queries == "dilated" and len(rectangle.queries) == 1 and rectangle.queries[0].length == 1
        for b, (s, r) in enumerate(zip(self.segment_lengths, self.dilation_rates, strict=True)):
            # Of one query, as a decoder asks for it at each token, the others show nothing.
            only = (
                range(first := rectangle.queries[0].start % s % r, min(first + 1, rectangle.num_heads)) if one else None
            )
            for heads, offset in self.head_classes(b, rectangle, only):
                if heads.length:
                    yield from self._class_branches(b, heads, offset, rectangle)

    def document_branches(self, rectangle: Rectangle, documents: Intervals) -> Iterator[Branch] | None:
        """A tile for each segment of each document, which counts segments and residues from its start; one by one where shifted."""
        return None if self.shift else self._document_branches(rectangle, documents)

    def _document_branches(self, rectangle: Rectangle, documents: Intervals) -> Iterator[Branch]:
        band = Band(0, None) if self.causal else None
        for sides in span_pairs(rectangle):
            each = documents.meeting(sides)
            for b, (s, r) in enumerate(zip(self.segment_lengths, self.dilation_rates, strict=True)):
                low, high = each.segments(s)
                for heads, offset in self.head_classes(b, rectangle):
                    keys = Intervals(low, high, low + offset, r)
                    queries = keys if self.queries == "dilated" else replace(keys, modulus=1)
                    if heads.length:
                        yield from interval_branches(heads, sides, queries, keys, band)

    @property
    def terms(self) -> Sequence[Pattern]:
        """One for each branch, as `addends`."""
        return self.addends

    @property
    def filters(self) -> bool:
        """Where every head has one branch at most."""
        return self.binary

    @property
    def complements(self) -> bool:
        """Where every head has one branch at most."""
        return self.binary

    def within(self, branch: Branch, rectangle: Rectangle) -> Iterator[Branch]:
        """`branch` cut by segments and residues, for each group of heads with one offset."""
        for part, residue in self._by_residue(branch, rectangle):
            for shown in shown_by(part, residue):
                yield moved(shown, (0, 0), -self.shift) if self.shift else shown

    def without(self, branch: Branch, rectangle: Rectangle) -> Iterator[Branch]:
        """What is left of `branch` then."""
        for part, residue in self._by_residue(branch, rectangle):
            for hidden in hidden_by(part, residue):
                yield moved(hidden, (0, 0), -self.shift) if self.shift else hidden

    def _by_residue(self, branch: Branch, rectangle: Rectangle) -> Iterator[tuple[Branch, Residue]]:
        """`branch` by groups of its heads, each with the one dilated branch and offset that they have; at shifted positions."""
        branch = moved(branch, (0, 0), self.shift) if self.shift else branch
        for b, (size, rate) in enumerate(zip(self.segment_lengths, self.dilation_rates, strict=True)):
            for rows, offset in self.head_classes(b, rectangle):
                low, high = np.array([rows.start]), np.array([rows.last + 1])
                first, count, step = congruent_indices(branch.heads, low, high, low, rows.step)
                if rows.length and count[0]:
                    heads = branch.heads.take(int(first[0]), int(count[0]), step)
                    residue = Residue(size, rate, offset, self.queries == "dilated", self.causal)
                    yield replace(branch, heads=heads), residue

    def _class_branches(self, b: int, heads: Span, offset: int, rectangle: Rectangle) -> Iterator[Branch]:
        for sides in span_pairs(rectangle):
            yield from self._segments(b, heads, offset, *sides)

    def _segments(
        self, b: int, heads: Span, offset: int, q_side: tuple[Span, int], k_side: tuple[Span, int]
    ) -> Iterator[Branch]:
        s, r = self.segment_lengths[b], self.dilation_rates[b]
        (q, q_row), (k, k_row) = q_side, k_side
        if q.length == 1:
            yield from self._segment_of_one(b, heads, offset, q_side, k_side)
            return
        tiles = q.length // s if self._is_regular(b, q, k) else 0
        if tiles:
            # The usual case needs no arrays: whole segments, all alike. What is left of a short last one is below.
            yield self._whole_segments(b, heads, offset, tiles, q_side, k_side)
            left = q.take(tiles * s, q.length - tiles * s)
            if left.length:
                yield from self._segments(b, heads, offset, (left, q_row + tiles * s), (left, k_row + tiles * s))
            return
        low = np.arange(max(q.start, k.start) // s, min(q.last, k.last) // s + 1, dtype=np.int64) * s
        # Where r does not divide s the residue of a segment's members moves from segment to segment.
        residue = low + offset
        q_rate = r if self.queries == "dilated" else 1
        q_first, q_count, q_step = congruent_indices(q, low, low + s, residue, q_rate)
        k_first, k_count, k_step = congruent_indices(k, low, low + s, residue, r)
        q_begin, k_begin = q.start + q.step * q_first, k.start + k.step * k_first
        shown = (q_count > 0) & (k_count > 0)
        nearest = q_begin - (k_begin + (k_count - 1) * k_step * k.step)
        farthest = q_begin + (q_count - 1) * q_step * q.step - k_begin
        banded = np.zeros(len(low), bool)
        if self.causal:
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

    def _segment_of_one(
        self, b: int, heads: Span, offset: int, q_side: tuple[Span, int], k_side: tuple[Span, int]
    ) -> Iterator[Branch]:
        """What one query sees, in plain integers: a decoder asks for each token."""
        s, r = self.segment_lengths[b], self.dilation_rates[b]
        (q, q_row), (k, k_row) = q_side, k_side
        low = q.start // s * s
        if self.queries == "dilated" and (q.start - low - offset) % r:
            return
        first, count, step = congruent_index(k, low, low + s, low + offset, r)
        begin = k.start + k.step * first
        if count <= 0 or (self.causal and q.start < begin):
            return
        band = Band(0, None) if self.causal and q.start < begin + (count - 1) * step * k.step else None
        q_at, k_at = (q.start - q_row * q.step, q.step), (k.start - k_row * k.step, k.step)
        yield Branch(heads, Affine(q_row, 1, 0, 1, 1), Affine(k_row + first, 1, 0, count, step), q_at, k_at, band)

    def _is_regular(self, b: int, q: Span, k: Span) -> bool:
        """Whether tiles follow from figures alone: the same contiguous positions, from a border on, the same residues in each segment."""
        s, r = self.segment_lengths[b], self.dilation_rates[b]
        return q == k and q.step == 1 and q.start % s == 0 and s % r == 0 and self.queries == "dilated"

    def _whole_segments(
        self, b: int, heads: Span, offset: int, tiles: int, q_side: tuple[Span, int], k_side: tuple[Span, int]
    ) -> Branch:
        s, r = self.segment_lengths[b], self.dilation_rates[b]
        q, k = (Affine(row + offset, tiles, s if tiles > 1 else 0, s // r, r) for _, row in (q_side, k_side))
        q_at, k_at = ((span.start - row, 1) for span, row in (q_side, k_side))
        return Branch(heads, q, k, q_at, k_at, Band(0, None) if self.causal and s > r else None)


def _shifted(rectangle: Rectangle, shift: int) -> Rectangle:
    """The same rows, `shift` positions further on."""
    queries, keys = (
        tuple(replace(span, start=span.start + shift) for span in side) for side in (rectangle.queries, rectangle.keys)
    )
    return Rectangle(rectangle.num_heads, queries, keys, rectangle.heads)


def _equal_columns(kind: Rows, members: Rows) -> Iterator[Rows]:
    """Groups of `members` whose columns of `kind` are equal; the usual case, all alike but the last, costs one comparison."""
    while len(members):
        alike = (kind[:, members] == kind[:, members[:1]]).all(axis=0)
        yield members[alike]
        members = members[~alike]


def _check_list(name: str, value: Sequence[int]) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__") or getattr(value, "ndim", 1) == 0:
        raise TypeError(f"{name} must be a sequence of integers >= 1, got {shortened(value)} ({type(value).__name__})")
    if len(value) == 0:
        raise ValueError(f"{name} must have at least one entry, got {shortened(value)}")
    return tuple(check_int(f"{name}[{at}]", entry, minimum=1) for at, entry in enumerate(value))
