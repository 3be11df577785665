"""One buffer in use: a tensor over a block, and the moment at which nothing sees the block any more.

The life of a lease:
1. `lend_block` makes a tensor that is its own storage over a block. The storage's deleter owns a memoryview of the
   block that nobody else has. (`lend_from_torch`: torch made the storage, and the storage itself is watched.)
2. Views, detached tensors, numpy arrays and autograd nodes all own the storage, so they keep the memoryview.
3. When the last of them dies, or the handle is emptied and was the last, the memoryview dies.
4. Its weak reference calls back: the lease ends, and only now may the block be lent again.

Step 3 is torch's and Python's own reference counting. No count is read or guessed, so no living tensor is ever over a
block that is lent again.

A lease may be a slot: then the tensor of step 1 is its `master`, which never leaves, and each handle is a new tensor
over the same storage. While nobody but the master owns the storage, the slot is free: `take` makes the next handle
first and looks at the owners second, so of two threads that try at once at most one wins (the other's handle, still
alive, is counted). A slot that is closed drops its master and is from then on a lease like any other.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Hashable
from ctypes import c_uint32
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch

from longattn.bufmgr.leasing.guard import FREE, TAKEN, nobody_keeps_object, owners_view, storage_address

if TYPE_CHECKING:
    from longattn.bufmgr.memory.allocator import Block
    from longattn.bufmgr.request import BufferRequest
    from longattn.bufmgr.spec import BufferType


# What closed slots have for a master: a tensor with more owners than any slot that is free or has one handle.
NOBODY = torch.empty(0, device="cpu")
_OWNERS = [NOBODY.data for _ in range(8)]
_NOBODYS_OWNERS = owners_view(storage_address(NOBODY))
_NOBODYS_STORAGE = NOBODY.untyped_storage()  # kept, so that it never looks as if nobody had it


_SERIALS = itertools.count(1)


class LeaseOwner(Protocol):
    """Who is told when a lease ends."""

    def take_back(self, lease: Lease) -> None:
        """Nothing sees the lease's memory any more. Called by dying buffers: must not wait."""
        ...


class Clock:
    """Counts uses: `now` is the stamp of the latest. A slot's hit moves it by plain addition, without a lock."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0


class Lease:
    """What is known of one buffer between `allocate` and the end of its memory's use.

    block: None where torch made the memory. address: names the storage. owners: how many own the slot's storage
    (guard.py). handle_id: id of the tensor that was handed out last; 0 once it was
    released and emptied, below 0 once it was released while something else saw it. used: the clock's
    stamp of the last use. keep: the block is wanted back for reuse. note: what a debugging manager knows of it.
    """

    __slots__ = (
        "address", "block", "clock", "device", "ended", "handle_id", "keep", "keys", "kind", "master", "nbytes", "note",
        "owner", "owners", "request", "seen_shape", "serial", "used", "watch", "zeroes",
    )  # fmt: skip

    # The root that keeps leases, and through them a book whose manager is gone, until the buffer itself dies.
    live: ClassVar[set[Lease]] = set()

    address: int
    watch: _Watch

    def __init__(
        self, owner: LeaseOwner, kind: BufferType, request: BufferRequest, block: Block | None, clock: Clock
    ) -> None:
        self.owner = owner
        self.kind = kind
        self.request = request
        self.device = request.device
        self.nbytes = request.nbytes
        self.block = block
        self.clock = clock
        self.master: torch.Tensor = NOBODY
        self.owners: c_uint32 = _NOBODYS_OWNERS
        self.keys: dict[Hashable, dict[Hashable, Lease]] = {}  # where tables of slots have it: key -> table
        self.handle_id = 0
        self.used = 0
        self.zeroes = False  # what `allocate` does to a new handle, unless it is told otherwise
        self.seen_shape: object = request.shape  # the shape object of the last hit
        self.ended = False
        self.keep = True
        self.note: object = None
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
        """Whether the last handle was given back while something else saw it."""
        return self.handle_id < 0

    @property
    def is_slot(self) -> bool:
        """Whether it may be taken again and again."""
        return self.master is not NOBODY

    def open_slot(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keep the tensor as the master of a slot; return the first handle."""
        self.master = tensor
        self.owners = owners_view(self.address)
        handle = tensor.data
        self.handle_id = id(handle)
        return handle

    def take(self) -> torch.Tensor | None:
        """Return a new handle if this is a slot that nobody sees, else None. Takes no lock."""
        if not self.is_free():
            return None
        handle = self.master.data
        if not self.has_one_handle():  # another thread was as fast, or has closed the slot
            return None
        self.handle_id = id(handle)
        clock = self.clock
        clock.now = self.used = clock.now + 1
        return handle

    def is_free(self) -> bool:
        """Return whether this is a slot that nobody sees now."""
        master = self.master  # held here, so that the storage lives
        if master is NOBODY:
            return False
        owners = self.owners.value
        return owners == FREE or (owners == FREE + 1 and nobody_keeps_object(master))

    def has_one_handle(self) -> bool:
        """Return whether this is a slot whose storage one handle, which the caller holds, sees, and nothing else."""
        owners = self.owners.value
        return owners == TAKEN or (owners == TAKEN + 1 and nobody_keeps_object(self.master))

    def close_slot(self) -> None:
        """Be no slot any more. A free one ends here; one in use ends with its last owner."""
        # In this order: a thread that got hold of the old master must not read the owners of memory that is gone.
        self.owners = _NOBODYS_OWNERS
        self.master = NOBODY
        for key, table in list(self.keys.items()):
            if table.get(key) is self:
                table.pop(key, None)
        self.keys.clear()

    def covers(self, storage: torch.UntypedStorage) -> bool:
        """Return whether the storage lies over this lease's memory."""
        if self.block is None:
            watched = self.watch()
            return watched is None or watched is storage
        start = torch.frombuffer(self.block.memory, dtype=torch.uint8).data_ptr()
        return start <= storage.data_ptr() < start + self.block.nbytes


NO_SLOT = Lease.__new__(Lease)
"""A slot that is closed for ever."""
NO_SLOT.master, NO_SLOT.owners = NOBODY, _NOBODYS_OWNERS


class _Watch(weakref.ref):
    __slots__ = ("lease",)
    lease: Lease


def _end_lease(watch: _Watch) -> None:
    # Runs wherever the last owner died: any thread, inside the collector, at interpreter exit. It uses only what hangs
    # on the lease, because module globals may be gone by then.
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
    """Return torch's own empty tensor, where torch's caching allocator or nobody has memory to recycle."""
    tensor = torch.empty(request.shape, dtype=request.dtype, device=request.device, pin_memory=pinned)
    lease.start(tensor.untyped_storage(), tensor)
    return tensor
