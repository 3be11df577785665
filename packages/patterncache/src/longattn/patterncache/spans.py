"""`Span` and `Rectangle`: which positions of the whole sequence the rows at hand are.

A *position* is a place in the whole sequence; a *row* is a place in the tensor at hand. A `Span` maps one to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from operator import index
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
T = TypeVar("T")


MOST = 1 << 60
"""The largest length, position or step: sums of a few of them stay within int64."""

MOST_HEADS = 1 << 20
"""Heads that a module may have: groups of them are looked at one by one."""


def check_int(name: str, value: object, *, minimum: int, maximum: int = MOST) -> int:
    """Return `value` as int, or raise TypeError / ValueError that names it. Booleans, floats and strings are refused."""
    if type(value) is int and minimum <= value <= maximum:
        return value
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer >= {minimum}, got {shortened(value)} ({type(value).__name__})")  # pyright: ignore[reportUnknownArgumentType]
    # `index` also makes a constant of a symbolic size that torch.compile traces: another value is another graph.
    number = index(value)  # pyright: ignore[reportUnknownArgumentType]
    if number < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {shortened(number)}")
    if number > maximum:
        raise ValueError(f"{name} must be an integer from {minimum} to {maximum}, got {shortened(number)}")
    return number


def check_kind(name: str, value: object, kind: type[T]) -> T:
    """Return `value`, or raise TypeError that names it unless it is a `kind`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {shortened(value)} ({type(value).__name__})")
    return value


def check_flag(name: str, value: object) -> bool:
    """Return `value`, or raise TypeError that names it unless it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shortened(value)} ({type(value).__name__})")
    return value


def shortened(value: object, most: int = 200) -> str:
    """The repr of a value for an error message, cut where it is long."""
    if isinstance(value, int) and value.bit_length() > most:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (str, bytes)) and len(value) > most:
        return f"{value[:most]!r}... ({len(value)} characters)"
    if isinstance(value, (tuple, list)) and len(value) > most:  # pyright: ignore[reportUnknownArgumentType]
        return f"{shortened(value[:8], most)}... ({len(value)} entries)"  # pyright: ignore[reportUnknownArgumentType]
    try:
        text = repr(value)  # pyright: ignore[reportUnknownArgumentType]
    except ValueError:  # a number within has more digits than Python writes
        return f"a {type(value).__name__}"  # pyright: ignore[reportUnknownArgumentType]
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


@dataclass(frozen=True, slots=True)
class Span:
    """`length` positions from `start`, `step` apart: start, start + step, ...

    Contiguous shards have step 1, striped ring shards step = ring size; a zigzag shard is two spans.

    Raises:
        TypeError, ValueError: start or length is not an integer >= 0, or step not an integer >= 1.
    """

    start: int
    length: int
    step: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", check_int("start", self.start, minimum=0))
        object.__setattr__(self, "length", check_int("length", self.length, minimum=0))
        object.__setattr__(self, "step", check_int("step", self.step, minimum=1))

    @property
    def last(self) -> int:
        """The last position (start - step when empty)."""
        return self.start + (self.length - 1) * self.step

    @property
    def numbers(self) -> tuple[int, int, int]:
        """(start, length, step): `Span(*numbers)` is this span."""
        return self.start, self.length, self.step

    def positions(self) -> Rows:
        """(length,) int64."""
        return np.arange(self.length, dtype=np.int64) * self.step + self.start

    def congruent(self, residue: int, modulus: int) -> tuple[int, int, int]:
        """The members equal to `residue` modulo `modulus`, as (first index, count, index step) within this span."""
        return congruent_index(self, 0, self.last + 1, residue, modulus)

    def take(self, first: int, count: int, step: int = 1) -> Span:
        """The sub-span of members first, first + step, ... (`count` of them)."""
        return Span(self.start + first * self.step if count else 0, count, self.step * step)


def congruent_indices(span: Span, low: Rows, high: Rows, residue: Rows, modulus: int) -> tuple[Rows, Rows, int]:
    """For each window [low, high) of positions: which members of `span` lie in it and equal `residue` modulo `modulus`.

    Returns (first index, count, index step); the step is the same for all windows. Solves start + a * step = residue (mod modulus)
    by the extended Euclid, so that a strided span over a dilated residue is again affine.
    """
    divisor = gcd(span.step, modulus)
    stride = modulus // divisor
    inverse = pow(span.step // divisor, -1, stride) if stride > 1 else 0
    solvable = (residue - span.start) % divisor == 0
    phase = ((residue - span.start) // divisor * inverse) % stride
    begin = np.maximum(-((span.start - low) // span.step), 0)
    end = np.minimum((high - 1 - span.start) // span.step, span.length - 1)
    first = begin + (phase - begin) % stride
    count = np.where(solvable & (first <= end), (end - first) // stride + 1, 0)
    return first, count, stride


def congruent_index(span: Span, low: int, high: int, residue: int, modulus: int) -> tuple[int, int, int]:
    """`congruent_indices` of one window, in plain integers: (first index, count, index step)."""
    divisor = gcd(span.step, modulus)
    stride = modulus // divisor
    begin = max(-((span.start - low) // span.step), 0)
    apart = residue - span.start
    phase = apart // divisor * pow(span.step // divisor, -1, stride) % stride if stride > 1 else 0
    first = begin + (phase - begin) % stride
    end = min((high - 1 - span.start) // span.step, span.length - 1)
    return first, (end - first) // stride + 1 if first <= end and not apart % divisor else 0, stride


@dataclass(frozen=True, slots=True, init=False)
class Rectangle:
    """What a plan is for: some of the `num_heads` query heads x query positions x key positions.

    Args:
        num_heads: query heads of the whole module; head assignment depends on it.
        queries, keys: one span, or a tuple of spans whose rows follow one another in the tensor (zigzag shards: two).
        heads: the global query heads present here; None is all of them.

    Raises:
        TypeError, ValueError: a count or span that is not one, or heads beyond num_heads.
    """

    num_heads: int
    queries: tuple[Span, ...]
    keys: tuple[Span, ...]
    heads: Span

    def __init__(
        self,
        num_heads: int,
        queries: Span | Sequence[Span],
        keys: Span | Sequence[Span],
        heads: Span | None = None,
    ) -> None:
        total = check_int("num_heads", num_heads, minimum=1, maximum=MOST_HEADS)
        heads = Span(0, total) if heads is None else heads
        if not isinstance(heads, Span):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"heads must be a Span of global query heads or None, got {shortened(heads)}")
        if heads.length and heads.last >= total:
            raise ValueError(f"heads must lie below num_heads={total}, got {heads}")
        object.__setattr__(self, "num_heads", total)
        object.__setattr__(self, "queries", _span_tuple("queries", queries))
        object.__setattr__(self, "keys", _span_tuple("keys", keys))
        object.__setattr__(self, "heads", heads)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(heads, queries, keys)."""
        return self.heads.length, sum(s.length for s in self.queries), sum(s.length for s in self.keys)

    def query_positions(self) -> Rows:
        """(queries,) int64, in row order."""
        return np.concatenate([s.positions() for s in self.queries] or [np.empty(0, np.int64)])

    def key_positions(self) -> Rows:
        """(keys,) int64, in row order."""
        return np.concatenate([s.positions() for s in self.keys] or [np.empty(0, np.int64)])


def _span_tuple(name: str, value: Span | Sequence[Span]) -> tuple[Span, ...]:
    if isinstance(value, Span):
        return (value,)
    if not isinstance(value, (tuple, list)) or not all(isinstance(s, Span) for s in value):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{name} must be a Span or a tuple of Spans, got {shortened(value)}")
    return tuple(value)
