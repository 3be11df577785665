"""`Strided`: local and strided attention together (Sparse Transformer, Child et al. 2019, arXiv:1904.10509, section 4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from longattn.patterncache.canonical import fields_of
from longattn.patterncache.pattern import Pattern, check_causal
from longattn.patterncache.plan import Band, Branch, Counts
from longattn.patterncache.planning.intervals import Intervals, interval_branches, span_pairs
from longattn.patterncache.spans import Rectangle, Rows, Span, check_int, shortened

HEADS = ("merged", "split")


@dataclass(frozen=True)
class Strided(Pattern, name="strided"):
    """Local: abs(i - j) < local. Strided: i - j is a multiple of `stride`. Merged, a key of both counts once.

    With local = stride, and causal, "merged" is the paper's set exactly: the last `stride` positions, and every stride-th before.

    Args:
        stride: l of the paper, about the square root of the length there, >= 1.
        local: width of the local part, >= 1. Default None: the stride.
        heads: "merged" (default): every head sees both. "split": even heads see the local part, odd ones the strided.
        causal: hide j > i. Default True.

    Raises:
        TypeError, ValueError: an argument is not such a value, by name.
    """

    stride: int
    local: int | None = None
    heads: str = "merged"
    causal: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", check_int("stride", self.stride, minimum=1))
        object.__setattr__(
            self, "local", check_int("local", self.stride if self.local is None else self.local, minimum=1)
        )
        if self.heads not in HEADS:
            raise ValueError(f"heads must be one of {HEADS}, got {shortened(self.heads)}")
        check_causal(self.causal)

    @property
    def binary(self) -> bool:
        """Always: a key of both parts counts once."""
        return True

    @property
    def _width(self) -> int:
        assert self.local is not None
        return self.local

    def count(self, h: Rows, i: Rows, j: Rows, num_heads: int) -> Counts:
        """Either part, or the head's."""
        local, strided = abs(i - j) < self._width, (i - j) % self.stride == 0
        shown = (local | strided) & (h >= 0) if self.heads == "merged" else np.where(h % 2 == 0, local, strided)
        return (shown & (j <= i) if self.causal else shown).astype(np.int64)

    def branches(self, rectangle: Rectangle) -> Iterator[Branch]:
        """A band for the local part; a tile per residue for the strided one, without the band where a head has both."""
        last = max((span.last for span in (*rectangle.queries, *rectangle.keys)), default=-1)
        return self.document_branches(rectangle, Intervals.between(np.array([0, last + 1], np.int64)))

    def document_branches(self, rectangle: Rectangle, documents: Intervals) -> Iterator[Branch]:
        """As `branches`, for each document; residues count from its start."""
        every = Span(0, rectangle.heads.length)
        near = Band(0 if self.causal else 1 - self._width, self._width - 1)
        everywhere = Band(0, None) if self.causal else None
        for sides in span_pairs(rectangle):
            each = documents.meeting(sides)
            residues = self._residues(each)
            if self.heads == "merged":
                yield from interval_branches(every, sides, each, each, near)
                yield from interval_branches(every, sides, residues, residues, Band(self._width, None))
                if not self.causal:
                    yield from interval_branches(every, sides, residues, residues, Band(None, -self._width))
                continue
            even, odd = (Span(*rectangle.heads.congruent(residue, 2)) for residue in (0, 1))
            yield from interval_branches(even, sides, each, each, near)
            yield from interval_branches(odd, sides, residues, residues, everywhere)

    def _residues(self, documents: Intervals) -> Intervals:
        """Every document once for each residue modulo the stride that it can have."""
        residues = min(self.stride, int((documents.high - documents.low).max(initial=0)))
        residue = np.tile(np.arange(residues, dtype=np.int64), len(documents.low))
        low, high = (np.repeat(side, residues) for side in (documents.low, documents.high))
        return Intervals(low, high, low + residue, self.stride)

    def with_causal(self, causal: bool) -> Strided:
        """The same with `causal` replaced: not causal, both parts are symmetric."""
        return replace(self, causal=causal)

    def to_spec(self) -> dict[str, Any]:
        """All fields by name."""
        return fields_of(self)

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Strided:
        """From `to_spec`."""
        return cls(**spec)
