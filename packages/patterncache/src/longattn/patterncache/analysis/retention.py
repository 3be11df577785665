"""Until when keys are needed: the last query position that sees each key, read from the plan of the rows to come.

A plan is in strides, so the rows to come may be as many as integers allow. They end where no pair crosses a multiple of the pattern's
period, where the pattern means nothing any more, and where a part that must see the key sees it last. What any part may see is needed until
the last of them has seen it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from longattn.patterncache.indices import Affine
from longattn.patterncache.pattern import Pattern
from longattn.patterncache.plan import Branch
from longattn.patterncache.planning.limits import TooManyPairsError
from longattn.patterncache.spans import Rectangle, Rows, Span, check_int

FOREVER = 1 << 48
"""What stands for the last query of a key that queries see without end."""

_FAR = FOREVER // 2
"""Queries so far on are the last of the rows that were looked at: the key has no end, only not every row sees it."""

_PAIRS = 1 << 22
"""Pairs that are looked at together where a pattern lists them one by one."""

_ROWS = 1 << 24
"""Keys, each as often as tiles have it, that are looked at one by one; of more, none is given up."""


def last_queries(pattern: Pattern, keys: Span, num_heads: int) -> Rows:
    """(num_heads, keys) int64: the last query position, not before the key, that sees each key; -1: none; `FOREVER` or more: no end is known.

    Exact where the pattern, or each pattern that it is made of, plans in strides or has a period that no pair crosses. A pattern that lists rows
    one by one, or is cut at borders of segments without end, and has no such period is not followed: its keys are needed for ever.

    Args:
        keys: neighbouring positions.
        num_heads: query heads of the module.

    Raises:
        TypeError, ValueError: not such a number of heads; keys with a step other than 1; or the pattern means nothing there.
    """
    check_int("num_heads", num_heads, minimum=1)
    if keys.step != 1:
        raise ValueError(f"keys must be neighbouring positions, a Span of step 1, got {keys}")
    pattern.check_rectangle(Rectangle(num_heads, keys, keys))
    limit = _limit(pattern, keys, num_heads)
    if pattern.any_of:
        last = np.maximum.reduce([last_queries(part, keys, num_heads) for part in pattern.any_of])
        return last if limit is None else np.minimum(last, limit - 1)
    last = np.full((num_heads, keys.length), -1, np.int64)
    for part, stop in _parts(pattern, keys, num_heads, limit):
        columns = last[:, part.start - keys.start : part.start - keys.start + part.length]
        if stop is None:
            columns[:] = FOREVER
            continue
        try:
            plan = pattern.plan(Rectangle(num_heads, Span(part.start, stop - part.start), part))
        except TooManyPairsError:
            columns[:] = FOREVER
            continue
        for branch in plan.branches:
            heads = slice(branch.heads.start, branch.heads.last + 1, branch.heads.step)
            if branch.k.tiles * branch.k.count > _ROWS:
                columns[heads] = FOREVER
                continue
            k_rows, latest = _latest(branch)
            every_key = np.full(part.length, -1, np.int64)
            np.maximum.at(every_key, k_rows.ravel(), latest.ravel())
            columns[heads] = np.maximum(columns[heads], every_key)
    # A query that comes before its key is none of the rows to come.
    return np.where(last >= keys.positions(), last, -1)


def _parts(pattern: Pattern, keys: Span, num_heads: int, limit: int | None) -> Iterator[tuple[Span, int | None]]:
    """(keys, position before which all of their queries stand) in order; None: unknown. Keys that no query sees are left out."""
    period, closed = pattern.repeats
    for run, ends in _runs(pattern, keys, num_heads, limit):
        begin, end = run.start, run.start + run.length
        while begin < end and (ends is None or begin < ends):
            stop, until = end, ends
            if closed and period is not None:
                border = (begin // period + 1) * period
                stop, until = min(end, border), border if ends is None else min(border, ends)
            if pattern.listing and until is not None:
                stop = min(stop, begin + max(1, _PAIRS // (num_heads * (until - begin))))
            yield Span(begin, stop - begin), until if until is not None or pattern.listing else FOREVER + 1
            begin = stop


def _runs(pattern: Pattern, keys: Span, num_heads: int, limit: int | None) -> Iterator[tuple[Span, int | None]]:
    """Neighbouring keys that all have an end, or none, and that end: the limit, or what follows the last query of every part."""
    if not pattern.all_of or not keys.length:
        yield keys, limit
        return
    latest = np.minimum.reduce([last_queries(part, keys, num_heads) for part in pattern.all_of]).max(axis=0)
    borders = (np.flatnonzero(np.diff(latest >= _FAR)) + 1).tolist()
    for first, after in pairwise([0, *borders, keys.length]):
        last = int(latest[first:after].max())
        ends = [limit] if limit is not None else []
        yield (
            Span(keys.start + first, after - first),
            min([*ends, *([last + 1] if last < _FAR else [])], default=None),
        )


def _limit(pattern: Pattern, keys: Span, num_heads: int) -> int | None:
    """The first position at which the pattern means nothing, by bisection of what it refuses; None: there is none."""
    if type(pattern).check_rectangle is Pattern.check_rectangle or not keys.length:
        return None
    known, refused = keys.last + 1, FOREVER + 1
    if _means(pattern, Span(keys.start, refused - keys.start), keys, num_heads):
        return None
    while refused - known > 1:
        middle = (known + refused) // 2
        if _means(pattern, Span(keys.start, middle - keys.start), keys, num_heads):
            known = middle
        else:
            refused = middle
    return known


def _means(pattern: Pattern, queries: Span, keys: Span, num_heads: int) -> bool:
    try:
        pattern.check_rectangle(Rectangle(num_heads, queries, keys))
    except ValueError:
        return False
    return True


def _latest(branch: Branch) -> tuple[Rows, Rows]:
    """Rows of keys, (tiles, count), and the last query position that sees each in its tile, -1 for none."""
    k_rows = branch.k.rows()
    keys = branch.k_at[0] + branch.k_at[1] * k_rows
    low = None if branch.band is None else branch.band.low
    high = None if branch.band is None else branch.band.high
    step = branch.q_at[1] * branch.q.step
    if isinstance(branch.q, Affine):
        runs = branch.q.start + np.arange(branch.q.tiles, dtype=np.int64)[:, None] * branch.q.tile_step
        length = branch.q.count
    else:
        runs, length = branch.q.starts, branch.q.run
    runs = branch.q_at[0] + branch.q_at[1] * runs
    latest, seen = np.full(keys.shape, -1, np.int64), np.zeros(keys.shape, bool)
    if length > 1:
        # Queries of a run may be more than memory holds: by arithmetic.
        for first in np.split(runs, runs.shape[1], axis=1):
            last = np.broadcast_to(first + (length - 1) * step, keys.shape)
            if high is not None:
                last = np.minimum(last, first + (keys + high - first) // max(step, 1) * step)
            latest, seen = np.where(last >= first, np.maximum(latest, last), latest), seen | (last >= first)
    else:
        for tile, (queries, of_tile) in enumerate(zip(np.sort(runs, axis=1), keys, strict=True)):
            until = np.full(of_tile.shape, np.iinfo(np.int64).max) if high is None else of_tile + high
            before: Rows = np.searchsorted(queries, until, side="right")
            latest[tile] = queries[np.maximum(before, 1) - 1]
            seen[tile] = before > 0
    if low is not None:
        seen = seen & (latest - keys >= low)
    return k_rows, np.where(seen, latest, -1)
