"""`balanced_lengths`: borders of contiguous shards such that every rank computes as many pairs, for any pattern.

Zigzag and striped layouts are even for a causal triangle. Other patterns have their own shape: documents, blocks, dilated segments. Their plans
count the pairs of any queries, so borders are found by bisection, without a model of the pattern.
"""

from __future__ import annotations

import itertools

from longattn.attention.schedules.layouts import MOST_LENGTH, MOST_RANKS
from longattn.attention.validate import check_pattern_argument, check_size
from longattn.patterncache import Pattern, Rectangle, Span


def balanced_lengths(pattern: Pattern, length: int, ranks: int, num_heads: int) -> tuple[int, ...]:
    """Rows of each rank's contiguous shard, for `Ring(group, lengths=...)` and `AllGather`: pairs of each rank differ by a row's at most.

    The rank whose queries see little holds more rows, and so more of q, k and v: what is even is the computation.

    Args:
        pattern: who sees whom; queries and keys are the same sequence. length: of the whole sequence. ranks, num_heads: how many.

    Raises:
        TypeError, ValueError: a bad argument, by name.

    Example:
        >>> balanced_lengths(Full(causal=True), 4096, 4, num_heads=8)
        (2048, 848, 651, 549)
    """
    check_pattern_argument(pattern)
    heads = check_size("num_heads", num_heads)
    length, ranks = check_size("length", length), check_size("ranks", ranks)
    if ranks > MOST_RANKS:
        raise ValueError(f"ranks must be at most {MOST_RANKS}, each of whose shards is looked for, got {ranks}")
    if length > MOST_LENGTH:
        raise ValueError(f"length must be at most {MOST_LENGTH}, whose rows are looked at, got {length}")
    whole = pairs_of(pattern, 0, length, length, heads)
    borders = [0]
    for rank in range(1, ranks):
        # Without a visible pair, rows are shared out evenly.
        wanted = whole * rank / ranks
        low, high = (borders[-1], length) if whole else (length * rank // ranks,) * 2
        while low < high:
            middle = (low + high) // 2
            if pairs_of(pattern, 0, middle, length, heads) < wanted:
                low = middle + 1
            else:
                high = middle
        before = max(borders[-1], low - 1)
        # The border on the nearer side of the share.
        nearer = (
            whole
            and wanted - pairs_of(pattern, 0, before, length, heads) < pairs_of(pattern, 0, low, length, heads) - wanted
        )
        borders.append(before if nearer else low)
    borders.append(length)
    return tuple(high - low for low, high in itertools.pairwise(borders))


def pairs_of(pattern: Pattern, start: int, stop: int, length: int, num_heads: int) -> int:
    """(query, key) pairs that queries start .. stop of a sequence of `length` see, over all heads."""
    if start == stop:
        return 0
    plan = pattern.plan(Rectangle(num_heads, (Span(start, stop - start),), (Span(0, length),)))
    return sum(branch.pairs * branch.heads.length for branch in plan.branches)
