"""Reference counts: does anything but the caller's own handle still reference a buffer?

    alias                                            count that it raises
    another Python name, a container, a hook's copy  Python references to the tensor
    a view, an input saved for backward, DLPack      owners of the TensorImpl
    detach(), numpy, an output saved for backward    owners of the storage
    t.untyped_storage() kept in a variable           Python references to the storage's Python object

The first two matter only to `deallocate`, which looks at one handle. A slot (lease.py) makes a new handle for each request
and keeps none, so every alias of its memory owns the storage or references the storage's Python object: the last two
counts are enough. torch keeps one word beside each storage: the number of owners in the lower half, and in the highest bit
whether the storage has a Python object, which is an owner too. A slot reads the number of owners in place. Usually there is no
Python object, and master and handle are two owners. Where code asked for the object once, its references count as well.

The counts of a fresh buffer depend on the versions of Python and torch. They are measured once, and every kind of alias is
tried against them. If one of them does not raise its count, or Python runs without the GIL (its counts are deferred), no count
is trusted: there are no slots, `deallocate` empties no handle, and memory returns when the last reference dies, which depends
on no count (lease.py).
"""

# torch offers these counts under private names only.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

FREE = 1
"""Owners of a free slot's storage: the master. The storage's Python object, where there is one, is one more."""
TAKEN = 2
"""Owners of a slot's storage with one handle."""
OBJECT_REFERENCES = 2
"""Python references to a storage's Python object that no code keeps: the storage's own, and the counting call's."""

_OWNERS, _OBJECT = 8, 12  # offsets of the two halves of that word; the pointer to virtual functions comes first
_HAS_OBJECT = 1 << 31


class ReferenceCounts(NamedTuple):
    """Python references and C++ owners of one buffer: of its tensor and of its storage."""

    tensor_references: int
    tensor_owners: int
    storage_owners: int
    storage_references: int


def count_references(tensor: object) -> int:
    """Return the Python references to the argument; `deallocate` counts those to its own argument in the same way."""
    return sys.getrefcount(tensor)


def _address_of_object(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


storage_address: Callable[[torch.Tensor], int] = getattr(torch._C, "_storage_address", _address_of_object)
"""Returns the address of a tensor's storage, which names it as long as it lives; torch's own way makes no Python object of it.

Raises RuntimeError for a tensor without a storage, such as a sparse one.
"""


def storage_owners(address: int) -> int:
    """Return the number of owners of the living storage at an address."""
    return torch._C._storage_Use_Count(address)  # pyright: ignore[reportAttributeAccessIssue]


def owners_view(address: int) -> ctypes.c_uint32:
    """Return a view whose `value` is the number of owners of the storage at an address; valid while that storage lives."""
    return ctypes.c_uint32.from_address(address + _OWNERS)


def object_view(address: int) -> ctypes.c_uint32:
    """Return a view of the word that says whether the storage at an address has a Python object; valid while that storage lives."""
    return ctypes.c_uint32.from_address(address + _OBJECT)


def has_unreferenced_object(tensor: torch.Tensor, word: ctypes.c_uint32) -> bool:
    """Return whether the tensor's storage, whose `object_view` is `word`, has a Python object to which no code holds a reference."""
    return bool(word.value & _HAS_OBJECT) and sys.getrefcount(tensor.untyped_storage()) == OBJECT_REFERENCES


def _tensor_owners(tensor: torch.Tensor) -> int:
    return tensor._use_count()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]


def count_all(tensor: torch.Tensor, tensor_references: int) -> ReferenceCounts:
    """Return the four counts; `tensor_references` is what `count_references` returned where the user's call arrived."""
    # This makes the storage's Python object where there is none, so it is one of the owners in every comparison.
    storage = tensor.untyped_storage()
    owners = storage_owners(storage._cdata)
    return ReferenceCounts(tensor_references, _tensor_owners(tensor), owners, sys.getrefcount(storage))


def only_tensor_owns(tensor: torch.Tensor, fresh: ReferenceCounts) -> bool:
    """Return whether the storage's counts are those of a fresh buffer: no other tensor and no variable references it."""
    counts = count_all(tensor, fresh.tensor_references)
    return (counts.storage_owners, counts.storage_references) == (fresh.storage_owners, fresh.storage_references)


def references_under_evaluator() -> int:
    """Return `tensor_references` of a fresh buffer at this moment.

    A call holds its arguments once more while a frame evaluator (PEP 523: torch.compile's, a debugger's) is set. How much
    that adds now is measured on an object that is held by one name and the stack, as the tensor was in `_calibrate`.
    """
    probe = object()
    _, references = probe, count_references(probe)
    return references


@functools.cache
def fresh_counts() -> ReferenceCounts | None:
    """Return the counts of a buffer that one name references, or None where counts cannot be trusted."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None
    if not all(hasattr(torch._C, name) for name in ("_storage_Use_Count", "_storage_address")):
        return None
    if not hasattr(torch.Tensor, "_use_count"):
        return None
    with torch.inference_mode(False):
        return _calibrate() if _slots_can_count() else None


def _calibrate() -> ReferenceCounts | None:
    tensor = torch.frombuffer(memoryview(bytearray(64)), dtype=torch.float32).resize_((4, 4))
    fresh = count_all(tensor, count_references(tensor))
    alias = tensor
    with_alias = count_all(tensor, count_references(tensor))
    alias = tensor[1:]
    with_view = count_all(tensor, count_references(tensor))
    alias = tensor.detach()
    with_detached = count_all(tensor, count_references(tensor))
    alias = tensor.untyped_storage()
    with_storage = count_all(tensor, count_references(tensor))
    del alias
    aliases_show = (
        with_alias.tensor_references > fresh.tensor_references
        and with_view.tensor_owners > fresh.tensor_owners
        and with_detached.storage_owners > fresh.storage_owners
        and with_storage.storage_references > fresh.storage_references
    )
    return fresh if aliases_show and count_all(tensor, count_references(tensor)) == fresh else None


def _slots_can_count() -> bool:
    """Return whether a slot has FREE and TAKEN owners when it should, and other numbers with every kind of alias."""
    slot = _Slot(torch.frombuffer(memoryview(bytearray(64)), dtype=torch.float32))
    return slot.tells_apart(has_object=0) and slot.sees_object() and slot.tells_apart(has_object=1)


_ALIASES: tuple[Callable[[torch.Tensor], object], ...] = (
    lambda tensor: tensor[1:],
    lambda tensor: tensor.detach(),
    lambda tensor: tensor.data,
    lambda tensor: tensor.__dlpack__(),  # pyright: ignore[reportUnknownLambdaType]
    lambda tensor: tensor,
)


class _Slot:
    def __init__(self, master: torch.Tensor) -> None:
        self.master = master
        self.address = storage_address(master)
        self.owners = owners_view(self.address)
        self.word = object_view(self.address)

    def is_counted(self, owners: int, has_object: int) -> bool:
        counts = {self.owners.value, storage_owners(self.address)}
        return counts == {owners + has_object} and has_unreferenced_object(self.master, self.word) == bool(has_object)

    def tells_apart(self, has_object: int) -> bool:
        if not self.is_counted(FREE, has_object):
            return False
        for make_alias in _ALIASES:
            handle = self.master.data
            if not self.is_counted(TAKEN, has_object):
                return False
            alias = make_alias(handle)
            del handle
            if self.is_counted(FREE, has_object):
                return False
            del alias
            if not self.is_counted(FREE, has_object):
                return False
        return True

    def sees_object(self) -> bool:
        referenced = self.master.data.untyped_storage()
        noticed = self.owners.value == FREE + 1 and not has_unreferenced_object(self.master, self.word)
        del referenced
        return noticed and self.is_counted(FREE, has_object=1)
