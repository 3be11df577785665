"""Heads that the same branches of a plan serve: what is worked out for one of them holds for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longattn.patterncache import Branch


@dataclass(frozen=True, slots=True)
class HeadClass:
    """Owners that are served alike; an owner is `members` neighbouring query heads.

    Attributes:
        owners: numbers of the owners, ascending.
        branches: (member, branch) pairs: what serves each of an owner's heads, in the plan's order.
    """

    owners: list[int]
    branches: list[tuple[int, Branch]]


def head_classes(heads: int, branches: Sequence[Branch], members: int = 1) -> list[HeadClass]:
    """The classes of `heads` query heads, by their first owner; owners that no branch serves are left out."""
    serves = np.zeros((heads, len(branches)), bool)
    for number, branch in enumerate(branches):
        serves[branch.heads.positions(), number] = True
    alike: dict[bytes, list[int]] = {}
    for owner in range(heads // members):
        alike.setdefault(serves[owner * members : (owner + 1) * members].tobytes(), []).append(owner)
    classes: list[HeadClass] = []
    for owners in alike.values():
        first = owners[0] * members
        pairs = [(m, branches[n]) for m in range(members) for n in np.flatnonzero(serves[first + m]).tolist()]
        if pairs:
            classes.append(HeadClass(owners, pairs))
    return classes
