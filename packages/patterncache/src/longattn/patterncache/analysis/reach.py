"""`reach`: how many tokens a token has heard of after some layers, and how many layers it takes to hear of all."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from longattn.patterncache.analysis.components import islands
from longattn.patterncache.analysis.propagation import Stretch, Walk, stretches
from longattn.patterncache.analysis.results import Reach
from longattn.patterncache.pattern import Pattern
from longattn.patterncache.spans import Span, check_int

MOST_NODES = 1 << 17
"""Tokens of a stretch that `reach` follows one by one: beyond, a layer is gigabytes of bits."""


def reach(pattern: Pattern, layers: int, length: int, num_heads: int = 8) -> Reach:
    """What `layers` layers of `pattern` over `length` tokens hear of. Exact.

    Args:
        pattern: who sees whom in every layer.
        layers: at least 0.
        length: tokens, at least 0.
        num_heads: query heads of a layer, at least 1. Default 8.

    Raises:
        TypeError, ValueError: not such integers; or a length that must be followed token by token and is above 131072.
    """
    layers = check_int("layers", layers, minimum=0)
    length = check_int("N", length, minimum=0)
    parts = stretches(pattern, length, check_int("num_heads", num_heads, minimum=1))
    fewest, most, total, apart = length, 0, 0, 0
    for part in parts:
        walk = Walk(part.plan, pattern.causal)
        check_followed(walk)
        heard = _heard(walk, layers)
        fewest, most = min(fewest, int(heard.min(initial=length))), max(most, int(heard.max(initial=0)))
        total += part.times * int((heard * walk.nodes.repeat).sum())
        apart += part.times * count_islands(part)
    needed = layers_needed(pattern, parts)
    complete = needed is not None and needed <= layers
    return Reach(length, layers, fewest, total / max(1, length), most, complete, needed, apart)


def _heard(walk: Walk, layers: int) -> npt.NDArray[np.int64]:
    """(nodes,) int64: tokens that each node has heard of; nodes with `repeat` 0 get the largest figure of the others."""
    heard = np.zeros(len(walk.nodes.token), np.int64)
    for block in walk.columns():
        bits = walk.start(block)
        for _ in range(layers):
            before, bits = bits, walk.layer(bits)
            if np.array_equal(before, bits):
                break
        heard += walk.reached(bits, block)
    counted = walk.nodes.repeat > 0
    return np.where(counted, heard, heard[counted].max(initial=0))


def count_islands(part: Stretch) -> int:
    """Islands of one such stretch."""
    label = islands(part.plan)
    # An island is named after its first token.
    return int((label == np.arange(len(label))).sum())


def layers_needed(pattern: Pattern, parts: list[Stretch], most: int | None = None) -> int | None:
    """The least number of layers after which every token has heard of all that it may; None where it never has, or not after `most`."""
    if sum(part.times for part in parts if part.length) > 1:
        # Nothing joins two stretches, but alone each may be done: causal or not, the later one lacks the earlier.
        return None
    needed = 0
    for part in parts:
        if part.length and count_islands(part) > 1:
            return None
        walk = Walk(part.plan, pattern.causal)
        check_followed(walk)
        for block in walk.columns():
            layers = _layers_of(walk, block, most)
            if layers is None:
                return None
            needed = max(needed, layers)
    return needed


def _layers_of(walk: Walk, block: Span, most: int | None) -> int | None:
    bits, goal = walk.start(block), walk.goal(block)
    layers = 0
    while (goal & ~bits).any():
        before, bits = bits, walk.layer(bits)
        if layers == most or np.array_equal(before, bits):
            return None
        layers += 1
    return layers


def check_followed(walk: Walk) -> None:
    """Raise ValueError where the walk is too long to follow."""
    many = len(walk.nodes.token)
    if many > MOST_NODES:
        raise ValueError(f"N must leave at most {MOST_NODES} tokens to follow one by one, got {many}")
