"""The book of leases: which buffers are out, which blocks are free, and what was counted.

Blocks move in one circle: upstream -> leased -> (last owner dies) -> pending -> free shelf -> leased again, or from the
shelf back to the upstream when a limit or a clear says so. A dying buffer only appends to `pending` and tries the
gate; it never waits, because it may die inside the collector or inside one of the lines below. Whoever passes the gate
next moves pending blocks on. The upstream is never called inside the gate.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from longattn.bufmgr.adaptors import Statistics
from longattn.bufmgr.allocator import Allocator, Block
from longattn.bufmgr.gate import ForkListener, Gate, listen_to_forks
from longattn.bufmgr.guard import fresh_counts, only_handle_sees
from longattn.bufmgr.lease import Lease, lend_block, lend_from_torch
from longattn.bufmgr.log import LOGGER
from longattn.bufmgr.lru import LruShelf
from longattn.bufmgr.request import BufferRequest
from longattn.bufmgr.spec import BufferType

_PAGE = 4096
_LINE = 64


@dataclass
class TypeCounts:
    """Plain counters of one buffer type. `from_torch` counts those misses that torch itself served."""

    hits: int = 0
    misses: int = 0
    from_torch: int = 0
    outstanding: int = 0


def block_size(nbytes: int) -> int:
    """Return the size of the block that serves `nbytes`: whole cache lines, from 64 KiB on whole pages."""
    step = _LINE if nbytes < 16 * _PAGE else _PAGE
    return -(-nbytes // step) * step


class LeaseBook(ForkListener):
    """Leases over an upstream, with free blocks on one shelf per type (types may share a shelf)."""

    def __init__(self, upstream: Allocator, shelves: Mapping[BufferType, LruShelf]) -> None:
        self.upstream = upstream
        self.shelves = shelves
        self.counts = {kind: TypeCounts() for kind in BufferType}
        self.from_torch: dict[torch.device, Statistics] = {}
        self._gate = Gate()
        self._pending: deque[Lease | None] = deque()  # None: the owner of this book is gone
        self._leased: dict[int, Lease] = {}  # id of the handle -> lease, until released or returned
        self._released: dict[int, Lease] = {}  # the same, released while somebody else still looks
        self._closed = False
        listen_to_forks(self)
        if fresh_counts() is None:  # measured here, at start-up, not at the first release
            LOGGER.debug("guard: reference counts cannot be trusted here; handles are never emptied")

    def lease(self, request: BufferRequest, kind: BufferType, *, zero: bool, pinned: bool = False) -> torch.Tensor:
        """Return a buffer. Raises MemoryError (torch.OutOfMemoryError on an accelerator); then nothing is leased."""
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # an inference tensor could not be emptied outside that mode
                return self.lease(request, kind, zero=zero, pinned=pinned)
        if request.device.type != "cpu" or request.nbytes == 0 or pinned:
            tensor, zeroed = self._lease_from_torch(request, kind, pinned=pinned), False
        else:
            tensor, zeroed = self._lease_block(request, kind)
        if zero and not zeroed:
            tensor.zero_()
        return tensor

    def _lease_block(self, request: BufferRequest, kind: BufferType) -> tuple[torch.Tensor, bool]:
        size = block_size(request.nbytes)
        shelf = self.shelves[kind]
        block: Block | None = None
        evicted: list[Block] = []
        if self._gate.enter(blocking=True):
            try:
                evicted = self._drain()
                block = shelf.take(size)
            finally:
                self._gate.leave()
        self._to_upstream(evicted)
        hit = block is not None
        if block is None:
            if LOGGER.isEnabledFor(logging.DEBUG):
                LOGGER.debug("miss: %s buffer of %s", kind.name, request.describe())
            block = self._from_upstream(size, kind, request)
        zeroed, block.zeroed = block.zeroed, False
        lease = Lease(self, kind, request, block)
        lent = False
        try:
            tensor = lend_block(lease, request)
            lent = True
        finally:
            if not lent:  # torch refused the dtype: no storage was made, so nothing will give the block back
                self._to_upstream([block])
        self._record(lease, hit=hit)
        return tensor, zeroed

    def _lease_from_torch(self, request: BufferRequest, kind: BufferType, *, pinned: bool) -> torch.Tensor:
        lease = Lease(self, kind, request, None)
        tensor = lend_from_torch(lease, request, pinned=pinned)
        self._record(lease, hit=False)
        return tensor

    def _record(self, lease: Lease, *, hit: bool) -> None:
        self._leased[lease.handle_id] = lease
        self._released.pop(lease.handle_id, None)  # an older handle with this id is dead
        inside = self._gate.enter(blocking=True)
        try:
            counts = self.counts[lease.kind]
            counts.outstanding += 1
            if hit:
                counts.hits += 1
            else:
                counts.misses += 1
            if lease.block is None:
                counts.from_torch += 1
                self.from_torch.setdefault(lease.device, Statistics()).add(lease.nbytes)
        finally:
            if inside:
                self._gate.leave()

    def _from_upstream(self, size: int, kind: BufferType, request: BufferRequest) -> Block:
        try:
            return self.upstream.allocate(size)
        except MemoryError as error:
            freed = self.clear()
            LOGGER.debug("cleanup: the upstream refused %d bytes; gave back %d cached bytes", size, freed)
            if not freed:
                raise _out_of_memory(kind, request, freed) from error
        try:
            return self.upstream.allocate(size)
        except MemoryError as error:
            raise _out_of_memory(kind, request, freed) from error

    def release(self, tensor: torch.Tensor, kind: BufferType, tensor_references: int) -> None:
        """End a lease: empty the handle if nothing else sees it, else leave everything to the last owner.

        `tensor_references` is sys.getrefcount(tensor) as read in the function that the user called.
        Raises TypeError for no tensor, ValueError for a view, a foreign tensor, a wrong type or a second release.
        """
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"tensor: expected a tensor that allocate returned, got {tensor!r}")
        lease = self._leased.get(id(tensor))
        if lease is None or not lease.is_handle(tensor):
            raise ValueError(f"tensor: expected a buffer leased here, got {self._why_not(tensor)}")
        if lease.kind is not kind:
            raise ValueError(f"type: this buffer was leased as {lease.kind.name}, got {kind.name}")
        if self._leased.pop(id(tensor), None) is None:  # one of two threads won
            raise ValueError("tensor: expected a buffer leased here, got one that another thread is releasing")
        if only_handle_sees(tensor, tensor_references):
            with torch.no_grad():
                # Drops the storage: the lease ends inside this line. (torch's stubs lack the form without arguments.)
                tensor.set_()  # pyright: ignore[reportCallIssue]
        else:
            self._released[lease.handle_id] = lease
        self.settle(blocking=False)

    def _why_not(self, tensor: torch.Tensor) -> str:
        released = self._released.get(id(tensor))
        if released is not None and released.is_handle(tensor):
            return "one that was released before and that something else still sees"
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0 and tuple(tensor.shape) == (0,):
            return "an empty tensor: released before, or never from here"
        if any(lease.covers(storage) for lease in list(Lease.live) if lease.book is self):
            return "a view, or another tensor over the same memory: release the tensor that allocate returned"
        return f"a tensor from elsewhere, of shape {tuple(tensor.shape)} on {tensor.device}"

    def take_back(self, lease: Lease) -> None:
        """Note that nothing sees the lease's memory any more. Called by dying buffers: never waits, never logs."""
        self._pending.append(lease)
        self.settle(blocking=False)

    def settle(self, *, blocking: bool) -> None:
        """Move returned blocks to their shelves, and what is over a limit to the upstream."""
        while self._pending and self._gate.enter(blocking=blocking):
            try:
                evicted = self._drain()
            finally:
                self._gate.leave()
            self._to_upstream(evicted)

    def _drain(self) -> list[Block]:
        evicted: list[Block] = []
        while self._pending:
            lease = self._pending.popleft()
            if lease is None:
                self._closed = True
                evicted += self._clear_shelves(None)
                continue
            for index in (self._leased, self._released):
                if index.get(lease.handle_id) is lease:
                    del index[lease.handle_id]
            self.counts[lease.kind].outstanding -= 1
            if lease.block is None:
                self.from_torch[lease.device].remove(lease.nbytes)
            elif self._closed:
                evicted.append(lease.block)
            else:
                evicted += self.shelves[lease.kind].put(lease.block)
        return evicted

    def put_free(self, kind: BufferType, size: int) -> bool:
        """Make sure that the shelf of this type has a free block of `size` bytes; return whether it has.

        Raises MemoryError when the upstream refuses.
        """
        self.settle(blocking=True)
        shelf = self.shelves[kind]
        if shelf.holds(size):
            return True
        if shelf.max_buffers == 0 or size > shelf.max_bytes:
            return False
        block = self.upstream.allocate(size)
        # Writing every page now is what makes the later hit cheaper than a fresh block; zeros stay zeros.
        torch.frombuffer(memoryview(block.memory), dtype=torch.uint8).zero_()
        block.zeroed = True
        evicted = [block]
        if self._gate.enter(blocking=True):
            try:
                evicted = shelf.put(block)
            finally:
                self._gate.leave()
        self._to_upstream(evicted)
        return True

    def clear(self, kind: BufferType | None = None) -> int:
        """Give the free blocks of one type, or of all, to the upstream; return their bytes. Leased ones stay leased."""
        evicted: list[Block] = []
        if self._gate.enter(blocking=True):
            try:
                evicted = self._drain() + self._clear_shelves(kind)
            finally:
                self._gate.leave()
        freed = sum(block.nbytes for block in evicted)
        self._to_upstream(evicted)
        return freed

    def close(self) -> None:
        """Keep no free blocks from now on. Called when the owner dies, perhaps inside the collector: never waits."""
        self._pending.append(None)
        self.settle(blocking=False)

    def after_fork_in_child(self) -> None:
        """Start the child with empty shelves: the parent's free blocks are the parent's."""
        self._gate.renew_in_child()
        self.clear()

    def _clear_shelves(self, kind: BufferType | None) -> list[Block]:
        shelves = self.shelves.values() if kind is None else [self.shelves[kind]]
        return [block for shelf in shelves for block in shelf.clear()]

    def _to_upstream(self, blocks: list[Block]) -> None:
        for block in blocks:
            self.upstream.deallocate(block)

    def check_valid(self) -> None:
        """Assert the invariants: shelves are valid, no block is free twice or both free and leased, counts agree."""
        self.settle(blocking=True)
        shelves = list({id(shelf): shelf for shelf in self.shelves.values()}.values())
        for shelf in shelves:
            shelf.check_valid()
        leases = [lease for lease in list(Lease.live) if lease.book is self]
        leased = [id(lease.block) for lease in leases if lease.block is not None]
        free = [id(block) for shelf in shelves for block in shelf.blocks()]
        assert len(set(leased + free)) == len(leased) + len(free)
        indexed = {*self._leased.values(), *self._released.values()}
        # A lease whose handle is dead may have lost its place to a new handle with the same id: nobody can release it.
        assert indexed <= set(leases) <= indexed | {lease for lease in leases if lease.handle() is None}
        for kind, counts in self.counts.items():
            assert counts.outstanding == sum(lease.kind is kind for lease in leases)


def _out_of_memory(kind: BufferType, request: BufferRequest, freed: int) -> MemoryError:
    return MemoryError(
        f"no memory for a {kind.name} buffer of {request.describe()}, after giving back {freed} cached bytes"
    )
