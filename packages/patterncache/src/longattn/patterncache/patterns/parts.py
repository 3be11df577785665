"""What combined patterns do with their parts: periods, branches within and outside, and block masks that become one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from math import inf, lcm

import numpy as np

from longattn.patterncache.pattern import Pattern
from longattn.patterncache.patterns.block_sparse import BlockSparse
from longattn.patterncache.plan import Branch
from longattn.patterncache.spans import Rectangle

_MOST_PARTS = 64
"""Short stretches in a long one up to which the long one is cut by them."""


def joint_period(parts: Sequence[Pattern], closes: Callable[[Iterable[bool]], bool]) -> tuple[int | None, bool]:
    """The parts' common period; whether it is closed is for `any` or `all` of them to say."""
    repeats = [part.repeats for part in parts]  # once: a part may have parts of its own
    periods = [period for period, _ in repeats if period is not None]
    if len(periods) < len(parts):
        return None, False
    return lcm(*periods), closes(closed for _, closed in repeats)


def through(part: Pattern, branches: Iterable[Branch], rectangle: Rectangle) -> Iterator[Branch]:
    """What a pattern shows of some branches."""
    for branch in branches:
        yield from part.within(branch, rectangle)


def outside(part: Pattern, branches: Iterable[Branch], rectangle: Rectangle) -> Iterator[Branch]:
    """What a pattern hides of some branches."""
    for branch in branches:
        yield from part.without(branch, rectangle)


Level = Sequence[tuple[Pattern, ...]]
"""Groups of terms: a pair is at this level where all terms of some group show it."""


def level_branches(level: Level, rectangle: Rectangle) -> Iterator[Branch]:
    """Each pair that all terms of some group show, once: of every group what no group before it shows."""
    level = _in_order(level)
    for turn, (first, *others) in enumerate(level):
        branches = first.branches(rectangle)
        for term in others:
            branches = through(term, branches, rectangle)
        for group in level[:turn]:
            branches = _outside_group(group, branches, rectangle)
        yield from branches


def union_with_bands(bands: Sequence[Pattern], terms: Sequence[Pattern], rectangle: Rectangle) -> Iterator[Branch]:
    """max(a, b), where a is whether any band shows a pair, and b how many terms do: a + b outside a + (b - 1) inside a.

    So terms are cut by bands only, not by one another.
    """
    level = [(band,) for band in bands]
    yield from level_branches(level, rectangle)
    for term in terms:
        branches = term.branches(rectangle)
        for band in bands:
            branches = outside(band, branches, rectangle)
        yield from branches
    for n in range(2, len(terms) + 1):
        yield from through_level(level, level_branches([*combinations(terms, n)], rectangle), rectangle)


def through_level(level: Level, branches: Iterable[Branch], rectangle: Rectangle) -> Iterator[Branch]:
    """What all terms of some group show of some branches, each pair once."""
    every = branches if len(level) == 1 else list(branches)
    for turn, group in enumerate(level):
        some = iter(every)
        for term in group:
            some = through(term, some, rectangle)
        for earlier in level[:turn]:
            some = _outside_group(earlier, some, rectangle)
        yield from some


def _in_order(level: Level) -> Level:
    """Groups that cross every border first, as bands do; then by their stretches, short to long where few of them are in a longer one.

    A long tile without the pairs of short stretches has a branch for each of these in it; a short one without those of long stretches has
    two for each residue of theirs, which is more if there are few. A pattern that is no term comes last: nothing can be cut by it.
    """
    size = {group: min(map(_stretch, group)) for group in level}
    finite = [length for length in size.values() if length < inf]
    order = 1 if not finite or max(finite) <= _MOST_PARTS * min(finite) else -1
    return sorted(level, key=lambda group: (not group[0].terms, size[group] < inf, order * size[group]))


def _stretch(term: Pattern) -> float:
    """Positions of the stretches that no pair of a term leaves; infinite where there are none."""
    period, closed = term.repeats
    return period if closed and period is not None else inf


def crosses(term: Pattern) -> bool:
    """Whether pairs of a term cross every border, as far as is known."""
    return _stretch(term) == inf


def _outside_group(group: tuple[Pattern, ...], branches: Iterable[Branch], rectangle: Rectangle) -> Iterator[Branch]:
    """What at least one term of a group hides of some branches, each pair once."""
    for term in group[:-1]:
        every = list(branches)
        yield from outside(term, every, rectangle)
        branches = through(term, every, rectangle)
    yield from outside(group[-1], branches, rectangle)


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
