"""One buffer in use: a tensor over a block, and the moment at which nothing references the block any more.

The life of a lease:
1. `lend_block` makes a tensor with a storage of its own over a block. The storage's deleter owns the only reference to a
   memoryview of the block. (`lend_from_torch`: torch makes the storage, and the storage itself is watched.)
2. Views, detached tensors, numpy arrays and autograd nodes all own the storage, so they keep the memoryview.
3. When the last of them dies, or the handle is emptied and was the last, the memoryview dies.
4. Its weak reference calls back: the lease ends, and only now may the block be lent again.

Step 3 is torch's and Python's own reference counting. This module reads no count for it, so a block that a living tensor
uses is never lent again.

A lease may be a slot. Then the tensor of step 1 is its `master`, which is never handed out, and each handle is a new tensor
over the same storage. While the master is the storage's only owner, the slot is free. `take` makes the next handle
first and counts the owners second: of two threads that try at once at most one succeeds, because the other's
handle is still alive and counts. A slot that is closed drops its master and is an ordinary lease from then on. Open slots for
the same request are siblings: where one is in use, `take_sibling` looks for a free one, beginning behind the one it found last.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections import deque
from collections.abc import Hashable
from ctypes import c_uint32
from typing import ClassVar, Protocol

import torch

from longattn.bufmgr.leasing.guard import (
    FREE,
    TAKEN,
    has_unreferenced_object,
    object_view,
    owners_view,
    storage_address,
)
from longattn.bufmgr.memory.allocator import Block
from longattn.bufmgr.request import BufferRequest
from longattn.bufmgr.spec import BufferType

# The master of every closed slot: a tensor with more owners than a slot that is free or has one handle.
CLOSED = torch.empty(0, device="cpu")
_CLOSED_ALIASES = [CLOSED.data for _ in range(8)]
_CLOSED_OWNERS = owners_view(storage_address(CLOSED))
_CLOSED_WORD = object_view(storage_address(CLOSED))
_CLOSED_STORAGE = CLOSED.untyped_storage()  # its Python object is referenced, so `has_unreferenced_object` is False


_SERIALS = itertools.count(1)
_NO_SIBLINGS: deque[Lease] = deque()


class LeaseOwner(Protocol):
    """Takes memory back when a lease ends."""

    def take_back(self, lease: Lease) -> None:
        """Take the memory of a lease that ended. Called from finalisers of buffers: must not wait."""
        ...


class UseCounter:
    """Counts uses; `now` is the stamp of the latest. A slot's hit increments it by plain addition, without a lock."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0


class Lease:
    """The record of one buffer from `allocate` until nothing references its memory.

    block: None where torch made the memory. address: names the storage. owners, word: the number of owners of the
    slot's storage, and whether it has a Python object (guard.py). handle_id: id of the tensor that was handed out last; 0 once it was
    released and emptied, below 0 once it was released while something else referenced it. used: the clock's
    stamp of the last use. keep: the block is wanted back for reuse. note: what a debugging manager records.
    """

    __slots__ = (
        "address", "block", "clock", "device", "ended", "handle_id", "keep", "keys", "kind", "master", "nbytes", "note",
        "owner", "owners", "request", "seen_shape", "serial", "siblings", "used", "watch", "word",
        "zeroes",
    )  # fmt: skip

    # The root that keeps leases, and through them a book whose manager is gone, until the buffer itself dies.
    live: ClassVar[set[Lease]] = set()

    address: int
    watch: _Watch

    def __init__(
        self, owner: LeaseOwner, kind: BufferType, request: BufferRequest, block: Block | None, clock: UseCounter
    ) -> None:
        self.owner = owner
        self.kind = kind
        self.request = request
        self.device = request.device
        self.nbytes = request.nbytes
        self.block = block
        self.clock = clock
        self.master: torch.Tensor = CLOSED
        self.owners: c_uint32 = _CLOSED_OWNERS
        self.word: c_uint32 = _CLOSED_WORD
        self.keys: dict[Hashable, dict[Hashable, Lease]] = {}  # key -> the table of slots in which it leads here
        self.handle_id = 0
        self.used = 0
        self.zeroes = False  # what `allocate` does to a new handle, unless it is told otherwise
        self.seen_shape: object = request.shape  # the shape object of the last hit
        self.ended = False
        self.keep = True
        self.note: object = None
        self.siblings: deque[Lease] = _NO_SIBLINGS
        self.serial = next(_SERIALS)

    def start(self, watched: object, tensor: torch.Tensor) -> None:
        """Begin: the lease ends when `watched` dies."""
        self.address = storage_address(tensor)
        self.handle_id = id(tensor)
        self.watch = _Watch(watched, _end_lease)
        self.watch.lease = self
        self.live.add(self)

    @property
    def released(self) -> bool:
        """Whether the last handle was given back while something else referenced it."""
        return self.handle_id < 0

    @property
    def is_slot(self) -> bool:
        """Whether it may be taken again and again."""
        return self.master is not CLOSED

    def serves(self, request: BufferRequest, kind: BufferType) -> bool:
        """Return whether it is a lease of exactly this request and type."""
        return self.nbytes == request.nbytes and self.kind is kind and self.request == request

    def open_slot(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keep the tensor as the master of a slot; return the first handle."""
        self.master = tensor
        self.owners = owners_view(self.address)
        self.word = object_view(self.address)
        handle = tensor.data
        self.handle_id = id(handle)
        return handle

    def take(self) -> torch.Tensor | None:
        """Return a new handle if this is a free slot, else None. Takes no lock."""
        master = self.master  # held here, so that the storage lives
        if self.owners.value != FREE and not self.is_free():
            return None
        handle = master.data
        if self.owners.value != TAKEN and not self.has_one_handle():  # another thread took or closed the slot meanwhile
            return None
        self.handle_id = id(handle)
        clock = self.clock
        clock.now = self.used = clock.now + 1
        return handle

    def take_sibling(self) -> tuple[torch.Tensor, Lease] | None:
        """Return a new handle of another open slot for the same request, and that slot, or None if none is free. Takes no lock."""
        siblings = self.siblings
        try:
            for _ in range(len(siblings)):
                slot = siblings[0]
                siblings.rotate(-1)
                handle = slot.take()
                if handle is not None:
                    return handle, slot
        except IndexError:  # another thread closed the last one meanwhile
            pass
        return None

    def is_free(self) -> bool:
        """Return whether this is a slot whose memory nothing references now."""
        master = self.master  # held here, so that the storage lives
        if master is CLOSED:
            return False
        owners = self.owners.value
        return owners == FREE or (owners == FREE + 1 and has_unreferenced_object(master, self.word))

    def has_one_handle(self) -> bool:
        """Return whether this is a slot whose memory one handle, which the caller holds, references, and nothing else."""
        owners = self.owners.value
        return owners == TAKEN or (owners == TAKEN + 1 and has_unreferenced_object(self.master, self.word))

    def close_slot(self) -> None:
        """Turn the slot into an ordinary lease. A free one ends here, one in use ends with its last owner."""
        # In this order: a thread that still holds the old master must not read the owners of freed memory.
        self.owners = _CLOSED_OWNERS
        self.master = CLOSED
        self.word = _CLOSED_WORD
        keys = list(self.keys.items())
        self.keys.clear()  # before the tables, because a thread that puts a key into a table then looks here
        for key, table in keys:
            if table.get(key) is self:
                table.pop(key, None)
        if self in self.siblings:
            self.siblings.remove(self)


NO_SLOT = Lease.__new__(Lease)
"""A slot that is never open."""
NO_SLOT.master, NO_SLOT.owners, NO_SLOT.word, NO_SLOT.siblings = CLOSED, _CLOSED_OWNERS, _CLOSED_WORD, _NO_SIBLINGS


class _Watch(weakref.ref[object]):
    __slots__ = ("lease",)
    lease: Lease


def _end_lease(watch: _Watch) -> None:
    # Runs where the last owner dies: in any thread, inside the garbage collector, at interpreter exit. It uses only
    # attributes of the lease, because module globals may be gone by then.
    lease = watch.lease
    lease.ended = True
    lease.live.discard(lease)
    lease.owner.take_back(lease)


def lend_block(lease: Lease, request: BufferRequest) -> torch.Tensor:
    """Return a tensor over the lease's block: contiguous, content as the last user left it, its own storage."""
    assert lease.block is not None
    loan = memoryview(lease.block.memory)
    count = math.prod(request.shape)
    tensor = torch.frombuffer(loan, dtype=request.dtype, count=count).resize_(request.shape)
    lease.start(loan, tensor)
    return tensor


def lend_from_torch(lease: Lease, request: BufferRequest, *, pinned: bool) -> torch.Tensor:
    """Return torch's own empty tensor: where torch's caching allocator recycles, and where there is nothing to recycle."""
    tensor = torch.empty(request.shape, dtype=request.dtype, device=request.device, pin_memory=pinned)
    lease.start(tensor.untyped_storage(), tensor)
    return tensor
