"""One buffer in use: a tensor over a block, and the moment at which nothing sees the block any more.

The life of a lease:
1. `lend_block` makes a tensor that is its own storage over a block. The storage's deleter owns a memoryview of the
   block that nobody else has. (`lend_from_torch`: torch made the storage, and the storage itself is watched.)
2. Views, detached tensors, numpy arrays and autograd nodes all own the storage, so they keep the memoryview.
3. When the last of them dies, or the handle is emptied and was the last, the memoryview dies.
4. Its weak reference calls back: the lease ends, and only now may the block be lent again.

Step 3 is torch's and Python's own reference counting. No count is read or guessed, so no living tensor is ever over a
block that is lent again.
"""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, ClassVar

import torch

if TYPE_CHECKING:
    from longattn.bufmgr.allocator import Block
    from longattn.bufmgr.book import LeaseBook
    from longattn.bufmgr.request import BufferRequest
    from longattn.bufmgr.spec import BufferType


class Lease:
    """What is known of one buffer between `allocate` and the end of its memory's use.

    `block` is None where torch made the memory. `handle` is the tensor that was handed out, as long as it lives.
    """

    __slots__ = ("block", "book", "device", "handle", "handle_id", "kind", "nbytes", "watch")

    # The root that keeps leases, and through them a book whose manager is gone, until the buffer itself dies.
    live: ClassVar[set[Lease]] = set()

    block: Block | None
    handle: weakref.ref[torch.Tensor]
    handle_id: int
    watch: _Watch

    def __init__(self, book: LeaseBook, kind: BufferType, request: BufferRequest, block: Block | None) -> None:
        self.book = book
        self.kind = kind
        self.device = request.device
        self.nbytes = request.nbytes
        self.block = block

    def start(self, watched: object, tensor: torch.Tensor) -> None:
        """Begin: the lease ends when `watched` dies."""
        self.handle = weakref.ref(tensor)
        self.handle_id = id(tensor)
        self.watch = _Watch(watched, _end_lease)
        self.watch.lease = self
        self.live.add(self)

    def is_handle(self, tensor: torch.Tensor) -> bool:
        """Return whether this is the tensor that was handed out; its id has been compared already."""
        handle = self.handle()
        if handle is not None:
            return handle is tensor
        # The collector clears weak references before it calls an owner's __del__, and that may release the buffer.
        return not tensor._is_view() and self.covers(tensor.untyped_storage())

    def covers(self, storage: torch.UntypedStorage) -> bool:
        """Return whether the storage lies over this lease's memory."""
        if self.block is None:
            watched = self.watch()
            return watched is None or watched is storage
        start = torch.frombuffer(self.block.memory, dtype=torch.uint8).data_ptr()
        return start <= storage.data_ptr() < start + self.block.nbytes


class _Watch(weakref.ref):
    __slots__ = ("lease",)
    lease: Lease


def _end_lease(watch: _Watch) -> None:
    # Runs wherever the last owner died: any thread, inside the collector, at interpreter exit. It uses only what hangs
    # on the lease, because module globals may be gone by then.
    lease = watch.lease
    lease.live.discard(lease)
    lease.book.take_back(lease)


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
