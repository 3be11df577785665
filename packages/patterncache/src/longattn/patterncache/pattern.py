"""`Pattern`: who sees whom, as a count.

A pattern knows nothing of lengths, tensors or devices. It answers two questions that must agree: `count(h, i, j)`, the
elementwise meaning, and `plan(rectangle)`, the same in strides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from math import prod
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from longattn.patterncache.canonical import register, registered, spec_text
from longattn.patterncache.plan import Branch, Counts, Plan, make_plan
from longattn.patterncache.planning.intervals import Intervals
from longattn.patterncache.planning.limits import counting_pairs
from longattn.patterncache.planning.listing import listed_branches
from longattn.patterncache.spans import Rectangle, Rows, Span, check_flag, check_int, shortened

if TYPE_CHECKING:
    from longattn.patterncache.analysis.results import Gap, Lint, Reach
    from longattn.patterncache.interop.flex import FlexMask


MOST_COUNTS = 1 << 31
"""Dense counts of a rectangle, 8 bytes each."""


class Pattern(ABC):
    """counts[h, i, j] = how many times query position i of global head h sees key position j.

    To write one's own: subclass, name it (`class Mine(Pattern, name="mine")`), give `count`, `to_spec`, `from_spec`, `causal` and
    `with_causal`. `branches` may stay: the default lists the visible rows of any pattern, exactly, without strides.

    Patterns combine: `a | b` counts the larger of both, `a & b` the smaller, `a + b` their sum; `Restrict(a, b)` counts a where b sees.
    """

    name: ClassVar[str]
    causal: bool

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:
            register(name, cls)
            cls.name = name

    @property
    def positional(self) -> bool:
        """Whether meaning depends on positions; then queries that outnumber keys need `q_start`. Default True."""
        return True

    @property
    def binary(self) -> bool:
        """Whether no count is ever above 1. Default False: unknown."""
        return False

    @property
    def filters(self) -> bool:
        """Whether `within` works, so that others can be restricted to this pattern in strides. Default False."""
        return False

    @property
    def listing(self) -> bool:
        """Whether planning looks at every pair of rows (or of blocks) to list what is seen. Default: where `branches` is not overridden.

        `explain` takes the plan of a long rectangle to list rows where this is True, instead of making it.
        """
        return type(self).branches is Pattern.branches

    def within(self, branch: Branch, rectangle: Rectangle) -> Iterator[Branch]:
        """Branches of the pairs of `branch` that this pattern sees, where `filters` is True."""
        raise NotImplementedError(f"{type(self).__name__} does not filter branches")

    @property
    def repeats(self) -> tuple[int | None, bool]:
        """(period, closed): shifting positions by the period changes nothing; closed: no pair crosses a multiple of it.

        Default (None, False): unknown. `lint` and `reach` look at one period of a closed pattern only.
        """
        return None, False

    def stretches(self, length: int) -> Iterator[tuple[Pattern, int, int]]:
        """(pattern, length, times) of parts, in order, that no pair enters or leaves, each seen from position 0 on.

        `lint` and `reach` look at each once. Default: one period and the rest where `repeats` is closed, else one part.
        """
        period, closed = self.repeats
        parts = [(length, 1)]
        if closed and period is not None and period < length:
            parts = [(period, length // period), (length % period, 1)]
        yield from ((self, size, times) for size, times in parts if size or not length)

    def direct_depth(self, length: int) -> int | None:
        """Layers until each of `length` tokens has heard of all that it may, where that follows from the pattern's figures.

        Asked only where no token stands apart from the others. Default None, beyond one token: `lint` follows them layer by layer.
        """
        return 0 if length <= 1 else None

    def gaps(self, rectangle: Rectangle) -> Iterator[Gap]:
        """Residues of dilated branches that no head of a rectangle serves, for `lint`. Default: none."""
        return iter(())

    @property
    def complements(self) -> bool:
        """Whether `without` works, so that others can be joined with this pattern in strides. Default False."""
        return False

    def without(self, branch: Branch, rectangle: Rectangle) -> Iterator[Branch]:
        """Branches of the pairs of `branch` that this pattern does not see, where `complements` is True."""
        raise NotImplementedError(f"{type(self).__name__} does not complement branches")

    @property
    def terms(self) -> Sequence[Pattern]:
        """Patterns that count at most once, filter and have complements, and whose counts add up to this one's: what `|` and `&` are
        planned with, in strides. Default: itself, where it is such a pattern; else none.
        """
        return (self,) if self.binary and self.filters and self.complements else ()

    @property
    def any_of(self) -> Sequence[Pattern]:
        """Patterns of which this one is made so that it sees what any of them sees. Default: none."""
        return ()

    @property
    def all_of(self) -> Sequence[Pattern]:
        """Patterns of which this one is made so that it sees what all of them see. Default: none."""
        return ()

    @property
    def addends(self) -> tuple[Pattern, ...]:
        """Patterns whose counts add up to this one's, one for each branch whose softmaxes LongNet mixes. Default: none, it has no branches.

        `merge_grad="detached"` of `longattn.attention` attends to each of them alone.
        """
        return ()

    def check_rectangle(self, rectangle: Rectangle) -> None:
        """Raise ValueError where this pattern means nothing on part of `rectangle`. Default: it always means something."""
        return

    @abstractmethod
    def count(self, h: Rows, i: Rows, j: Rows, num_heads: int) -> Counts:
        """Elementwise over broadcast global heads h, query positions i, key positions j. This is the meaning of the pattern."""

    @abstractmethod
    def with_causal(self, causal: bool) -> Self:
        """The same pattern with its causal field replaced; its own value changes nothing."""

    @abstractmethod
    def to_spec(self) -> dict[str, Any]:
        """JSON values from which `from_spec` rebuilds this pattern."""

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """The pattern that `to_spec` described."""

    def branches(self, rectangle: Rectangle) -> Iterator[Branch]:
        """Branches whose counts add up to this pattern's. The default lists rows."""
        yield from listed_branches(self.counts, rectangle)

    def document_branches(self, rectangle: Rectangle, documents: Intervals) -> Iterator[Branch] | None:
        """Branches of this pattern within each of many documents, positions counted from a document's start, planned at once.

        Default None: not known; `Documents` then plans one document after the other.
        """
        return None

    def counts(self, rectangle: Rectangle) -> Counts:
        """(heads, queries, keys) int64, dense: for tests, oracles and small sizes.

        Raises:
            ValueError: more than 2 ** 31 of them, which is 16 GiB.
        """
        check_rectangle_type(rectangle)
        if prod(rectangle.shape) > MOST_COUNTS:
            raise ValueError(f"rectangle must have at most {MOST_COUNTS} dense counts, got {rectangle.shape} of them")
        self.check_rectangle(rectangle)
        h = rectangle.heads.positions()[:, None, None]
        i = rectangle.query_positions()[None, :, None]
        j = rectangle.key_positions()[None, None, :]
        counts = self.count(h, i, j, rectangle.num_heads)
        return np.array(np.broadcast_to(counts, rectangle.shape), dtype=np.int64)

    def plan(self, rectangle: Rectangle, *, listed: str | None = None) -> Plan:
        """This pattern in strides, for one rectangle. `plan.counts() == pattern.counts(rectangle)`, always.

        Args:
            rectangle: heads, queries and keys.
            listed: what happens where a pattern without strides needs more than 2 ** 28 pairs looked at one by one. "limit": an
                error that says what it would cost; "allow": they are. Default None: as `LONGATTN_LISTED` in the environment says,
                which is read for each plan, else "limit".

        Raises:
            TypeError, ValueError: an argument is not such a value, the pattern means nothing on part of the rectangle, or too many
                pairs.
        """
        check_rectangle_type(rectangle)
        with counting_pairs(listed):
            self.check_rectangle(rectangle)
            return make_plan(rectangle, self.branches(rectangle))

    def reach(self, layers: int, N: int, num_heads: int = 8) -> Reach:
        """How many of `N` tokens a token has heard of after `layers` layers, exactly; see `longattn.patterncache.analysis.reach`."""
        return above("analysis.reach", "reach")(self, layers, N, num_heads)

    def last_queries(self, keys: Span, num_heads: int = 8) -> Rows:
        """(num_heads, keys) int64: the last query position that sees each key; see `longattn.patterncache.analysis.retention`."""
        return above("analysis.retention", "last_queries")(self, keys, num_heads)

    def lint(
        self,
        N: int,
        num_heads: int = 8,
        *,
        head_dim: int = 64,
        dtype: str = "float32",
        depth: int | None = None,
        follow: bool = True,
    ) -> Lint:
        """What this pattern does to `N` tokens, exactly: islands, gaps, starvation, depth, keys, work; with a `depth` of layers also which
        part of the earlier tokens is seen directly, in two hops, within it, never. `str()` of it is for reading.
        """
        options: dict[str, Any] = {"head_dim": head_dim, "dtype": dtype, "depth": depth, "follow": follow}
        return above("analysis.lint", "lint")(self, N, num_heads, **options)

    def describe(self, N: int = 32, num_heads: int = 8, head: int = 0, png: str | PathLike[str] | None = None) -> str:
        """`lint` of `N` tokens as text, below a map of what each of them sees in one head, for small N; and as a picture at `png`."""
        return above("analysis.lint", "describe")(self, N, num_heads, head, png)

    def to_dense(self, N: int, num_heads: int = 8) -> Counts:
        """(num_heads, N, N) int64: the counts of all of `N` tokens. For small N."""
        length = check_int("N", N, minimum=0)
        return self.counts(Rectangle(num_heads, Span(0, length), Span(0, length)))

    def to_block_mask(self, N: int, num_heads: int = 8, *, block_size: int = 128, device: Any = "cpu") -> FlexMask:
        """FlexAttention's BlockMask and score_mod of `N` tokens, from strides; see `longattn.patterncache.interop.flex`. Needs torch."""
        return above("interop.flex", "to_block_mask")(self, N, num_heads, block_size=block_size, device=device)

    def canonical(self) -> str:
        """The canonical string: equal for equal patterns, and `parse_pattern` reads it back. Kept with the pattern."""
        text = self.__dict__.get("_canonical")
        if text is None:
            text = spec_text([self.name, self.to_spec()])
            object.__setattr__(self, "_canonical", text)
        return text

    def __or__(self, other: Pattern) -> Pattern:
        return self._combined("union", other)

    def __and__(self, other: Pattern) -> Pattern:
        return self._combined("intersection", other)

    def __add__(self, other: Pattern) -> Pattern:
        return self._combined("sum", other)

    def _combined(self, how: str, other: Pattern) -> Pattern:
        if not isinstance(other, Pattern):  # pyright: ignore[reportUnnecessaryIsInstance]
            return NotImplemented
        combination: Any = registered(how)
        combination = combination((self, other))
        return combination.parts[0] if len(combination.parts) == 1 else combination


def above(module: str, function: str) -> Callable[..., Any]:
    """A function of a module that needs `Pattern`, for the methods that are short for it."""
    return getattr(import_module(f"longattn.patterncache.{module}"), function)


def check_pattern_type(name: str, value: object) -> Pattern:
    """Return `value`, or raise TypeError that names the parameter."""
    if not isinstance(value, Pattern):
        raise TypeError(
            f"{name} must be a Pattern such as Dilated or Window, got {shortened(value)} ({type(value).__name__})"
        )
    return value


def check_rectangle_type(value: object) -> Rectangle:
    """Return `value`, or raise TypeError unless it is a Rectangle."""
    if not isinstance(value, Rectangle):
        raise TypeError(
            "rectangle must be a Rectangle, such as Rectangle(heads, Span(0, N), Span(0, N)), "
            f"got {shortened(value)} ({type(value).__name__})"
        )
    return value


def check_causal(value: object) -> bool:
    """Return `value`, or raise TypeError unless it is a bool."""
    return check_flag("causal", value)
