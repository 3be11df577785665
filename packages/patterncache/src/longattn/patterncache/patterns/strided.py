"""`Strided`: local and strided attention together (Sparse Transformer, Child et al. 2019, arXiv:1904.10509, section 4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from longattn.patterncache.pattern import Pattern, check_causal
from longattn.patterncache.plan import Band, Branch, Counts
from longattn.patterncache.planning.intervals import Sides, Windows, span_pairs, window_branches
from longattn.patterncache.spans import Rectangle, Rows, Span, check_int

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
            raise ValueError(f"heads must be one of {HEADS}, got {self.heads!r}")
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
        every = Span(0, rectangle.heads.length)
        near = Band(0 if self.causal else 1 - self._width, self._width - 1)
        everywhere = Band(0, None) if self.causal else None
        for sides in span_pairs(rectangle):
            if self.heads == "merged":
                yield from self._local(every, sides, near)
                yield from self._residues(every, sides, Band(self._width, None))
                if not self.causal:
                    yield from self._residues(every, sides, Band(None, -self._width))
                continue
            yield from self._local(Span(*rectangle.heads.congruent(0, 2)), sides, near)
            yield from self._residues(Span(*rectangle.heads.congruent(1, 2)), sides, everywhere)

    def _local(self, heads: Span, sides: Sides, band: Band) -> Iterator[Branch]:
        whole = _windows(sides, np.zeros(1, np.int64), 1)
        yield from window_branches(heads, sides, whole, whole, band)

    def _residues(self, heads: Span, sides: Sides, band: Band | None) -> Iterator[Branch]:
        every = _windows(sides, np.arange(self.stride, dtype=np.int64), self.stride)
        yield from window_branches(heads, sides, every, every, band)

    def with_causal(self, causal: bool) -> Strided:
        """The same with `causal` replaced: not causal, both parts are symmetric."""
        return replace(self, causal=causal)

    def to_spec(self) -> dict[str, Any]:
        """All fields by name."""
        return asdict(self)

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Strided:
        """From `to_spec`."""
        return cls(**spec)


def _windows(sides: Sides, residue: Rows, modulus: int) -> Windows:
    end = max(span.last for span, _ in sides) + 1
    return Windows(np.zeros_like(residue), np.full_like(residue, end), residue, modulus)
