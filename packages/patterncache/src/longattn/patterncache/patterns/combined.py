"""Patterns made of patterns: what `a | b`, `a & b` and `a + b` mean.

`Union` counts the largest of its parts, `Intersection` the smallest, `Sum` all of them. Parts are kept in the order of their
canonical strings, so that equal combinations written differently are equal and share a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, Self

import numpy as np

from longattn.patterncache.analysis.results import Gap
from longattn.patterncache.canonical import build_pattern
from longattn.patterncache.pattern import Pattern, check_pattern_type
from longattn.patterncache.patterns.parts import joined, joint_period, outside, through
from longattn.patterncache.plan import Branch, Counts
from longattn.patterncache.spans import Rectangle, Rows


@dataclass(frozen=True)
class _Combination(Pattern):
    """What the three have in common: parts without an order, all for the same rectangle, and counts joined elementwise.

    Attributes:
        holds: whether the combination is causal, binary or closed when all parts are, or when any is.
        join_counts: joins the counts of two parts. join_masks: joins block masks of one block size to one, or None: they stay apart.
    """

    parts: Sequence[Pattern]
    holds: ClassVar[Callable[[Iterable[bool]], bool]] = all
    join_counts: ClassVar[np.ufunc]
    join_masks: ClassVar[np.ufunc | None] = None

    def __post_init__(self) -> None:
        if not isinstance(self.parts, (tuple, list)) or not self.parts:
            raise TypeError(f"parts must be a tuple of at least one Pattern, got {self.parts!r}")
        parts: list[Pattern] = []
        for at, part in enumerate(self.parts):
            check_pattern_type(f"parts[{at}]", part)
            parts += part.parts if isinstance(part, _Combination) and type(part) is type(self) else (part,)
        if self.join_masks is not None:
            parts = joined(list(dict.fromkeys(parts)), self.join_masks, same_causal=self.holds is all)
        # Sorted: neither order nor brackets change what is meant.
        object.__setattr__(self, "parts", tuple(sorted(parts, key=lambda part: part.canonical())))

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """Whether all parts are causal, or any is."""
        return self.holds(part.causal for part in self.parts)

    @property
    def binary(self) -> bool:
        """Whether all parts are, or any is."""
        return self.holds(part.binary for part in self.parts)

    @property
    def positional(self) -> bool:
        """Whether any part is positional."""
        return any(part.positional for part in self.parts)

    @property
    def repeats(self) -> tuple[int | None, bool]:
        """The parts' common one. What all parts must see is closed by one closed part; what any may see, by all of them."""
        return joint_period(self.parts, self.holds)

    def gaps(self, rectangle: Rectangle) -> Iterator[Gap]:
        """Those of every part."""
        for part in self.parts:
            yield from part.gaps(rectangle)

    def check_rectangle(self, rectangle: Rectangle) -> None:
        """All parts must mean something there."""
        for part in self.parts:
            part.check_rectangle(rectangle)

    def with_causal(self, causal: bool) -> Self:
        """All parts with their causal field replaced; itself where `causal` has that value already, even if parts differ."""
        if causal == self.causal:
            return self
        return type(self)(tuple(part.with_causal(causal) for part in self.parts))

    def to_spec(self) -> dict[str, Any]:
        """The parts, as [name, spec]."""
        return {"parts": [[part.name, part.to_spec()] for part in self.parts]}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """From the parts' [name, spec]."""
        return cls(tuple(build_pattern(*part) for part in spec["parts"]))

    def count(self, h: Rows, i: Rows, j: Rows, num_heads: int) -> Counts:
        """The parts' counts, joined elementwise."""
        return reduce(self.join_counts, (part.count(h, i, j, num_heads) for part in self.parts))


@dataclass(frozen=True)
class Union(_Combination, name="union"):
    """counts = the largest of the parts': `a | b`. In strides where all parts but one have a complement (`Pattern.complements`) and that
    one is `layered`; else rows are listed. Block masks of one block size become one mask.

    Args:
        parts: patterns, at least one.

    Raises:
        TypeError: parts is not a tuple or list of patterns, or empty.
    """

    join_counts = np.maximum
    join_masks = np.logical_or

    @property
    def listing(self) -> bool:
        """Where no order of the parts can be told apart in strides, or any part lists."""
        return self._other() is None or any(part.listing for part in self.parts)

    def _other(self) -> int | None:
        """Which part the others are told apart from: the one without a complement, or the first; None where there are several."""
        others = [at for at, part in enumerate(self.parts) if not (part.complements and part.filters and part.binary)]
        if len(others) > 1 or (others and len(self.parts) > 1 and not self.parts[others[0]].layered):
            return None
        return others[0] if others else 0

    def branches(self, rectangle: Rectangle) -> Iterator[Branch]:
        """Of every part what no part before it shows, and what the last counts beyond one; or listed rows.

        With b counted at most once, max(a, b) = b + a outside b + (a - 1) inside b.
        """
        at = self._other()
        if at is None:
            yield from super().branches(rectangle)
            return
        other, filters = self.parts[at], (*self.parts[:at], *self.parts[at + 1 :])
        for turn, part in enumerate((*filters, other)):
            yield from outside(filters[:turn], part.branches(rectangle), rectangle)
        if filters:
            for turn, part in enumerate(filters):
                again = outside(filters[:turn], other.excess(rectangle), rectangle)
                yield from through(part, again, rectangle)


@dataclass(frozen=True)
class Intersection(_Combination, name="intersection"):
    """counts = the smallest of the parts': `a & b`. In strides where a part counts at most once and all but one can filter.

    Args:
        parts: patterns, at least one.

    Raises:
        TypeError: parts is not a tuple or list of patterns, or empty.
    """

    holds = any
    join_counts = np.minimum
    join_masks = np.logical_and

    @property
    def filters(self) -> bool:
        """Whether every part does."""
        return all(part.filters for part in self.parts)

    def within(self, branch: Branch, rectangle: Rectangle) -> Iterator[Branch]:
        """`branch` within every part."""
        seen = iter((branch,))
        for part in self.parts:
            seen = through(part, seen, rectangle)
        return seen

    def branches(self, rectangle: Rectangle) -> Iterator[Branch]:
        """What one part sees, once, within the others; or listed rows."""
        base = self._base()
        if base is None:
            return super().branches(rectangle)
        seen = (self.parts[base].branches if len(self.parts) == 1 else self.parts[base].support)(rectangle)
        for part in (*self.parts[:base], *self.parts[base + 1 :]):
            seen = through(part, seen, rectangle)
        return seen

    @property
    def listing(self) -> bool:
        """Where no part can be filtered by the others, or any part lists."""
        return self._base() is None or any(part.listing for part in self.parts)

    def _base(self) -> int | None:
        """Which part's branches the others filter, or None."""
        for at, base in enumerate(self.parts):
            others = (*self.parts[:at], *self.parts[at + 1 :])
            # The smallest of counts is 1 wherever all see, once any part counts at most once.
            once = base.layered and (base.binary or any(part.binary for part in others))
            if (once or not others) and all(part.filters for part in others):
                return at
        return None


@dataclass(frozen=True)
class Sum(_Combination, name="sum"):
    """counts = the sum of the parts': `a + b`. A key that two parts show counts twice, as with two branches of `Dilated`.

    Args:
        parts: patterns, at least one.

    Raises:
        TypeError: parts is not a tuple or list of patterns, or empty.
    """

    join_counts = np.add

    @property
    def binary(self) -> bool:
        """False: a key that two parts show counts twice."""
        return False

    @property
    def addends(self) -> tuple[Pattern, ...]:
        """Those of every part; of one without, the part itself."""
        return tuple(addend for part in self.parts for addend in part.addends or (part,))

    @property
    def listing(self) -> bool:
        """Where any part does."""
        return any(part.listing for part in self.parts)

    def branches(self, rectangle: Rectangle) -> Iterator[Branch]:
        """The branches of every part."""
        for part in self.parts:
            yield from part.branches(rectangle)
