"""What combined patterns do with their parts: periods, branches within and outside, and block masks that become one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import lcm

import numpy as np

from longattn.patterncache.pattern import Pattern
from longattn.patterncache.patterns.block_sparse import BlockSparse
from longattn.patterncache.plan import Branch
from longattn.patterncache.spans import Rectangle


def joint_period(parts: Sequence[Pattern], closes: Callable[[Iterable[bool]], bool]) -> tuple[int | None, bool]:
    """The parts' common period; whether it is closed is for `any` or `all` of them to say."""
    periods = [period for period, _ in (part.repeats for part in parts) if period is not None]
    if len(periods) < len(parts):
        return None, False
    return lcm(*periods), closes(closed for _, closed in (part.repeats for part in parts))


def through(b: Pattern, branches: Iterator[Branch], rectangle: Rectangle) -> Iterator[Branch]:
    """What a pattern sees of some branches."""
    for branch in branches:
        yield from b.within(branch, rectangle)


def outside(parts: Sequence[Pattern], branches: Iterator[Branch], rectangle: Rectangle) -> Iterator[Branch]:
    """What none of the parts sees of some branches."""
    for branch in branches:
        left = iter((branch,))
        for part in parts:
            left = _without(part, left, rectangle)
        yield from left


def _without(part: Pattern, branches: Iterator[Branch], rectangle: Rectangle) -> Iterator[Branch]:
    for branch in branches:
        yield from part.without(branch, rectangle)


def joined(parts: list[Pattern], join: np.ufunc, *, same_causal: bool) -> list[Pattern]:
    """`parts` with block masks of one block size and shape joined to one mask."""
    others: list[Pattern] = []
    masks: dict[tuple[object, ...], BlockSparse] = {}
    for part in parts:
        if not isinstance(part, BlockSparse):
            others.append(part)
            continue
        key = (part.block_size, part.mask.shape, part.causal if same_causal else None)
        other = masks.get(key, part)
        if other is not part:
            part = BlockSparse(part.block_size, join(other.mask, part.mask), other.causal or part.causal)
        masks[key] = part
    return [*others, *masks.values()]
