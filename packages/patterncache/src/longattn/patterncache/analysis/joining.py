"""`for_length`: the cheapest dilated pattern with a window whose layers, stacked, join every token to all that it may hear of.

A causal dilated branch alone never joins all tokens at any depth unless its rate is 1: a token whose residue no head has, or the first token
of a residue, hears of nobody near. A window mends it. For each rate the narrowest window that joins is found with `reach`, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator

from longattn.patterncache.analysis.propagation import stretches
from longattn.patterncache.analysis.reach import layers_needed
from longattn.patterncache.pattern import Pattern
from longattn.patterncache.patterns.dilated import Dilated
from longattn.patterncache.patterns.window import Window
from longattn.patterncache.spans import check_int, shortened

MOST_FOLLOWED = 1 << 14
"""Tokens up to which a candidate is followed; rates that need more are not tried."""


def for_length(
    length: int, layers: int, budget: float | None = None, num_heads: int = 8, causal: bool = True
) -> Pattern:
    """See `Dilated.for_length`."""
    length = check_int("N", length, minimum=1)
    layers = check_int("layers", layers, minimum=1)
    num_heads = check_int("num_heads", num_heads, minimum=1)
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, (int, float))):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"budget must be None or a number of keys, got {shortened(budget)} ({type(budget).__name__})")
    candidates = dict(_joining(length, layers, num_heads, causal))
    cheapest = min(candidates, key=lambda rate: (_keys(length, rate, candidates[rate], causal), rate))
    if budget is not None:
        least = _keys(length, cheapest, candidates[cheapest], causal)
        if not budget >= least:
            raise ValueError(
                f"budget must be at least {least:.4g} keys a query, of the cheapest pattern that joins N={length} tokens in "
                f"layers={layers}, got {shortened(budget)}"
            )
        affordable = {
            rate: max(
                width, min(length, int(width + (budget - _keys(length, rate, width, causal)) / (1 if causal else 2)))
            )
            for rate, width in candidates.items()
            if _keys(length, rate, width, causal) <= budget
        }
        cheapest = max(affordable, key=lambda rate: (_seen_directly(length, rate, affordable[rate], num_heads), -rate))
        candidates = affordable
    return _pattern(length, cheapest, candidates[cheapest], causal)


def _pattern(length: int, rate: int, width: int, causal: bool) -> Pattern:
    dilated = Dilated((length,), (rate,), causal=causal)
    return dilated if not width else dilated + Window(width, causal=causal)


def _joining(length: int, layers: int, num_heads: int, causal: bool) -> Iterator[tuple[int, int]]:
    """(rate, narrowest window that joins); rate 1, which needs none, always."""
    yield 1, 0
    for rate in _rates(length):
        width = _narrowest(rate, length, layers, num_heads, causal)
        if width is not None:
            yield rate, width


def _rates(length: int) -> Iterator[int]:
    """2, 3, 4, 6, 8, 12, ...: powers of two and one in the middle."""
    power = 2
    while power < length:
        yield power
        if 3 * power // 2 < length:
            yield 3 * power // 2
        power *= 2


def _narrowest(rate: int, length: int, layers: int, num_heads: int, causal: bool) -> int | None:
    """The narrowest window that joins together with this rate; None where one of twice the rate does not, or it is too long to follow."""
    low, high = 1, min(length, 2 * rate)
    if _followed(rate, high, length, layers) > MOST_FOLLOWED or not _joins(
        rate, high, length, layers, num_heads, causal
    ):
        return None
    while low < high:
        middle = (low + high) // 2
        if _joins(rate, middle, length, layers, num_heads, causal):
            high = middle
        else:
            low = middle + 1
    return low


def _followed(rate: int, width: int, length: int, layers: int) -> int:
    """Tokens that say as much as all `length` do.

    A pair farther apart than `layers` windows meets over the dilated branch. Moving one end by a multiple of the rate lengthens that hop and
    changes nothing else, as long as the ends stay farther apart than the windows beside it reach. The last tokens, from which no window
    leads on, stay the same where the lengths differ by a multiple of the rate.
    """
    few = layers * width + 4 * rate
    return length if few >= length else min(length, few + (length - few) % rate)


def _joins(rate: int, width: int, length: int, layers: int, num_heads: int, causal: bool) -> bool:
    few = _followed(rate, width, length, layers)
    pattern = _pattern(few, rate, width, causal)
    needed = layers_needed(pattern, stretches(pattern, few, num_heads))
    return needed is not None and needed <= layers


def _keys(length: int, rate: int, width: int, causal: bool) -> float:
    """Keys a query and head in the mean, at most: of the dilated branch, which serves one query in `rate`, and of the window."""
    served = -(-length // rate)
    pairs = served * (served + 1) / 2 if causal else served * served
    return pairs / length + (width if causal else max(0, 2 * width - 1))


def _seen_directly(length: int, rate: int, width: int, num_heads: int) -> float:
    """The share of pairs that some head sees: residues that heads have, and what of the window is not among them."""
    dilated = min(rate, num_heads) / rate / rate
    window = min(1.0, 2 * width / length)
    return dilated + window * (1 - dilated)
