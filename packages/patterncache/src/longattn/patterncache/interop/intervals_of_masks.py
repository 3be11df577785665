"""Masks whose queries see one interval of keys each: found with a few looks at every row, and named as bands and documents.

Each query is asked about itself, then where its interval begins and ends, by halving: about 2 * log2(N) questions a query. What the
intervals have in common (documents whose queries see no key outside, a widest reach back and ahead) makes the pattern, which the caller
compares with the mask, pair by pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from longattn.patterncache.pattern import Pattern
from longattn.patterncache.patterns.documents import Documents
from longattn.patterncache.patterns.periodic import Periodic
from longattn.patterncache.patterns.window import Full, Window
from longattn.patterncache.spans import Rows

Asks = Callable[[Rows, Rows], npt.NDArray[np.bool_]]
"""Whether queries see keys, elementwise."""


def pattern_of_intervals(sees: Asks, length: int) -> tuple[Pattern, Rows, Rows] | None:
    """(pattern, first key, end of keys) that a mask has if every query sees one interval with itself in it; None where none fits.

    Only some pairs have been asked about: the mask may show something else.
    """
    every = np.arange(length, dtype=np.int64)
    if not sees(every, every).all():
        return None
    begin = every - _reach(lambda far: sees(every, every - far), every)
    end = every + 1 + _reach(lambda far: sees(every, every + far), length - 1 - every)
    borders = _borders(begin, end)
    within = np.searchsorted(borders, every, side="right") - 1
    back, ahead = every - begin, end - 1 - every
    band = _band(back, every - borders[within], ahead, borders[within + 1] - 1 - every, length)
    if band is None:
        return None
    return band if len(borders) == 2 else Documents(borders.tolist(), band), begin, end


def _reach(seen: Callable[[Rows], npt.NDArray[np.bool_]], most: Rows) -> Rows:
    """The farthest distance up to `most` that each row sees, if it sees all up to there: by halving."""
    low, high = np.zeros_like(most), most.copy()
    while (low < high).any():
        middle = (low + high + 1) // 2
        there = seen(middle)
        low, high = np.where(there, middle, low), np.where(there, high, middle - 1)
    return low


def _borders(begin: Rows, end: Rows) -> Rows:
    """Where documents begin, and the end of the last: no query sees across a border."""
    earliest_later = np.minimum.accumulate(begin[::-1])[::-1]
    latest_before = np.concatenate([[0], np.maximum.accumulate(end)[:-1]])
    at = np.arange(len(begin))
    return np.append(np.flatnonzero((earliest_later >= at) & (latest_before <= at)), len(begin))


def _band(back: Rows, room_back: Rows, ahead: Rows, room_ahead: Rows, length: int) -> Pattern | None:
    """The pattern within documents that reaches so far back and ahead, where there is room; None where queries differ."""
    reaches: list[int | None] = []
    for reach, room in ((back, room_back), (ahead, room_ahead)):
        farthest = int(reach.max())
        if (reach != np.minimum(room, farthest)).any():
            return None
        reaches.append(None if (reach == room).all() and farthest else farthest)
    far_back, far_ahead = reaches
    if far_ahead == 0:
        return Full(causal=True) if far_back is None else Window(far_back + 1)
    if far_back is None and far_ahead is None:
        return Full()
    if far_back == far_ahead and far_back is not None:
        return Window(far_back + 1, causal=False)
    return Periodic(1, [(0, 0, None if far_ahead is None else -far_ahead, far_back)], length)


def strips(begin: Rows, end: Rows, rows: int) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
    """(first query, (rows, keys) bool) of the mask of these intervals, some rows at a time."""
    keys = np.arange(len(begin), dtype=np.int32)[None]
    for first in range(0, len(begin), rows):
        low, high = (side[first : first + rows, None].astype(np.int32) for side in (begin, end))
        yield first, (keys >= low) & (keys < high)
