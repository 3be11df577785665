"""Does anything but the caller's own handle see a buffer? Reference counts, compared with those of a fresh buffer.

    alias                                            raises the count
    another Python name, a container, a hook's copy  of Python references to the tensor
    a view, an input saved for backward, DLPack      of owners of the TensorImpl
    detach(), numpy, an output saved for backward    of owners of the storage
    t.untyped_storage() kept by somebody             of Python references to the storage

The first two matter only while the handle itself is looked at, in `deallocate`. A slot (lease.py) hands out a new
handle each time and keeps none, so whoever sees the memory owns the storage or holds its Python object: the other two
answer. torch keeps a word beside the storage: its owners in the lower half, and on top a bit for "has a Python object", which
is an owner too. A slot reads the owners in place: where master and handle are two, there is no such object. Only where
somebody asked for it once, its references must be counted besides.

What a fresh buffer's counts are depends on the versions of Python and torch, so they are measured once, and each kind
of alias is tried. Where that does not come out as in the table, and on a Python without the GIL, whose counts are
deferred, the guard says "somebody might see it" for ever: there are no slots then, no handle is emptied, and buffers
return when their last reference dies, which rests on no count (see lease.py).
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

FREE = 1
"""Owners of a slot's storage that nobody sees: the master. The storage's Python object, where there is one, is one more."""
TAKEN = 2
"""The same with one handle."""
KEPT = 2
"""Python references to that object while nobody in Python keeps it: the storage's, and the call's that looks."""

_OWNERS, _OBJECT = 8, 12  # where the two halves of the word are, behind the pointer to virtual functions
_FLAG = 1 << 31

_find_address: Callable[[torch.Tensor], int] | None = getattr(torch._C, "_storage_address", None)


class SeenBy(NamedTuple):
    """Counts of who sees one buffer: Python references and C++ owners, of the tensor and of its storage."""

    tensor_references: int
    tensor_owners: int
    storage_owners: int
    storage_references: int


def count_references(tensor: object) -> int:
    """Return the Python references to the caller's argument; deallocate() reads its own in the same way."""
    return sys.getrefcount(tensor)


def storage_address(tensor: torch.Tensor) -> int:
    """Return where the tensor's storage is: a name for it as long as it lives. Makes no Python object of it.

    Raises RuntimeError for a tensor without a storage, such as a sparse one.
    """
    if _find_address is None:
        return tensor.untyped_storage()._cdata
    return _find_address(tensor)


def storage_owners(address: int) -> int:
    """Return how many own the storage at an address, which must be that of a living one."""
    return torch._C._storage_Use_Count(address)  # pyright: ignore[reportAttributeAccessIssue]


def owners_view(address: int) -> ctypes.c_uint32:
    """Return a view whose `value` is how many own the storage at an address, to be read only while that lives."""
    return ctypes.c_uint32.from_address(address + _OWNERS)


def nobody_keeps_object(tensor: torch.Tensor) -> bool:
    """Return whether the tensor's storage has a Python object, and nobody in Python refers to that."""
    flag = ctypes.c_uint32.from_address(storage_address(tensor) + _OBJECT).value & _FLAG
    return bool(flag) and sys.getrefcount(tensor.untyped_storage()) == KEPT


def seen_by(tensor: torch.Tensor, tensor_references: int) -> SeenBy:
    """Return the four counts; `tensor_references` was read in the function that the handle's owner called."""
    # Made here if need be, the storage's Python object owns the storage in every comparison alike.
    storage = tensor.untyped_storage()
    owners = storage_owners(storage._cdata)
    return SeenBy(tensor_references, tensor._use_count(), owners, sys.getrefcount(storage))  # pyright: ignore[reportAttributeAccessIssue]


def only_tensor_owns(tensor: torch.Tensor, fresh: SeenBy) -> bool:
    """Return whether the storage's counts are those of a fresh buffer: no other tensor and no Python name has it."""
    seen = seen_by(tensor, fresh.tensor_references)
    return (seen.storage_owners, seen.storage_references) == (fresh.storage_owners, fresh.storage_references)


def references_under_evaluator() -> int:
    """Return `tensor_references` of a fresh buffer at this moment.

    Calls hold their arguments once more while a frame evaluator (PEP 523: torch.compile's, a debugger's) is set. What
    that is right now is read off an object that nobody else sees, held on the stack as `seen_by`'s tensor was.
    """
    probe = object()
    _, references = probe, count_references(probe)
    return references


@functools.cache
def fresh_counts() -> SeenBy | None:
    """Return the counts of a buffer that nobody else sees, or None where counting cannot be trusted."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None
    if not all(hasattr(torch._C, name) for name in ("_storage_Use_Count", "_storage_address")):
        return None
    if not hasattr(torch.Tensor, "_use_count"):
        return None
    with torch.inference_mode(False):
        return _calibrate() if _slots_can_count() else None


def _calibrate() -> SeenBy | None:
    tensor = torch.frombuffer(memoryview(bytearray(64)), dtype=torch.float32).resize_((4, 4))
    fresh = seen_by(tensor, count_references(tensor))
    alias = tensor
    with_alias = seen_by(tensor, count_references(tensor))
    alias = tensor[1:]
    with_view = seen_by(tensor, count_references(tensor))
    alias = tensor.detach()
    with_detached = seen_by(tensor, count_references(tensor))
    alias = tensor.untyped_storage()
    with_storage = seen_by(tensor, count_references(tensor))
    del alias
    told_apart = (
        with_alias.tensor_references > fresh.tensor_references
        and with_view.tensor_owners > fresh.tensor_owners
        and with_detached.storage_owners > fresh.storage_owners
        and with_storage.storage_references > fresh.storage_references
    )
    return fresh if told_apart and seen_by(tensor, count_references(tensor)) == fresh else None


def _slots_can_count() -> bool:
    """Return whether a slot's owners are as said above, and others with every kind of alias."""
    slot = _Slot(torch.frombuffer(memoryview(bytearray(64)), dtype=torch.float32))
    return slot.tells_apart(has_object=0) and slot.sees_object() and slot.tells_apart(has_object=1)


class _Slot:
    def __init__(self, master: torch.Tensor) -> None:
        self.master = master
        self.address = storage_address(master)
        self.owners = owners_view(self.address)

    def is_counted(self, owners: int, has_object: int) -> bool:
        counts = {self.owners.value, storage_owners(self.address)}
        return counts == {owners + has_object} and nobody_keeps_object(self.master) == bool(has_object)

    def tells_apart(self, has_object: int) -> bool:
        if not self.is_counted(FREE, has_object):
            return False
        for look in (lambda t: t[1:], lambda t: t.detach(), lambda t: t.data, lambda t: t.__dlpack__(), lambda t: t):
            handle = self.master.data
            if not self.is_counted(TAKEN, has_object):
                return False
            alias = look(handle)
            del handle
            if self.is_counted(FREE, has_object):
                return False
            del alias
            if not self.is_counted(FREE, has_object):
                return False
        return True

    def sees_object(self) -> bool:
        kept = self.master.data.untyped_storage()
        seen = self.owners.value == FREE + 1 and not nobody_keeps_object(self.master)
        del kept
        return seen and self.is_counted(FREE, has_object=1)
