"""Cutting a banded branch into dense, triangle and strip pieces.

Kernels that skip tiles themselves take a branch whole. Those that know only "all", "causal" and "a mask" take its pieces: most
of the work is then dense or causal, and the masks that are left are at most one strip of query rows tall.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from longattn.patterncache.plan import Band, Branch, Plan
from longattn.patterncache.spans import check_int, check_kind

STRIP = 256
"""Query rows of a masked piece: enough to keep a matrix product busy, few enough that the mask stays small."""


def pieces(plan: Plan, strip: int = STRIP) -> tuple[Branch, ...]:
    """The plan's counts in branches that are dense, a triangle, or a strip of at most `strip` query rows. Kept with the plan."""
    check_kind("plan", plan, Plan)
    check_int("strip", strip, minimum=1)
    by_strip: dict[int, tuple[Branch, ...]] = plan.derived.setdefault("pieces", {})
    if strip not in by_strip:
        by_strip[strip] = tuple(piece for branch in plan.branches for piece in split_band(branch, strip))
    return by_strip[strip]


def narrow(branch: Branch, q: tuple[int, int], k: tuple[int, int], band: Band | None) -> Branch:
    """The part of every tile with query rows q = (first, count) and key rows k = (first, count)."""
    return replace(branch, q=branch.q.narrow(*q), k=branch.k.narrow(*k), band=band)


def narrow_tile(branch: Branch, q: tuple[int, int], k: tuple[int, int]) -> Branch | None:
    """`narrow`, with no band where the part is dense, and None where it shows nothing: a tile to skip."""
    if branch.band is None or not branch.uniform:
        return narrow(branch, q, k, branch.band)
    q_step, k_step = branch.steps
    offset = branch.offset + q[0] * q_step - k[0] * k_step
    nearest, farthest = offset - (k[1] - 1) * k_step, offset + (q[1] - 1) * q_step
    if branch.band.misses(nearest, farthest):
        return None
    return narrow(branch, q, k, None if branch.band.covers(nearest, farthest) else branch.band)


def split_band(branch: Branch, strip: int) -> Iterator[Branch]:
    """Pieces of `branch` whose counts add up to its own. Pieces that see nothing are left out."""
    band = branch.band
    if band is None or not branch.uniform:
        yield branch
    elif band.high is None and band.low is not None and branch.steps[0] == branch.steps[1]:
        yield from _split_causal(branch, band)
    else:
        yield from strips(branch, strip)


def _split_causal(branch: Branch, band: Band) -> Iterator[Branch]:
    # With equal steps, row a sees keys 0 .. a + ahead: a dense block of the past, then a triangle, then rows past the last key.
    assert band.low is not None
    ahead = (branch.offset - band.low) // branch.steps[1]
    skip = max(0, -ahead)
    ahead += skip
    rows, keys = branch.q.count - skip, branch.k.count
    if rows <= 0:
        return
    past = min(ahead, keys)
    if past:
        yield narrow(branch, (skip, rows), (0, past), None)
    side = min(rows, keys - past)
    if side > 0:
        yield narrow(branch, (skip, side), (past, side), band)
        if rows > side:
            yield narrow(branch, (skip + side, rows - side), (past, keys - past), None)


def strips(branch: Branch, rows: int) -> Iterator[Branch]:
    """`branch` cut into at most `rows` query rows a tile, each with only the keys that its band can reach."""
    band = branch.band or Band()
    q_step, k_step = branch.steps
    for first in range(0, branch.q.count, rows):
        count = min(rows, branch.q.count - first)
        if branch.band is None or not branch.uniform:
            yield narrow(branch, (first, count), (0, branch.k.count), branch.band)
            continue
        # Row a sees a contiguous range of keys that only moves forward with a.
        nearest = branch.offset + first * q_step
        farthest = nearest + (count - 1) * q_step
        begin = 0 if band.high is None else max(0, -((band.high - nearest) // k_step))
        end = branch.k.count if band.low is None else min(branch.k.count, (farthest - band.low) // k_step + 1)
        if begin < end:
            inside = band.covers(nearest - (end - 1) * k_step, farthest - begin * k_step)
            yield narrow(branch, (first, count), (begin, end - begin), None if inside else band)
