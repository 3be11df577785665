"""`Documents`: several documents packed into one sequence, each with positions of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from longattn.patterncache.canonical import build_pattern
from longattn.patterncache.pattern import Pattern, check_pattern_type
from longattn.patterncache.patterns.window import Full
from longattn.patterncache.plan import Branch, Counts
from longattn.patterncache.planning.intervals import Intervals, moved, span_pairs
from longattn.patterncache.spans import Rectangle, Rows, Span, check_int, shortened

_MOST_STRETCHES = 64
"""Borders of documents up to which `lint` looks at each alone: many short ones are quicker together."""


@dataclass(frozen=True)
class Documents(Pattern, name="documents"):
    """Tokens see within their document only, and there what `pattern` says; positions restart at 0 in every document.

    Args:
        cu_seqlens: cumulative lengths from 0, as flash-attention has them: document d is [cu_seqlens[d], cu_seqlens[d + 1]).
            A sequence, numpy array or tensor of integers; a document may be empty.
        pattern: within a document. Default `Full()`.

    Raises:
        TypeError, ValueError: cu_seqlens is no such sequence of at least two, or pattern no Pattern.
        ValueError: later, from plan and counts, where positions lie beyond the last document.
    """

    cu_seqlens: Sequence[int]
    pattern: Pattern = field(default_factory=Full)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cu_seqlens", _check_cumulative(self.cu_seqlens))
        check_pattern_type("pattern", self.pattern)

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """Whether the pattern is."""
        return self.pattern.causal

    @property
    def binary(self) -> bool:
        """Whether the pattern is."""
        return self.pattern.binary

    @property
    def addends(self) -> tuple[Pattern, ...]:
        """Those of the pattern, in the same documents."""
        return tuple(replace(self, pattern=part) for part in self.pattern.addends)

    @cached_property
    def _borders(self) -> Rows:
        return np.array(self.cu_seqlens, np.int64)

    def stretches(self, length: int) -> Iterator[tuple[Pattern, int, int]]:
        """Those of each document, where there are few."""
        if len(self.cu_seqlens) > _MOST_STRETCHES:
            yield self, length, 1
            return
        sizes = [b - a for a, b in pairwise(min(border, length) for border in self.cu_seqlens) if a < b]
        for size in sizes or [0]:
            yield from self.pattern.stretches(size)

    def check_rectangle(self, rectangle: Rectangle) -> None:
        """Positions must lie in a document, and the pattern must mean something in each."""
        end = self.cu_seqlens[-1]
        for name, spans in (("queries", rectangle.queries), ("keys", rectangle.keys)):
            last = max((span.last for span in spans if span.length), default=-1)
            if last >= end:
                raise ValueError(f"{name} must lie below cu_seqlens[-1] = {end}, got position {last}")
        if type(self.pattern).check_rectangle is not Pattern.check_rectangle:
            for _, part, _ in self._parts(rectangle):
                self.pattern.check_rectangle(part)

    def count(self, h: Rows, i: Rows, j: Rows, num_heads: int) -> Counts:
        """The pattern's count on positions within the document, where i and j share one."""
        of_i, of_j = (np.searchsorted(self._borders, at, side="right") - 1 for at in (i, j))
        # A key of another document is asked about as the query itself, so that every question is a legal one.
        start, other = self._borders[of_i], of_i != of_j
        inside = self.pattern.count(h, i - start, np.where(other, i, j) - start, num_heads)
        return np.where(other, 0, inside)

    def branches(self, rectangle: Rectangle) -> Iterator[Branch]:
        """Those of the pattern, for all documents at once where it can, else document by document."""
        together = self.pattern.document_branches(rectangle, Intervals.between(self._borders))
        if together is not None:
            yield from together
            return
        for start, part, rows in self._parts(rectangle):
            for branch in self.pattern.branches(part):
                yield moved(branch, rows, start)

    def _parts(self, rectangle: Rectangle) -> Iterator[tuple[int, Rectangle, tuple[int, int]]]:
        """Per document and pair of spans: (its first position, what it has of them from 0, the rows before that)."""
        for (q, q_row), (k, k_row) in span_pairs(rectangle):
            (q_first, q_last), (k_first, k_last) = (_inside(span, self._borders) for span in (q, k))
            for d in np.flatnonzero((q_first < q_last) & (k_first < k_last)).tolist():
                start = self.cu_seqlens[d]
                spans = [
                    Span(span.start + int(first[d]) * span.step - start, int(last[d] - first[d]), span.step)
                    for span, first, last in ((q, q_first, q_last), (k, k_first, k_last))
                ]
                part = Rectangle(rectangle.num_heads, spans[0], spans[1], rectangle.heads)
                yield start, part, (q_row + int(q_first[d]), k_row + int(k_first[d]))

    def with_causal(self, causal: bool) -> Documents:
        """The same with the pattern's causal field replaced."""
        return replace(self, pattern=self.pattern.with_causal(causal))

    def to_spec(self) -> dict[str, Any]:
        """The cumulative lengths, and the pattern as [name, spec]."""
        return {"cu_seqlens": list(self.cu_seqlens), "pattern": [self.pattern.name, self.pattern.to_spec()]}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Documents:
        """From `to_spec`."""
        return cls(spec["cu_seqlens"], build_pattern(*spec["pattern"]))


def _inside(span: Span, borders: Rows) -> tuple[Rows, Rows]:
    """For every document, the members [first, last) of `span` that lie in it."""
    at = np.clip(-((span.start - borders) // span.step), 0, span.length)
    return at[:-1], at[1:]


def _check_cumulative(value: Any) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__len__") or getattr(value, "ndim", 1) != 1:
        raise TypeError(
            f"cu_seqlens must be a sequence of integers from 0, got {shortened(value)} ({type(value).__name__})"
        )
    try:
        entries = value.tolist() if hasattr(value, "tolist") else list(value)
    except RuntimeError as error:
        raise TypeError(f"cu_seqlens must hold its integers in memory, got a tensor that does not: {error}") from error
    borders = tuple(check_int(f"cu_seqlens[{at}]", entry, minimum=0) for at, entry in enumerate(entries))
    if len(borders) < 2 or borders[0] or any(b < a for a, b in pairwise(borders)):
        raise ValueError(
            f"cu_seqlens must begin with 0, never fall, and have at least two entries, got {shortened(borders)}"
        )
    return borders
