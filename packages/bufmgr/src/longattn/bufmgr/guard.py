"""Does anything but the caller's own handle see a buffer? Four reference counts, compared with those of a fresh buffer.

    alias                                            raises the count
    another Python name, a container, a hook's copy  of Python references to the tensor
    a view, an input saved for backward, DLPack      of owners of the TensorImpl
    detach(), numpy, an output saved for backward    of owners of the storage
    t.untyped_storage() kept by somebody             of Python references to the storage

What a fresh buffer's counts are depends on the versions of Python and torch, so they are measured once, and each kind
of alias is tried. Where that does not come out as in the table, and on a Python without the GIL, whose counts are
deferred, the guard says "somebody might see it" for ever: buffers then return when their last reference dies. The
guard decides convenience only. That memory is not recycled under a living tensor does not rest on it (see lease.py).
"""

from __future__ import annotations

import functools
import sys
from typing import NamedTuple

import torch


class SeenBy(NamedTuple):
    """Counts of who sees one buffer: Python references and C++ owners, of the tensor and of its storage."""

    tensor_references: int
    tensor_owners: int
    storage_owners: int
    storage_references: int


def count_references(tensor: object) -> int:
    """Return the Python references to the caller's argument; deallocate() reads its own in the same way."""
    return sys.getrefcount(tensor)


def seen_by(tensor: torch.Tensor, tensor_references: int) -> SeenBy:
    """Return the four counts; `tensor_references` was read in the function that the handle's owner called."""
    storage = tensor.untyped_storage()
    owners = torch._C._storage_Use_Count(storage._cdata)  # pyright: ignore[reportAttributeAccessIssue]
    return SeenBy(tensor_references, tensor._use_count(), owners, sys.getrefcount(storage))  # pyright: ignore[reportAttributeAccessIssue]


def only_handle_sees(tensor: torch.Tensor, tensor_references: int) -> bool:
    """Return True only when nothing but one reference of the caller's sees the tensor's storage."""
    fresh = fresh_counts()
    if fresh is None:
        return False
    seen = seen_by(tensor, tensor_references)
    if seen == fresh:
        return True
    # Calls hold their arguments once more while a frame evaluator (PEP 523: torch.compile's, a debugger's) is set.
    # What that is right now is read off an object that nobody else sees, held on the stack as seen_by's tensor was.
    probe = object()
    _, probe_references = probe, count_references(probe)
    return seen == fresh._replace(tensor_references=probe_references)


@functools.cache
def fresh_counts() -> SeenBy | None:
    """Return the counts of a buffer that nobody else sees, or None where counting cannot be trusted."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None
    if not hasattr(torch._C, "_storage_Use_Count") or not hasattr(torch.Tensor, "_use_count"):
        return None
    with torch.inference_mode(False):
        return _calibrate()


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
