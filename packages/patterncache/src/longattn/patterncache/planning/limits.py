"""How many pairs a plan may look at one by one, and the error that says what more would cost.

Strided plans look at no single pair. Listing does: rows of a pattern that has no strides, and runs of a branch that several block
masks have already cut. Such work grows with queries x keys, so each plan counts it and stops at `MOST_PAIRS`.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from longattn.patterncache.spans import shortened

MOST_PAIRS = 1 << 28
"""(head, query, key) pairs that a plan looks at one by one unless more are allowed: some ten seconds."""

CUT_AGAIN = 16
"""Pairs of rows that a pair of runs counts for in a branch that a block mask has already cut: it takes about as long as so many."""

PAIRS_PER_SECOND = 3e7
"""What a core lists, roughly; for error messages only."""

VARIABLE = "LONGATTN_LISTED"
"""Environment variable that decides for plans whose caller does not say."""

CHOICES = ("limit", "allow")


class TooManyPairsError(ValueError):
    """A plan would look at more pairs one by one than is allowed."""


@dataclass
class _Count:
    """Pairs that the plan being made has looked at, and what its caller, or that of the plan around it, says of too many."""

    listed: str | None
    pairs: int = 0


_PLANNING: ContextVar[_Count | None] = ContextVar("longattn_pairs_of_the_plan", default=None)


@contextmanager
def counting_pairs(listed: str | None) -> Generator[None, None, None]:
    """Count the pairs of the plan made inside.

    Args:
        listed: "limit", "allow", or None: as the plan around this one, else as the environment variable says, else "limit".

    Raises:
        ValueError: listed is another value.
    """
    if listed is None:
        around = _PLANNING.get()
        listed = None if around is None else around.listed
    else:
        check_listed("listed", listed)
    token = _PLANNING.set(_Count(listed))
    try:
        yield
    finally:
        _PLANNING.reset(token)


def check_listed(name: str, listed: object) -> None:
    """Raise ValueError unless `listed` is a choice."""
    if listed not in CHOICES:
        raise ValueError(f"{name} must be one of {CHOICES}, got {shortened(listed)}")


def is_limited(listed: str | None) -> bool:
    """Whether the limit is in force for a caller who says so, or says None and leaves it to the environment.

    Raises:
        ValueError: the environment variable is neither unset, nor empty, nor a choice.
    """
    if listed is None:
        listed = os.environ.get(VARIABLE, "").strip() or "limit"
        check_listed(VARIABLE, listed)
    return listed == "limit"


def add_pairs(pairs: int) -> None:
    """Say that planning is about to look at so many pairs. Outside of `counting_pairs` nothing is limited.

    Raises:
        TooManyPairsError: with those, the plan looks at more than `MOST_PAIRS`, and that is not allowed.
    """
    count = _PLANNING.get()
    if count is None:
        return
    count.pairs += pairs
    if count.pairs > MOST_PAIRS and is_limited(count.listed):
        raise TooManyPairsError(
            f"rectangle must need at most {MOST_PAIRS} (head, query, key) pairs looked at one by one, for this pattern has no "
            f"strides there, got at least {count.pairs}: {cost_of(count.pairs, PAIRS_PER_SECOND, 8)}. To plan it all the same, call "
            f'plan(rectangle, listed="allow"), or set {VARIABLE}=allow in the environment'
        )


def check_runs(runs: int) -> None:
    """Say that planning is about to cut an index into so many runs.

    Raises:
        TooManyPairsError: there are more than `MOST_PAIRS`, and that is not allowed.
    """
    count = _PLANNING.get()
    if count is not None and runs > MOST_PAIRS and is_limited(count.listed):
        raise TooManyPairsError(
            f"rectangle must be cut at no more than {MOST_PAIRS} borders of segments or blocks, got {runs}: "
            f'{cost_of(runs, PAIRS_PER_SECOND, 8)}. To plan it all the same, call plan(rectangle, listed="allow"), or set {VARIABLE}=allow'
        )


def cost_of(pairs: int, per_second: float, most_bytes: int) -> str:
    """Time and memory of looking at so many pairs, in words, with up to `most_bytes` bytes kept of each."""
    return f"about {pairs / per_second:.0f} s and up to {pairs * most_bytes / 2**30:.1f} GiB"
