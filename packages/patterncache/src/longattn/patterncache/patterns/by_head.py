"""`ByHead`: groups of heads with patterns of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from longattn.patterncache.analysis.results import Gap
from longattn.patterncache.canonical import build_pattern
from longattn.patterncache.pattern import Pattern, check_pattern_type
from longattn.patterncache.plan import Branch, Counts
from longattn.patterncache.spans import MOST_HEADS, Rectangle, Rows, Span, congruent_indices, shortened


@dataclass(frozen=True)
class ByHead(Pattern, name="by_head"):
    """Each group of global heads sees by its own pattern; a head of no group sees nothing.

    Args:
        parts: (heads, pattern) pairs; heads is a Span of global query heads. Groups must not overlap.

    Raises:
        TypeError: parts is no such sequence, or empty.
        ValueError: two groups share a head, which is named; later, from plan and counts, where a head is not one of the module's.
    """

    parts: Sequence[tuple[Span, Pattern]]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, (tuple, list)) or not self.parts:
            raise TypeError(f"parts must be a sequence of at least one (heads, pattern), got {shortened(self.parts)}")
        taken: set[int] = set()
        for at, part in enumerate(self.parts):
            if not isinstance(part, (tuple, list)) or len(part) != 2:  # pyright: ignore[reportUnnecessaryIsInstance, reportUnnecessaryComparison]
                raise TypeError(f"parts[{at}] must be (heads, pattern), got {shortened(part)}")
            heads, pattern = part
            if not isinstance(heads, Span):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"parts[{at}][0] must be a Span of heads, got {shortened(heads)}")
            if heads.length and heads.last >= MOST_HEADS:
                raise ValueError(f"parts[{at}][0] must lie below {MOST_HEADS} heads, got {heads}")
            check_pattern_type(f"parts[{at}][1]", pattern)
            shared = sorted(taken.intersection(heads.positions().tolist()))
            if shared:
                raise ValueError(
                    f"parts[{at}] must not overlap the heads of an earlier part, got {heads}, which has {shared[:8]} too"
                )
            taken.update(heads.positions().tolist())
        # Groups have no order; an empty one says nothing.
        groups = sorted((part for part in self.parts if part[0].length), key=lambda part: part[0].start)
        object.__setattr__(self, "parts", tuple(groups) or tuple(self.parts[:1]))

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """Whether every part is."""
        return all(pattern.causal for _, pattern in self.parts)

    @property
    def positional(self) -> bool:
        """Whether any part is."""
        return any(pattern.positional for _, pattern in self.parts)

    @property
    def binary(self) -> bool:
        """Whether every part is."""
        return all(pattern.binary for _, pattern in self.parts)

    @property
    def listing(self) -> bool:
        """Whether any part is."""
        return any(pattern.listing for _, pattern in self.parts)

    def gaps(self, rectangle: Rectangle) -> Iterator[Gap]:
        """Those of each part, among its own heads."""
        for heads, pattern in self.parts:
            yield from pattern.gaps(replace(rectangle, heads=heads))

    def check_rectangle(self, rectangle: Rectangle) -> None:
        """Heads must be the module's, and every part must mean something for its own."""
        for heads, pattern in self.parts:
            if heads.length and heads.last >= rectangle.num_heads:
                raise ValueError(f"heads must lie below num_heads={rectangle.num_heads}, got {heads}")
            pattern.check_rectangle(rectangle)

    def count(self, h: Rows, i: Rows, j: Rows, num_heads: int) -> Counts:
        """The part's count, for the heads of each part."""
        total = np.zeros(np.broadcast_shapes(h.shape, i.shape, j.shape), np.int64)
        for heads, pattern in self.parts:
            total += np.where(np.isin(h, heads.positions()), pattern.count(h, i, j, num_heads), 0)
        return total

    def branches(self, rectangle: Rectangle) -> Iterator[Branch]:
        """Those of each part, for the heads that it has of the rectangle."""
        for heads, pattern in self.parts:
            low, high = np.array([heads.start]), np.array([heads.last + 1])
            first, count, step = congruent_indices(rectangle.heads, low, high, low, heads.step)
            if not count[0]:
                continue
            some = rectangle.heads.take(int(first[0]), int(count[0]), step)
            own = Rectangle(rectangle.num_heads, rectangle.queries, rectangle.keys, some)
            for branch in pattern.branches(own):
                rows = branch.heads
                yield replace(branch, heads=Span(int(first[0]) + step * rows.start, rows.length, step * rows.step))

    def with_causal(self, causal: bool) -> ByHead:
        """All parts with their causal field replaced; itself where `causal` has that value already, even if parts differ."""
        if causal == self.causal:
            return self
        return ByHead(tuple((heads, pattern.with_causal(causal)) for heads, pattern in self.parts))

    def to_spec(self) -> dict[str, Any]:
        """The parts, as [[start, length, step], [name, spec]]."""
        return {"parts": [[list(heads.numbers), [pattern.name, pattern.to_spec()]] for heads, pattern in self.parts]}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> ByHead:
        """From `to_spec`."""
        return cls(tuple((Span(*heads), build_pattern(*part)) for heads, part in spec["parts"]))
