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
from longattn.patterncache.pattern import Pattern, above, check_causal
from longattn.patterncache.plan import Band, Branch, Counts
from longattn.patterncache.planning.intervals import Intervals, interval_branches, moved, span_pairs
from longattn.patterncache.planning.residue_cuts import Residue, hidden_by, shown_by
from longattn.patterncache.planning.segments import segment_branches
from longattn.patterncache.spans import Rectangle, Rows, Span, check_int, congruent_indices, shortened

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
        budget buys that. Other classes can join tokens for less: `HierarchicalBlocks(15, 4, 13)` 32768 in 4 layers for 26 keys, this for 41.

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

    @classmethod
    def for_config(cls, config: Any, N: int | None = None, budget: float | None = None) -> Pattern:
        """`for_length` with the layers and heads of a transformers model, causal where it is (`from_hf`).

        Args:
            config: a `PreTrainedConfig` or what has its attributes; of a multimodal one, its text part is read.
            N: tokens. Default None: its max_position_embeddings.
            budget: as in `for_length`.

        Raises:
            TypeError, ValueError: `from_hf` refuses the model, a number is missing, or a bad argument; by name.
        """
        return above("interop.model_configs", "for_config")(config, N, budget)

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

    def _residue(self, b: int, offset: int) -> Residue:
        """What branch b shows to heads of an offset."""
        return Residue(self.segment_lengths[b], self.dilation_rates[b], offset, self.queries == "dilated", self.causal)

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
            its = rectangle.queries[0].start % s % r if one else 0
            only = range(its, min(its + 1, rectangle.num_heads)) if one else None
            for heads, offset in self.head_classes(b, rectangle, only):
                for sides in span_pairs(rectangle) if heads.length else ():
                    yield from segment_branches(heads, self._residue(b, offset), *sides)

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
        for b in range(len(self.segment_lengths)):
            for rows, offset in self.head_classes(b, rectangle):
                low, high = np.array([rows.start]), np.array([rows.last + 1])
                first, count, step = congruent_indices(branch.heads, low, high, low, rows.step)
                if rows.length and count[0]:
                    heads = branch.heads.take(int(first[0]), int(count[0]), step)
                    yield replace(branch, heads=heads), self._residue(b, offset)


def _shifted(rectangle: Rectangle, shift: int) -> Rectangle:
    """The same rows, `shift` positions further on."""
    queries, keys = (
        tuple(replace(span, start=span.start + shift) for span in side) for side in (rectangle.queries, rectangle.keys)
    )
    return Rectangle(rectangle.num_heads, queries, keys, rectangle.heads)


def _check_list(name: str, value: Sequence[int]) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__") or getattr(value, "ndim", 1) == 0:
        raise TypeError(f"{name} must be a sequence of integers >= 1, got {shortened(value)} ({type(value).__name__})")
    if len(value) == 0:
        raise ValueError(f"{name} must have at least one entry, got {shortened(value)}")
    return tuple(check_int(f"{name}[{at}]", entry, minimum=1) for at, entry in enumerate(value))
