"""`Restrict`: a pattern where another one sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longattn.patterncache.analysis.results import Gap
from longattn.patterncache.canonical import build_pattern
from longattn.patterncache.pattern import Pattern, check_pattern_type
from longattn.patterncache.patterns.parts import joint_period, outside, through
from longattn.patterncache.plan import Branch, Counts
from longattn.patterncache.spans import Rectangle, Rows


@dataclass(frozen=True)
class Restrict(Pattern, name="restrict"):
    """counts of `a` where `b` sees at all, else 0: `b` filters, and never adds.

    Args:
        a: the pattern whose multiplicities count.
        b: the pattern that must also see the pair.
    """

    a: Pattern
    b: Pattern

    def __post_init__(self) -> None:
        check_pattern_type("a", self.a)
        check_pattern_type("b", self.b)

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """Whether either part is causal."""
        return self.a.causal or self.b.causal

    @property
    def positional(self) -> bool:
        """Whether either part is positional."""
        return self.a.positional or self.b.positional

    @property
    def binary(self) -> bool:
        """Whether a is."""
        return self.a.binary

    @property
    def all_of(self) -> Sequence[Pattern]:
        """Both parts."""
        return self.a, self.b

    @property
    def addends(self) -> tuple[Pattern, ...]:
        """Those of a, each where b sees."""
        return tuple(Restrict(part, self.b) for part in self.a.addends)

    @property
    def filters(self) -> bool:
        """Whether both parts do."""
        return self.a.filters and self.b.filters

    @property
    def listing(self) -> bool:
        """Where b cannot filter, or either part lists."""
        return not self.b.filters or self.a.listing or self.b.listing

    @property
    def repeats(self) -> tuple[int | None, bool]:
        """The parts' common one; one closed part closes what both must see."""
        return joint_period((self.a, self.b), any)

    def gaps(self, rectangle: Rectangle) -> Iterator[Gap]:
        """Those of both parts."""
        yield from self.a.gaps(rectangle)
        yield from self.b.gaps(rectangle)

    def within(self, branch: Branch, rectangle: Rectangle) -> Iterator[Branch]:
        """`branch` within a, then within b."""
        return through(self.b, self.a.within(branch, rectangle), rectangle)

    @property
    def complements(self) -> bool:
        """Whether both parts do, and a counts at most once."""
        return self.a.complements and self.a.filters and self.b.complements

    def without(self, branch: Branch, rectangle: Rectangle) -> Iterator[Branch]:
        """`branch` without a, and what b hides of it within a."""
        yield from self.a.without(branch, rectangle)
        yield from outside(self.b, self.a.within(branch, rectangle), rectangle)

    @property
    def terms(self) -> Sequence[Pattern]:
        """Those of a, each where b sees, if b filters and has a complement."""
        return [Restrict(term, self.b) for term in self.a.terms] if self.b.filters and self.b.complements else ()

    def check_rectangle(self, rectangle: Rectangle) -> None:
        """Both parts must mean something there."""
        self.a.check_rectangle(rectangle)
        self.b.check_rectangle(rectangle)

    def with_causal(self, causal: bool) -> Restrict:
        """Both parts with their causal field replaced."""
        return Restrict(self.a.with_causal(causal), self.b.with_causal(causal))

    def count(self, h: Rows, i: Rows, j: Rows, num_heads: int) -> Counts:
        """counts of a where b > 0."""
        return np.where(self.b.count(h, i, j, num_heads) > 0, self.a.count(h, i, j, num_heads), 0)

    def to_spec(self) -> dict[str, Any]:
        """Both parts, as [name, spec]."""
        return {name: [part.name, part.to_spec()] for name, part in (("a", self.a), ("b", self.b))}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Restrict:
        """From [name, spec] of both parts."""
        return cls(build_pattern(*spec["a"]), build_pattern(*spec["b"]))

    def branches(self, rectangle: Rectangle) -> Iterator[Branch]:
        """Where b filters, what it leaves of a's branches; else listed."""
        if self.b.filters:
            return through(self.b, self.a.branches(rectangle), rectangle)
        return super().branches(rectangle)
