"""`for_length`: dilated patterns with a window whose layers, stacked, join every token to all that it may hear of.

A causal dilated branch alone never joins all tokens at any depth unless its rate is 1: a token whose residue no head has, or the first token
of a residue, hears of nobody near. A window mends it. For each rate the narrowest window that joins is found with `reach`, exactly.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import log

from longattn.patterncache.analysis.propagation import stretches
from longattn.patterncache.analysis.reach import layers_needed
from longattn.patterncache.pattern import Pattern, check_causal
from longattn.patterncache.patterns.dilated import Dilated
from longattn.patterncache.patterns.window import Window
from longattn.patterncache.spans import MOST_HEADS, check_int, shortened

MOST_FOLLOWED = 1 << 14
"""Tokens up to which a candidate is followed; rates that need more are not tried."""


def for_length(
    length: int, layers: int, budget: float | None = None, num_heads: int = 8, causal: bool = True
) -> Pattern:
    """See `Dilated.for_length`."""
    length = check_int("N", length, minimum=1)
    layers = check_int("layers", layers, minimum=1)
    num_heads = check_int("num_heads", num_heads, minimum=1, maximum=MOST_HEADS)
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, (int, float))):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"budget must be None or a number of keys, got {shortened(budget)} ({type(budget).__name__})")
    if budget is not None and not 0 < budget <= sys.float_info.max:
        raise ValueError(f"budget must be at least a key a query, and finite, got {shortened(budget)}")
    check_causal(causal)
    return _chosen(length, layers, budget, num_heads, causal).pattern


@dataclass(frozen=True)
class _Join:
    """A dilated branch over all of `length` tokens, and a window; width 0 is none."""

    length: int
    rate: int
    width: int
    queries: str
    causal: bool

    @property
    def pattern(self) -> Pattern:
        """The two together."""
        return self.over(self.length)

    def over(self, length: int) -> Pattern:
        """The same over another length."""
        dilated = Dilated((length,), (self.rate,), queries=self.queries, causal=self.causal)
        return dilated if not self.width else dilated + Window(self.width, causal=self.causal)

    @property
    def keys(self) -> float:
        """Keys a query and head in the mean, at most: of the dilated branch, and of the window."""
        return self.dilated_keys + (self.width if self.causal else max(0, 2 * self.width - 1))

    @property
    def dilated_keys(self) -> float:
        """Of the dilated branch, which serves one query in `rate`, or all."""
        served = -(-self.length // self.rate)
        if self.queries == "all":
            later = self.rate * served * (served - 1) / 2 if self.causal else 0
            return served - later / self.length
        return (served * (served + 1) / 2 if self.causal else served * served) / self.length

    def seen_directly(self, num_heads: int) -> float:
        """The share of pairs that some head sees: of residues that heads have, and what of the window is not among them."""
        dilated = min(self.rate, num_heads) / self.rate
        if self.queries != "all":
            dilated /= self.rate
        window = min(1.0, 2 * self.width / self.length)
        return dilated + window * (1 - dilated)

    def widened(self, budget: float) -> _Join:
        """With the widest window that a budget leaves; 0 where it leaves none."""
        left = budget - self.dilated_keys
        width = min(self.length, max(0, int(left if self.causal else (left + 1) / 2)))
        return _Join(self.length, self.rate, width, self.queries, self.causal)

    @property
    def followed(self) -> _Join:
        """As wide as is looked at: a window of twice the rate joins if a wider one does, and so do all wider ones if it does."""
        return _Join(self.length, self.rate, min(self.width, 2 * self.rate), self.queries, self.causal)

    def few(self, layers: int) -> int:
        """Tokens that say as much as all `length` do.

        A pair farther apart than `layers` windows meets over the dilated branch. Moving one end by a multiple of the rate lengthens that hop
        and changes nothing else, as long as the ends stay farther apart than the windows beside it reach. The last tokens, from which no
        window leads on, stay the same where the lengths differ by a multiple of the rate.
        """
        few = layers * self.width + 4 * self.rate
        return self.length if few >= self.length else min(self.length, few + (self.length - few) % self.rate)

    def joins(self, layers: int, num_heads: int) -> bool:
        """Whether all tokens are joined after so many layers, exactly; False where that takes too many tokens to follow."""
        few = self.few(layers)
        if few > MOST_FOLLOWED:
            return False
        pattern = self.over(few)
        return layers_needed(pattern, stretches(pattern, few, num_heads), layers) is not None


@lru_cache(maxsize=256)
def _chosen(length: int, layers: int, budget: float | None, num_heads: int, causal: bool) -> _Join:
    if budget is None:
        return _cheapest(length, layers, num_heads, causal)
    rates = sorted({1, min(num_heads, length), *_rates(length)})
    candidates = (
        _Join(length, rate, 0, queries, causal).widened(budget) for rate in rates for queries in ("dilated", "all")
    )
    affordable = [join for join in candidates if join.keys <= budget and (join.width or join.rate == 1)]
    # Of those that show as many pairs directly, the one with the widest window.
    for join in sorted(affordable, key=lambda join: (-join.seen_directly(num_heads), -join.width)):
        if join.rate == 1 or join.followed.joins(layers, num_heads):
            return join
    cheapest = _cheapest(length, layers, num_heads, causal)
    if not budget >= cheapest.keys:
        raise ValueError(
            f"budget must be at least {cheapest.keys:.4g} keys a query, of the cheapest pattern that joins N={length} tokens in "
            f"layers={layers}, got {shortened(budget)}"
        )
    return cheapest


def _cheapest(length: int, layers: int, num_heads: int, causal: bool) -> _Join:
    # What one layer needs: every residue is seen by all queries in some head.
    best = _Join(length, min(num_heads, length), 0, "all", causal)
    # About where rates are cheapest, so that few of the others are worth a look.
    near = log(max(1, length * max(1, layers - 2))) / 3
    for rate in sorted(_rates(length), key=lambda rate: abs(log(rate) - near)):
        join = _narrowest(_Join(length, rate, 0, "dilated", causal).widened(best.keys).followed, layers, num_heads)
        if join is not None and (join.keys, join.rate) < (best.keys, best.rate):
            best = join
    return best


def _rates(length: int) -> Iterator[int]:
    """2, 3, 4, 6, 8, 12, ...: powers of two and one in the middle."""
    power = 2
    while power < length:
        yield power
        if 3 * power // 2 < length:
            yield 3 * power // 2
        power *= 2


def _narrowest(join: _Join, layers: int, num_heads: int) -> _Join | None:
    """With the narrowest window up to its own that joins; None where that does not."""
    low, high = 1, join.width
    if not high or not join.joins(layers, num_heads):
        return None
    while low < high:
        middle = (low + high) // 2
        if _Join(join.length, join.rate, middle, join.queries, join.causal).joins(layers, num_heads):
            high = middle
        else:
            low = middle + 1
    return _Join(join.length, join.rate, low, join.queries, join.causal)
