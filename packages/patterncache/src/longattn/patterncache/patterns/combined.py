"""Patterns made of patterns: what `a | b`, `a & b` and `a + b` mean.

`Union` counts the largest of its parts, `Intersection` the smallest, `Sum` all of them. Parts are kept in the order of their
canonical strings, so that equal combinations written differently are equal and share a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from typing import Any, ClassVar, Self

import numpy as np

from longattn.patterncache.analysis.results import Gap
from longattn.patterncache.canonical import build_pattern
from longattn.patterncache.pattern import Pattern, check_pattern_type
from longattn.patterncache.patterns.parts import (
    crosses,
    joined,
    joint_period,
    level_branches,
    through,
    through_level,
    union_with_bands,
)
from longattn.patterncache.plan import Branch, Counts
from longattn.patterncache.spans import Rectangle, Rows, shortened


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
            raise TypeError(f"parts must be a tuple of at least one Pattern, got {shortened(self.parts)}")
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
    """counts = the largest of the parts': `a | b`. In strides where all parts but one have `terms`, and that one counts at most once;
    else rows are listed. Block masks of one block size become one mask.

    Args:
        parts: patterns, at least one.

    Raises:
        TypeError: parts is not a tuple or list of patterns, or empty.
    """

    join_counts = np.maximum
    join_masks = np.logical_or

    @property
    def listing(self) -> bool:
        """Where parts cannot be told apart in strides, or any part lists."""
        return self._terms() is None or any(part.listing for part in self.parts)

    @property
    def any_of(self) -> Sequence[Pattern]:
        """The parts."""
        return self.parts

    def _terms(self) -> list[Sequence[Pattern]] | None:
        """The terms of each part, last those of the one without, or with most; None where several have none, or one counts twice."""
        terms = sorted((part.terms for part in self.parts if part.terms), key=len)
        others = [part for part in self.parts if not part.terms]
        return (
            None if len(others) > 1 or not all(part.binary for part in others) else [*terms, *[others] * bool(others)]
        )

    def branches(self, rectangle: Rectangle) -> Iterator[Branch]:
        """Each pair once for every level up to its count: a part is at level n where n of its terms show the pair; or listed rows."""
        terms = self._terms()
        if len(self.parts) == 1:
            yield from self.parts[0].branches(rectangle)
        elif terms is None:
            yield from super().branches(rectangle)
        elif all(len(some) == 1 and crosses(some[0]) for some in terms[:-1]):
            yield from union_with_bands([some[0] for some in terms[:-1]], terms[-1], rectangle)
        else:
            for n in range(1, max(map(len, terms)) + 1):
                # Parts of many terms first: what they show is cut least.
                groups = [group for some in sorted(terms, key=len, reverse=True) for group in combinations(some, n)]
                yield from level_branches(groups, rectangle)


@dataclass(frozen=True)
class Intersection(_Combination, name="intersection"):
    """counts = the smallest of the parts': `a & b`. In strides where all parts but one have `terms`, or filter and count at most once,
    and that one counts at most once.

    Args:
        parts: patterns, at least one.

    Raises:
        TypeError: parts is not a tuple or list of patterns, or empty.
    """

    holds = any
    join_counts = np.minimum
    join_masks = np.logical_and

    @property
    def all_of(self) -> Sequence[Pattern]:
        """The parts."""
        return self.parts

    @property
    def filters(self) -> bool:
        """Whether every part does."""
        return all(part.filters for part in self.parts)

    def within(self, branch: Branch, rectangle: Rectangle) -> Iterator[Branch]:
        """`branch` within every part."""
        shown = iter((branch,))
        for part in self.parts:
            shown = through(part, shown, rectangle)
        return shown

    def branches(self, rectangle: Rectangle) -> Iterator[Branch]:
        """Each pair once for every level that all parts are at; or listed rows."""
        terms = self._terms()
        if len(self.parts) == 1:
            yield from self.parts[0].branches(rectangle)
        elif terms is None:
            yield from super().branches(rectangle)
        else:
            for n in range(1, min(map(len, terms)) + 1):
                first, *others = ([*combinations(some, n)] for some in terms)
                shown = level_branches(first, rectangle)
                for level in others:
                    shown = through_level(level, shown, rectangle)
                yield from shown

    @property
    def listing(self) -> bool:
        """Where no part can be filtered by the others, or any part lists."""
        return self._terms() is None or any(part.listing for part in self.parts)

    def _terms(self) -> list[Sequence[Pattern]] | None:
        """The terms of each part, first those of the one that cannot filter; None where there are several, or a part has none."""
        firsts = [part for part in self.parts if not (part.terms or (part.filters and part.binary))]
        if len(firsts) > 1 or not all(part.binary for part in firsts):
            return None
        # Of parts with several terms one comes first: its branches are made, those of bands and masks only filter.
        rest = sorted((part for part in self.parts if part not in firsts), key=lambda part: -len(part.terms))
        return [*[firsts] * bool(firsts), *[part.terms or (part,) for part in rest]]


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
    def any_of(self) -> Sequence[Pattern]:
        """The parts."""
        return self.parts

    @property
    def addends(self) -> tuple[Pattern, ...]:
        """Those of every part; of one without, the part itself."""
        return tuple(addend for part in self.parts for addend in part.addends or (part,))

    @property
    def terms(self) -> Sequence[Pattern]:
        """Those of all parts, where each has some."""
        return [term for part in self.parts for term in part.terms] if all(part.terms for part in self.parts) else ()

    @property
    def listing(self) -> bool:
        """Where any part does."""
        return any(part.listing for part in self.parts)

    def branches(self, rectangle: Rectangle) -> Iterator[Branch]:
        """The branches of every part."""
        for part in self.parts:
            yield from part.branches(rectangle)
