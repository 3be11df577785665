"""`Full` and `Window`: everything, or a band of positions, with sinks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from longattn.patterncache.indices import Affine
from longattn.patterncache.pattern import Pattern, check_causal
from longattn.patterncache.plan import Band, Branch, Counts
from longattn.patterncache.planning.block_runs import exclude_band, restrict_band
from longattn.patterncache.planning.intervals import Intervals, interval_branches, span_pairs
from longattn.patterncache.spans import Rectangle, Rows, Span, check_int


def whole_branches(rectangle: Rectangle) -> Iterator[Branch]:
    """Every head, every query, every key: one dense branch per pair of spans."""
    heads = Span(0, rectangle.heads.length)
    for (q, q_row), (k, k_row) in span_pairs(rectangle):
        yield Branch(
            heads,
            Affine(q_row, 1, 0, q.length, 1),
            Affine(k_row, 1, 0, k.length, 1),
            (q.start - q_row * q.step, q.step),
            (k.start - k_row * k.step, k.step),
        )


@dataclass(frozen=True)
class Full(Pattern, name="full"):
    """Every query sees every key; with `causal`, every key at or before it.

    Args:
        causal: hide j > i. Default False.

    Raises:
        TypeError: causal is not a bool.
    """

    causal: bool = False

    def __post_init__(self) -> None:
        check_causal(self.causal)

    @property
    def positional(self) -> bool:
        """Only when causal."""
        return self.causal

    @property
    def band(self) -> Band:
        """The distances seen."""
        return Band(0, None) if self.causal else Band()

    @property
    def binary(self) -> bool:
        """Always."""
        return True

    @property
    def filters(self) -> bool:
        """Always: it is a band."""
        return True

    def within(self, branch: Branch, rectangle: Rectangle) -> Iterator[Branch]:
        """`branch` within the band."""
        yield from restrict_band(branch, self.band)

    @property
    def complements(self) -> bool:
        """Always: it is a band."""
        return True

    def without(self, branch: Branch, rectangle: Rectangle) -> Iterator[Branch]:
        """`branch` outside the band."""
        yield from exclude_band(branch, self.band)

    @property
    def repeats(self) -> tuple[int | None, bool]:
        """Any shift, and every border is crossed."""
        return 1, False

    def direct_depth(self, length: int) -> int:
        """One layer, where there are two tokens."""
        return int(length > 1)

    def count(self, h: Rows, i: Rows, j: Rows, num_heads: int) -> Counts:
        """1, or j <= i."""
        shown = (j <= i) if self.causal else np.ones(np.broadcast_shapes(i.shape, j.shape), bool)
        return (shown & (h >= 0)).astype(np.int64)

    def with_causal(self, causal: bool) -> Full:
        """The same with `causal` replaced."""
        return Full(causal)

    def to_spec(self) -> dict[str, Any]:
        """causal."""
        return {"causal": self.causal}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Full:
        """From `to_spec`."""
        return cls(**spec)

    def branches(self, rectangle: Rectangle) -> Iterator[Branch]:
        """One dense or causal branch per pair of spans."""
        for branch in whole_branches(rectangle):
            yield from restrict_band(branch, self.band)

    def document_branches(self, rectangle: Rectangle, documents: Intervals) -> Iterator[Branch]:
        """A tile for each document."""
        heads = Span(0, rectangle.heads.length)
        for sides in span_pairs(rectangle):
            each = documents.meeting(sides)
            yield from interval_branches(heads, sides, each, each, self.band)


@dataclass(frozen=True)
class Window(Pattern, name="window"):
    """The last `size` keys up to the query, (i - size, i]; not causal: `abs(i - j) < size`. The first `sinks` keys are always seen.

    Args:
        size: window width in positions, >= 1.
        sinks: keys j < sinks are visible to every query, also subject to causal. Default 0.
        causal: default True.

    Raises:
        TypeError, ValueError: size or sinks is not such an integer, causal is not a bool.
    """

    size: int
    sinks: int = 0
    causal: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", check_int("size", self.size, minimum=1))
        object.__setattr__(self, "sinks", check_int("sinks", self.sinks, minimum=0))
        check_causal(self.causal)

    @property
    def binary(self) -> bool:
        """Always: a sink in the window counts once."""
        return True

    @property
    def filters(self) -> bool:
        """Where there are no sinks: then it is a band."""
        return not self.sinks

    def within(self, branch: Branch, rectangle: Rectangle) -> Iterator[Branch]:
        """`branch` within the band."""
        yield from restrict_band(branch, self._near)

    @property
    def complements(self) -> bool:
        """Where there are no sinks."""
        return not self.sinks

    def without(self, branch: Branch, rectangle: Rectangle) -> Iterator[Branch]:
        """`branch` outside the band."""
        yield from exclude_band(branch, self._near)

    @property
    def _near(self) -> Band:
        return Band(0 if self.causal else 1 - self.size, self.size - 1)

    @property
    def repeats(self) -> tuple[int | None, bool]:
        """Any shift, where there are no sinks."""
        return None if self.sinks else 1, False

    def direct_depth(self, length: int) -> int | None:
        """As many layers as it takes to hand on over the whole length, or over what lies beyond the sinks."""
        if length <= 1 or self.size < 2:
            return super().direct_depth(length)
        # A layer hands on over size - 1 tokens. Where the future is hidden, sinks know nothing but themselves, so the way back need only
        # end next to them; else whoever hears of the last sink goes on from there.
        far, step = length - 1, self.size - 1
        if not self.sinks:
            return -(-far // step)
        if self.causal:
            return max(1, -(-max(0, far - self.sinks) // step))
        return min(-(-far // step), 1 - (-max(0, far - self.sinks + 1) // step))

    def count(self, h: Rows, i: Rows, j: Rows, num_heads: int) -> Counts:
        """1 within the window or at a sink, never twice."""
        shown = (abs(i - j) < self.size) | (j < self.sinks)
        if self.causal:
            shown &= j <= i
        return (shown & (h >= 0)).astype(np.int64)

    def with_causal(self, causal: bool) -> Window:
        """The same with `causal` replaced: not causal, the window is symmetric."""
        return replace(self, causal=causal)

    def to_spec(self) -> dict[str, Any]:
        """size, sinks, causal."""
        return {"size": self.size, "sinks": self.sinks, "causal": self.causal}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Window:
        """From `to_spec`."""
        return cls(**spec)

    def branches(self, rectangle: Rectangle) -> Iterator[Branch]:
        """The band, then the sinks outside it (so that no pair counts twice)."""
        for branch in whole_branches(rectangle):
            yield from restrict_band(branch, self._near)
            origin, step = branch.k_at
            first = branch.k.start if isinstance(branch.k, Affine) else 0
            sinks = min(branch.k.count, max(0, -((origin + step * first - self.sinks) // step)))
            if sinks:
                far = replace(branch, k=branch.k.narrow(0, sinks))
                yield from restrict_band(far, Band(self.size, None))
                if not self.causal:
                    yield from restrict_band(far, Band(None, -self.size))

    def document_branches(self, rectangle: Rectangle, documents: Intervals) -> Iterator[Branch]:
        """The band, then the sinks outside it: a tile for each document."""
        heads = Span(0, rectangle.heads.length)
        for sides in span_pairs(rectangle):
            each = documents.meeting(sides)
            yield from interval_branches(heads, sides, each, each, self._near)
            if not self.sinks:
                continue
            sinks = replace(each, high=np.minimum(each.high, each.low + self.sinks))
            yield from interval_branches(heads, sides, each, sinks, Band(self.size, None))
            if not self.causal:
                yield from interval_branches(heads, sides, each, sinks, Band(None, -self.size))
