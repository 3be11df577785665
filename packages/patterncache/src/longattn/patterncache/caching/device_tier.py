"""`DeviceTier`: copies of plans' index data on devices. A device is no part of a plan's key: one build serves them all.

Torch is imported only here, when tensors are asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary, ref

from longattn.patterncache.interop.csr import as_device, index_arrays
from longattn.patterncache.plan import Plan
from longattn.patterncache.spans import check_flag, check_int, check_kind

Shelf = MutableMapping[Any, Any]
ShelfOf = Callable[[Plan], Shelf | None]
_SHELF = "device arrays"


@dataclass(frozen=True, eq=False)
class IndexTensors:
    """`IndexArrays` as tensors of one device: int32, but for `indptr`, which is int64. See there what they hold."""

    head_class: Any
    indptr: Any
    indices: Any
    counts: Any
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all four."""
        return self.head_class.nbytes + self.indptr.nbytes + self.indices.nbytes + self.counts.nbytes

    def clone(self) -> IndexTensors:
        """A copy that may be written."""
        return IndexTensors(
            self.head_class.clone(), self.indptr.clone(), self.indices.clone(), self.counts.clone(), self.transposed
        )


class DeviceTier:
    """Tensors that stay beside the plans they belong to, made once for each device, bounded in bytes over all plans and devices.

    The life of a plan's tensors: (1) the first call for a device makes them; (2) they stay as long as the plan, in its cache or with
    a caller that holds it; (3) they go with the plan, or before it when the bytes of all are above the limit, the plan that was asked for
    longest ago first. A caller that holds a tensor keeps it; the next call makes another.

    Args:
        max_bytes: of all tensors together. What is being added counts at the next ask. Default None: no limit; 0 keeps none.

    Raises:
        TypeError, ValueError: max_bytes is not an integer >= 0.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self._lock = threading.RLock()
        self.configure(max_bytes)

    def configure(self, max_bytes: int | None = None) -> None:
        """Start with another limit and no counts. Plans keep their tensors, which count again from the next call for them on."""
        limit = None if max_bytes is None else check_int("max_bytes", max_bytes, minimum=0)
        with self._lock:
            self.max_bytes = limit
            self._shelves: WeakKeyDictionary[Plan, tuple[ShelfOf, int]] = WeakKeyDictionary()
            self._evictions = 0
            self._newest: Callable[[], Plan | None] = lambda: None

    def hold(self, plan: Plan, shelf_of: ShelfOf) -> None:
        """Count what `shelf_of(plan)` has, and will have by the next ask, as asked for just now; then make room.

        Args:
            plan: whose tensors.
            shelf_of: finds the mapping that holds them, kept with the plan; its values have `nbytes`.
        """
        with self._lock:
            before = self._newest()
            if before is not None and before in self._shelves:
                self._shelves[before] = (self._shelves[before][0], _nbytes(self._shelves[before][0](before)))
            # Removed and inserted, so that it comes last.
            self._shelves.pop(plan, None)
            self._shelves[plan] = (shelf_of, _nbytes(shelf_of(plan)))
            self._newest = ref(plan)
            self._make_room()

    def _make_room(self) -> None:
        if self.max_bytes is None:
            return
        shelves = list(self._shelves.items())
        total = sum(nbytes for _, (_, nbytes) in shelves)
        for plan, (shelf_of, nbytes) in shelves:
            if total <= self.max_bytes:
                return
            shelf = shelf_of(plan)
            if shelf and nbytes:
                shelf.clear()
                self._evictions += 1
            del self._shelves[plan]
            total -= nbytes

    def resident(self, plan: Plan, device: Any = "cpu", *, transposed: bool = False) -> IndexTensors:
        """The tier's own tensors of `index_arrays(plan)`, for kernels that only read them: who writes, writes for all."""
        check_kind("plan", plan, Plan)
        check_flag("transposed", transposed)
        device = as_device(device)
        torch = import_module("torch")
        with self._lock:
            shelf = plan.derived.setdefault(_SHELF, {})
            tensors = shelf.get((device, transposed))
            if tensors is None:
                arrays = index_arrays(plan, transposed=transposed)
                # Copied by torch.tensor: from_numpy would look into arrays that say they are read-only, and write to them.
                tensors = shelf[device, transposed] = IndexTensors(
                    torch.tensor(arrays.head_class, device=device),
                    torch.tensor(arrays.indptr, device=device),
                    torch.tensor(arrays.indices, device=device),
                    torch.tensor(arrays.counts, device=device),
                    transposed,
                )
            self.hold(plan, _own_shelf)
            return tensors

    def index_tensors(self, plan: Plan, device: Any = "cpu", *, transposed: bool = False) -> IndexTensors:
        """Copies of them, which the caller may write."""
        return self.resident(plan, device, transposed=transposed).clone()

    def get_stats(self) -> dict[str, Any]:
        """`resident_bytes`, counted now; `resident_plans`, `resident_max_bytes`, and `resident_evictions`: plans that lost their tensors."""
        with self._lock:
            sizes = [_nbytes(shelf_of(plan)) for plan, (shelf_of, _) in list(self._shelves.items())]
            return {
                "resident_bytes": sum(sizes),
                "resident_plans": sum(size > 0 for size in sizes),
                "resident_max_bytes": self.max_bytes,
                "resident_evictions": self._evictions,
            }


def _own_shelf(plan: Plan) -> Shelf | None:
    return plan.derived.get(_SHELF)


def _nbytes(shelf: Mapping[Any, Any] | None) -> int:
    # A copy, because other threads may add to the mapping during the sum.
    return sum(value.nbytes for value in list((shelf or {}).values()))
