"""`Periodic`: who sees whom by residues and distance. What a mask that repeats along its diagonal is, in a few numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from longattn.patterncache.pattern import Pattern, check_causal
from longattn.patterncache.plan import Band, Branch, Counts
from longattn.patterncache.planning.intervals import Intervals, interval_branches, span_pairs
from longattn.patterncache.spans import Rectangle, Rows, Span, check_int, shortened

Run = tuple[int, int, int | None, int | None]


@dataclass(frozen=True)
class Periodic(Pattern, name="periodic"):
    """Query i sees key j once for each run (a, b, low, high) with i % period == a, j % period == b and low <= i - j <= high.

    Args:
        period: >= 1.
        runs: (a, b, low, high) each; None is no bound.
        length: positions that it says something about, >= 1.
        causal: hide j > i. Default False.

    Raises:
        TypeError, ValueError: an argument is not such a value, by name.
        ValueError: later, from plan and counts, where positions lie beyond `length`.
    """

    period: int
    runs: Sequence[Run]
    length: int
    causal: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "period", check_int("period", self.period, minimum=1))
        object.__setattr__(self, "length", check_int("length", self.length, minimum=1))
        if not isinstance(self.runs, (tuple, list)):
            raise TypeError(f"runs must be a sequence of (a, b, low, high), got {shortened(self.runs)}")
        runs: list[Run] = []
        for at, run in enumerate(self.runs):
            if not isinstance(run, (tuple, list)) or len(run) != 4:  # pyright: ignore[reportUnnecessaryIsInstance, reportUnnecessaryComparison]
                raise TypeError(f"runs[{at}] must be (a, b, low, high), got {shortened(run)}")
            a, b, low, high = run
            if (
                check_int(f"runs[{at}][0]", a, minimum=0) >= self.period
                or check_int(f"runs[{at}][1]", b, minimum=0) >= self.period
            ):
                raise ValueError(f"runs[{at}] must have residues below period={self.period}, got {a} and {b}")
            lowest, highest = (
                None if bound is None else check_int(f"runs[{at}]", bound, minimum=-self.length)
                for bound in (low, high)
            )
            runs.append((int(a), int(b), lowest, highest))
        object.__setattr__(self, "runs", tuple(sorted(runs, key=str)))
        check_causal(self.causal)

    def check_rectangle(self, rectangle: Rectangle) -> None:
        """Positions must lie below the length."""
        for name, spans in (("queries", rectangle.queries), ("keys", rectangle.keys)):
            last = max((span.last for span in spans if span.length), default=-1)
            if last >= self.length:
                raise ValueError(f"{name} must lie below length={self.length}, got position {last}")

    def count(self, h: Rows, i: Rows, j: Rows, num_heads: int) -> Counts:
        """The runs' conditions, added."""
        total = np.zeros(np.broadcast_shapes(h.shape, i.shape, j.shape), np.int64)
        for a, b, low, high in self.runs:
            total += (i % self.period == a) & (j % self.period == b) & self._band(low, high).sees(i - j)
        return total

    def _band(self, low: int | None, high: int | None) -> Band:
        return Band(low, high) & Band(0, None) if self.causal else Band(low, high)

    def branches(self, rectangle: Rectangle) -> Iterator[Branch]:
        """A strided tile within a band for each run."""
        heads, zero = Span(0, rectangle.heads.length), np.zeros(1, np.int64)
        for sides in span_pairs(rectangle):
            end = np.array([max(span.last for span, _ in sides) + 1])
            for a, b, low, high in self.runs:
                queries, keys = (Intervals(zero, end, np.array([residue]), self.period) for residue in (a, b))
                band = self._band(low, high)
                yield from interval_branches(heads, sides, queries, keys, None if band == Band() else band)

    def with_causal(self, causal: bool) -> Periodic:
        """The same with `causal` replaced."""
        return replace(self, causal=causal)

    def to_spec(self) -> dict[str, Any]:
        """All fields by name; runs as lists."""
        return {
            "period": self.period,
            "runs": [list(run) for run in self.runs],
            "length": self.length,
            "causal": self.causal,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Periodic:
        """From `to_spec`."""
        return cls(spec["period"], [tuple(run) for run in spec["runs"]], spec["length"], spec["causal"])
