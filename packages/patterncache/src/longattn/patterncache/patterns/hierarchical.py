"""`HierarchicalBlocks`: blocks of blocks, each seen from outside by its last token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from longattn.patterncache.canonical import fields_of
from longattn.patterncache.pattern import Pattern, check_causal
from longattn.patterncache.plan import Band, Branch, Counts
from longattn.patterncache.planning.intervals import Intervals, Sides, interval_branches, span_pairs
from longattn.patterncache.spans import Rectangle, Rows, Span, check_int


@dataclass(frozen=True)
class HierarchicalBlocks(Pattern, name="hierarchical_blocks"):
    """A tree of blocks: all of one's own block, and of every block further out the last token of each of its parts.

    A block of level 0 has `block_size` positions, one of level l has `fanout` blocks of level l - 1. Query i sees key j iff both are
    in one block of level 0, or, for an l from 1 to levels - 1, both are in one block of level l and j is the last position of its
    block of level l - 1. The last token has seen its whole block, so it is what a deeper layer can ask about it. With enough
    levels a query sees about block_size + fanout * levels keys.

    Args:
        block_size: positions of a block of level 0, >= 1.
        levels: >= 1; 1 is blocks that never meet. Default 2.
        fanout: parts of a block of level 1 and above, >= 2. Default 8.
        causal: hide j > i. Default False.

    Raises:
        TypeError, ValueError: an argument is not such a value, by name; or the outermost block is longer than 2 ** 62.
    """

    block_size: int
    levels: int = 2
    fanout: int = 8
    causal: bool = False

    def __post_init__(self) -> None:
        for name, least in (("block_size", 1), ("levels", 1), ("fanout", 2)):
            object.__setattr__(self, name, check_int(name, getattr(self, name), minimum=least))
        # Positions are int64.
        if self.levels > 63 or self.size(self.levels - 1) > 1 << 62:
            raise ValueError(f"levels must keep the outermost block within 2 ** 62 positions, got {self.levels}")
        check_causal(self.causal)

    @property
    def binary(self) -> bool:
        """Always: a key of several levels counts once."""
        return True

    @property
    def repeats(self) -> tuple[int | None, bool]:
        """The outermost block."""
        return self.size(self.levels - 1), True

    def size(self, level: int) -> int:
        """Positions of a block of a level."""
        return self.block_size * self.fanout**level

    def count(self, h: Rows, i: Rows, j: Rows, num_heads: int) -> Counts:
        """1 where any level shows it."""
        shown = (i // self.block_size == j // self.block_size) & (h >= 0)
        for level in range(1, self.levels):
            together = i // self.size(level) == j // self.size(level)
            shown = shown | (together & ((j + 1) % self.size(level - 1) == 0))
        return (shown & (j <= i) if self.causal else shown).astype(np.int64)

    def branches(self, rectangle: Rectangle) -> Iterator[Branch]:
        """The blocks; then, per level and place in a block, the last tokens of the parts before and after one's own."""
        heads = Span(0, rectangle.heads.length)
        for sides in span_pairs(rectangle):
            spans = [span for span, _ in sides]
            begin, end = max(span.start for span in spans), min(span.last for span in spans) + 1
            for level in range(self.levels):
                size = self.size(level)
                low = np.arange(begin // size, -(-end // size), dtype=np.int64) * size
                if not level:
                    block = Intervals(low, low + size, np.zeros_like(low), 1)
                    yield from interval_branches(heads, sides, block, block, Band(0, None) if self.causal else None)
                    continue
                # Only parts that have queries: a block may have more parts than there are positions.
                first, last = (at // self.size(level - 1) for at in (spans[0].start, spans[0].last))
                for part in sorted(at % self.fanout for at in range(first, min(last, first + self.fanout - 1) + 1)):
                    # Keys of one's own part are seen at a lower level already, its last token among them.
                    yield from self._outside(heads, sides, low, level, part)

    def _outside(self, heads: Span, sides: Sides, low: Rows, level: int, part: int) -> Iterator[Branch]:
        unit = self.size(level - 1)
        own = low + part * unit
        queries = Intervals(own, own + unit, np.zeros_like(low), 1)
        yield from interval_branches(heads, sides, queries, Intervals(low, own, low - 1, unit), None)
        if not self.causal:
            after = Intervals(own + unit, low + self.size(level), low - 1, unit)
            yield from interval_branches(heads, sides, queries, after, None)

    def with_causal(self, causal: bool) -> HierarchicalBlocks:
        """The same with `causal` replaced."""
        return replace(self, causal=causal)

    def to_spec(self) -> dict[str, Any]:
        """All fields by name."""
        return fields_of(self)

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> HierarchicalBlocks:
        """From `to_spec`."""
        return cls(**spec)
