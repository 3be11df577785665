"""What a cache does to a value before it is kept: `freeze` and `size_of`."""

from __future__ import annotations

from operator import index
from typing import Any, TypeGuard, TypeVar

import numpy as np

from longattn.patterncache.plan import Plan
from longattn.patterncache.planning.packed_lists import pack_plan

T = TypeVar("T")

ENTRY_BYTES = 512
"""What an entry is taken to cost beside its value's `nbytes`: key, dict slots, small objects. An estimate, the same for each."""


BRANCH_BYTES = 500
"""What a branch is taken to hold until its plan is measured, beside its lists."""


def freeze(value: T) -> T:
    """The same value, with arrays read-only and plans packed, those in tuples too.

    An array that has its own memory becomes read-only, and a view of it is handed out, which cannot be made writeable again. One
    that is a view of another's memory is copied. Plans are immutable already. Lists, dicts and other objects are left as they are:
    callers that cache one must not change it. DLPack and torch.from_numpy ignore the read-only flag.
    """
    frozen: Any = value
    if _is_tuple(value):
        frozen = tuple(freeze(part) for part in value)
    elif type(value) is np.ndarray:
        array: np.ndarray[Any, Any] = value
        owned = array if array.base is None else array.copy()
        owned.flags.writeable = False
        frozen = owned.view()
    elif type(value) is Plan:
        frozen = pack_plan(value)
    return frozen


def size_of(value: object) -> int:
    """Bytes of data: `nbytes` where the value has it, the sum over a tuple, else 0."""
    if _is_tuple(value):
        return sum(size_of(part) for part in value)
    nbytes = getattr(value, "nbytes", 0)
    return index(nbytes) if isinstance(nbytes, (int, np.integer)) else 0  # pyright: ignore[reportUnknownArgumentType]


def _is_tuple(value: object) -> TypeGuard[tuple[object, ...]]:
    """Whether a value is a tuple, and not of a class made from it."""
    return type(value) is tuple


def first_estimate(value: object) -> int:
    """Bytes that a new value is taken to hold until it is measured: its data, and the branches of plans."""
    if _is_tuple(value):
        return sum(first_estimate(part) for part in value)
    return size_of(value) + (BRANCH_BYTES * len(value.branches) if type(value) is Plan else 0)


def grows(value: object) -> bool:
    """Whether a value may hold more later than now: plans do."""
    return any(grows(part) for part in value) if _is_tuple(value) else type(value) is Plan


def wide_size_of(value: object) -> int:
    """As `size_of`, with the index data of plans as if it were not packed."""
    if _is_tuple(value):
        return sum(wide_size_of(part) for part in value)
    return value.wide_nbytes if type(value) is Plan else size_of(value)
