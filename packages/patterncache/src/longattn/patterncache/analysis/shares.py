"""`shares`: which part of the earlier tokens a token sees directly, in two hops, after some layers, or never."""

from __future__ import annotations

import numpy as np

from longattn.patterncache.analysis.propagation import Stretch, Walk
from longattn.patterncache.analysis.reach import check_followed
from longattn.patterncache.analysis.results import Shares
from longattn.patterncache.pattern import Pattern
from longattn.patterncache.spans import Rows, Span

MOST_LAYERS = 256
"""Layers after which a walk that still goes on says nothing about what is never heard of."""


def shares(pattern: Pattern, parts: list[Stretch], length: int, depth: int) -> Shares:
    """The shares of `length` tokens that are made of such stretches. Exact.

    Args:
        pattern: who sees whom. parts: its stretches.
        length: tokens. depth: layers of the model.

    Raises:
        ValueError: a stretch has too many tokens to follow.
    """
    hopes = length * (length - 1) // (2 if pattern.causal else 1)
    if not hopes:
        return Shares(depth, 1.0, 1.0, 1.0, 0.0)
    heard, settled = np.full(4, -length), True
    for part in parts:
        walk = Walk(part.plan, pattern.causal)
        check_followed(walk)
        for block in walk.columns():
            pairs, still = _pairs(walk, block, depth)
            heard += part.times * pairs
            settled = settled and still
    direct, two, within, ever = (heard / hopes).tolist()
    return Shares(depth, direct, two, within, 1 - ever if settled else None)


def _pairs(walk: Walk, block: Span, depth: int) -> tuple[Rows, bool]:
    """(4,) pairs, of a token with itself too, heard of after 1, 2, `depth` and all layers; and whether nothing was added by the last."""
    bits, still, layer = walk.start(block), False, 0
    pairs: dict[int, int] = {}
    while not still and layer < max(MOST_LAYERS, depth):
        before, bits = bits, walk.layer(bits)
        layer, still = layer + 1, np.array_equal(before, bits)
        if layer in (1, 2, depth) or still:
            pairs[layer] = int((walk.reached(bits, block) * walk.nodes.repeat).sum())
    last = max(pairs)
    return np.array([pairs[min(at, last)] for at in (1, 2, depth, last)]), still
