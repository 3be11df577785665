"""`reduced_counts`: who sees whom among more tokens than a map has cells, averaged over square tiles of positions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from longattn.patterncache.pattern import Pattern
from longattn.patterncache.spans import Rectangle, Span, check_int, shortened

NEIGHBOURS = 16
"""Positions of a tile that are looked at, unless a caller says otherwise."""


def reduced_counts(
    pattern: Pattern, length: int, num_heads: int, *, head: int, cells: int = 256, neighbours: int = NEIGHBOURS
) -> npt.NDArray[np.float64]:
    """How often a query of one head sees a key, averaged over square tiles of positions.

    A tile is sampled by the run of neighbouring positions that it begins with. Where `neighbours` is a multiple of all dilation rates, the run
    holds every residue equally often, and inside a segment the average is exact; where a tile has no more positions than that, it is exact
    for every pattern.

    Args:
        pattern: who sees whom.
        length: tokens, at least 1.
        num_heads: query heads, at least 1.
        head: whose map, below num_heads.
        cells: rows and columns of the map, at least 1 (default 256); fewer where there are fewer tokens.
        neighbours: positions sampled in a tile, at least 1. Default 16.

    Returns:
        (cells, cells) float64; rows are queries, columns keys.

    Raises:
        TypeError, ValueError: an argument is not such a value, by name.
    """
    length, num_heads = check_int("length", length, minimum=1), check_int("num_heads", num_heads, minimum=1)
    head = check_int("head", head, minimum=0)
    if head >= num_heads:
        raise ValueError(f"head must be below num_heads={num_heads}, got {shortened(head)}")
    cells = min(check_int("cells", cells, minimum=1), length)
    run = min(length // cells, check_int("neighbours", neighbours, minimum=1))
    spans = tuple(Span(cell * length // cells, run) for cell in range(cells))
    counts = pattern.counts(Rectangle(num_heads=num_heads, queries=spans, keys=spans, heads=Span(head, 1)))
    return counts[0].reshape(cells, run, cells, run).mean(axis=(1, 3))
