"""`PackedListed`: a list of run starts in few bytes. Affine indices need none at all.

Starts are kept as base + unit * small numbers, the unit being the length of a run where all starts are whole runs apart, or as the
running sum of their differences where those are smaller still; 8, 16 or 32 bits each. They are widened at every use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from longattn.patterncache.indices import Index, Listed
from longattn.patterncache.plan import Branch, Plan
from longattn.patterncache.spans import Rows

LEAST_BYTES = 256
"""Shorter lists stay as they are: the objects of the packed form take more than it saves."""

_KINDS = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.int64)


@dataclass(frozen=True, eq=False)
class Narrow:
    """(tiles, runs) int64 in few bytes.

    Attributes:
        values: (tiles, runs), of the narrowest integer type that holds them.
        base, unit: a number is base + unit * value.
        axis: along which `values` are differences from the number before (0 before the first), or None: they are the numbers.
    """

    values: npt.NDArray[np.integer]
    base: int
    unit: int
    axis: int | None

    @classmethod
    def of(cls, numbers: Rows, unit: int) -> Narrow:
        """`numbers`, which are not empty, in the narrower of the two forms; `unit` is used where it divides all distances."""
        base = int(numbers.min())
        numbers = numbers - base
        if unit <= 1 or (numbers % unit).any():
            unit = 1
        numbers //= unit
        axis = 1 if numbers.shape[1] > 1 else 0
        plain, differences = _narrowest(numbers), _narrowest(np.diff(numbers, axis=axis, prepend=0))
        if differences.itemsize < plain.itemsize:
            return cls(differences, base, unit, axis)
        return cls(plain, base, unit, None)

    def widen(self) -> Rows:
        """The numbers again, (tiles, runs) int64."""
        values = self.values.astype(np.int64)
        if self.axis is not None:
            np.cumsum(values, axis=self.axis, out=values)
        values *= self.unit
        values += self.base
        return values


class PackedListed(Listed):
    """A `Listed` whose starts are packed. It differs in memory only; `starts` is made each time it is read."""

    def __init__(self, listed: Listed) -> None:
        packed = Narrow.of(listed.starts, listed.run * listed.step)
        packed.values.flags.writeable = False
        for name, value in (("packed", packed), ("run", listed.run), ("step", listed.step)):
            object.__setattr__(self, name, value)

    packed: Narrow

    @property
    def starts(self) -> Rows:  # type: ignore[override]
        """(tiles, runs) int64, read-only."""
        starts = self.packed.widen()
        starts.flags.writeable = False
        return starts

    @property
    def tiles(self) -> int:
        """How many tiles."""
        return self.packed.values.shape[0]

    @property
    def count(self) -> int:
        """Rows per tile."""
        return self.packed.values.shape[1] * self.run

    @property
    def nbytes(self) -> int:
        """Bytes of index data held."""
        return self.packed.values.nbytes

    @property
    def wide_nbytes(self) -> int:
        """Bytes that the starts take unpacked."""
        return 8 * self.packed.values.size

    def __reduce__(self) -> tuple[type[PackedListed], tuple[Listed]]:
        return PackedListed, (Listed(self.starts, self.run, self.step),)


def pack_index(index: Index) -> Index:
    """The same index in fewer bytes, or itself: what is affine, short, or packed already."""
    if isinstance(index, PackedListed) or not isinstance(index, Listed) or index.nbytes < LEAST_BYTES:
        return index
    return PackedListed(index)


def _narrowest(values: Rows) -> npt.NDArray[np.integer]:
    low, high = int(values.min()), int(values.max())
    kind = next(kind for kind in _KINDS if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)
    return values.astype(kind)


def pack_plan(plan: Plan) -> Plan:
    """The same plan with its lists packed, or itself where there is nothing to pack."""
    branches = tuple(_pack_branch(branch) for branch in plan.branches)
    if all(a is b for a, b in zip(branches, plan.branches, strict=True)):
        return plan
    return Plan(plan.rectangle, branches)


def _pack_branch(branch: Branch) -> Branch:
    q = pack_index(branch.q)
    k = q if branch.k is branch.q else pack_index(branch.k)
    return branch if q is branch.q and k is branch.k else replace(branch, q=q, k=k)
