"""The book of leases: which buffers are out, which blocks are free, and what was counted.

Blocks move in one circle: upstream -> leased -> (last owner dies) -> pending -> cache -> leased again, or from the
cache back to the upstream when a limit or a clear says so. A dying buffer only appends to `pending` and tries the
gate; it never waits, because it may die inside the collector or inside one of the lines below. Whoever passes the gate
next moves pending blocks on. The upstream is never called inside the gate.

A lease that the cache admits is kept open as a slot, and is then handed out again and again without the gate.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from longattn.bufmgr import guard
from longattn.bufmgr.adaptors import Statistics
from longattn.bufmgr.allocator import Allocator, Block
from longattn.bufmgr.audit import check_leases
from longattn.bufmgr.cache import BlockCache
from longattn.bufmgr.debug import Inspector
from longattn.bufmgr.gate import ForkListener, Gate, listen_to_forks
from longattn.bufmgr.lease import Clock, Lease, lend_block, lend_from_torch
from longattn.bufmgr.log import LOGGER
from longattn.bufmgr.release import release_lease
from longattn.bufmgr.request import BufferRequest
from longattn.bufmgr.spec import BufferType


@dataclass
class TypeCounts:
    """Plain counters of one buffer type. `from_torch` counts those misses that torch itself served."""

    hits: int = 0
    misses: int = 0
    from_torch: int = 0
    leases: int = 0


class LeaseBook(ForkListener):
    """Leases over an upstream, with free memory in one cache per type (types may share a cache).

    `inspector`: what a debugging manager wants to know of each lease; there are no slots then.
    """

    def __init__(
        self, upstream: Allocator, caches: Mapping[BufferType, BlockCache], inspector: Inspector | None = None
    ) -> None:
        self.upstream = upstream
        self.caches = caches
        self.inspector = inspector
        self.counts = {kind: TypeCounts() for kind in BufferType}
        self.from_torch: dict[torch.device, Statistics] = {}
        self.last_miss = 0.0
        self.leases: dict[int, Lease] = {}  # address of the storage -> lease, until it ended
        self._torch_clock = Clock()
        self._gate = Gate()
        self._pending: deque[Lease | None] = deque()  # None: the owner of this book is gone
        self._closed = False
        listen_to_forks(self)
        self.has_slots = inspector is None and guard.fresh_counts() is not None  # measured at start-up
        if guard.fresh_counts() is None:
            LOGGER.debug("guard: reference counts cannot be trusted here; no slots, and handles are never emptied")

    def reuse(self, request: BufferRequest, kind: BufferType) -> Lease | None:
        """Return a slot for exactly this request that is free at this moment; None: there is none."""
        for slot in reversed(self.caches[kind].slots.copy()):
            if slot.kind is kind and slot.request == request and slot.is_free():
                return slot
        return None

    def lease(
        self, request: BufferRequest, kind: BufferType, *, bounds: tuple[int, int], zero: bool, pinned: bool = False
    ) -> tuple[torch.Tensor, Lease]:
        """Return a buffer and its lease. Raises MemoryError (torch.OutOfMemoryError on an accelerator); then nothing
        is leased. `bounds`: the size of a new block, and of the largest free one that may serve.
        """
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # an inference tensor could not be emptied outside that mode
                return self.lease(request, kind, bounds=bounds, zero=zero, pinned=pinned)
        if request.device.type != "cpu" or request.nbytes == 0 or pinned:
            tensor, lease = self._lease_from_torch(request, kind, pinned=pinned)
            zeroed = False
        else:
            tensor, lease, zeroed = self._lease_block(request, kind, bounds)
        if zero and not zeroed:
            tensor.zero_()
        return tensor, lease

    def _lease_block(
        self, request: BufferRequest, kind: BufferType, bounds: tuple[int, int]
    ) -> tuple[torch.Tensor, Lease, bool]:
        cache = self.caches[kind]
        block: Block | None = None
        evicted: list[Block] = []
        if self._gate.enter(blocking=True):
            try:
                evicted = self._drain()
                block = cache.take(*bounds, lambda: evicted.extend(self._drain()))
            finally:
                self._gate.leave()
        self._to_upstream(evicted)
        hit = block is not None
        if block is None:
            self.last_miss = time.monotonic()
            if LOGGER.isEnabledFor(logging.DEBUG):
                LOGGER.debug("miss: %s buffer of %s", kind.name, request.describe())
            block = self._from_upstream(bounds[0], kind, request)
        zeroed, block.zeroed = block.zeroed, False
        lease = Lease(self, kind, request, block, cache.clock)
        lent = False
        try:
            if self.inspector is not None and not zeroed:
                self.inspector.check_poison(block)
            tensor = lend_block(lease, request)
            lent = True
        finally:
            if not lent:  # torch refused the dtype: no storage was made, so nothing will give the block back
                self._to_upstream([block])
        if self.has_slots and cache.admits(block.nbytes):
            tensor = lease.open_slot(tensor)
        self._record(lease, hit=hit)
        return tensor, lease, zeroed

    def _lease_from_torch(
        self, request: BufferRequest, kind: BufferType, *, pinned: bool
    ) -> tuple[torch.Tensor, Lease]:
        lease = Lease(self, kind, request, None, self._torch_clock)
        try:
            tensor = lend_from_torch(lease, request, pinned=pinned)
        except torch.OutOfMemoryError:
            # torch has given its own free blocks back already; what is left are those that this book holds.
            LOGGER.debug("cleanup: %s refused %d bytes; gave back %d", request.device, request.nbytes, self.clear())
            tensor = lend_from_torch(lease, request, pinned=pinned)
        self._record(lease, hit=False)
        return tensor, lease

    def _record(self, lease: Lease, *, hit: bool) -> None:
        self.leases[lease.address] = lease
        if self.inspector is not None:
            self.inspector.note(lease)
        evicted: list[Block] = []
        inside = self._gate.enter(blocking=True)
        try:
            counts = self.counts[lease.kind]
            counts.leases += 1
            if hit:
                counts.hits += 1
            else:
                counts.misses += 1
            if lease.block is None:
                counts.from_torch += 1
                self.from_torch.setdefault(lease.device, Statistics()).add(lease.nbytes)
            elif lease.is_slot and inside:
                evicted = self.caches[lease.kind].add_slot(lease)
            elif lease.is_slot:
                lease.close_slot()
            if inside:
                evicted += self._drain()
        finally:
            if inside:
                self._gate.leave()
        self._to_upstream(evicted)

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
        lease = release_lease(self.leases, tensor, kind, tensor_references)
        if lease.is_slot:
            if lease.released:
                self.close_slot(lease)
            else:
                lease.used = self.caches[kind].stamp()
        if self._pending:
            self.settle(blocking=False)

    def close_slot(self, slot: Lease) -> None:
        """Let a slot be an ordinary lease."""
        if self._gate.enter(blocking=True):
            try:
                self.caches[slot.kind].close_slot(slot)
            finally:
                self._gate.leave()
        else:  # further up this thread's stack somebody is inside: only the slot's own state may change
            slot.close_slot()

    def take_back(self, lease: Lease) -> None:
        """Note that nothing sees the lease's memory any more. Called by dying buffers: never waits, never logs."""
        self._pending.append(lease)
        self.settle(blocking=False)

    def settle(self, *, blocking: bool) -> None:
        """Move returned blocks to their caches, and what is over a limit to the upstream."""
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
                for cache in self.caches.values():
                    evicted += cache.clear(close_all=True)
                continue
            if self.leases.get(lease.address) is lease:
                del self.leases[lease.address]
            cache = self.caches[lease.kind]
            cache.close_slot(lease)
            self.counts[lease.kind].leases -= 1
            if lease.block is None:
                self.from_torch[lease.device].remove(lease.nbytes)
                continue
            if self.inspector is not None:
                self.inspector.poison(lease.block)
            if self._closed or not lease.keep:
                evicted.append(lease.block)
            else:
                evicted += cache.put(lease.block)
        return evicted

    def put_free(self, kind: BufferType, size: int) -> bool:
        """Make sure that the cache of this type has a free block of `size` bytes; return whether it has.

        Raises MemoryError when the upstream refuses.
        """
        self.settle(blocking=True)
        cache = self.caches[kind]
        if cache.holds(size):
            return True
        if not cache.admits(size):
            return False
        block = self.upstream.allocate(size)
        # Writing every page now is what makes the later hit cheaper than a fresh block; zeros stay zeros.
        torch.frombuffer(memoryview(block.memory), dtype=torch.uint8).zero_()
        block.zeroed = True
        evicted = [block]
        if self._gate.enter(blocking=True):
            try:
                evicted = cache.put(block) + self._drain()
            finally:
                self._gate.leave()
        self._to_upstream(evicted)
        return True

    def clear(self, kind: BufferType | None = None) -> int:
        """Give the free blocks of one type, or of all, to the upstream; return their bytes. Leased ones stay leased."""
        return self.give_back(None, kind)

    def give_back(self, nbytes: int | None, kind: BufferType | None = None, *, least: int = 0) -> int:
        """Give free blocks to the upstream, of the fullest cache first and there the oldest first, until they are
        `nbytes` or more (None: all); return how many bytes it were. Blocks under `least` bytes stay.
        """
        caches = self.distinct_caches() if kind is None else [self.caches[kind]]
        evicted: list[Block] = []
        if self._gate.enter(blocking=True):
            try:
                evicted = self._drain()
                if nbytes is None:
                    for cache in caches:
                        evicted += cache.clear()
                    evicted += self._drain()
                while nbytes is not None and sum(block.nbytes for block in evicted) < nbytes:
                    fullest = max(caches, key=lambda cache: cache.free_bytes(least))
                    left = fullest.evict_oldest(least) + self._drain()
                    if not left:
                        break
                    evicted += left
            finally:
                self._gate.leave()
        freed = sum(block.nbytes for block in evicted)
        self._to_upstream(evicted)
        return freed

    def free_bytes(self) -> int:
        """Return the bytes of all free blocks."""
        return sum(cache.free_bytes() for cache in self.distinct_caches())

    def close(self) -> None:
        """Keep no free blocks from now on. Called when the owner dies, perhaps inside the collector: never waits."""
        self._pending.append(None)
        self.settle(blocking=False)

    def after_fork_in_child(self) -> None:
        """Start the child with empty caches: the parent's free blocks are the parent's."""
        self._gate.renew_in_child()
        self.clear()

    def outstanding(self, kind: BufferType) -> list[Lease]:
        """Return the leases of a type that somebody still sees."""
        return [lease for lease in list(self.leases.values()) if lease.kind is kind and not lease.is_free()]

    def distinct_caches(self) -> list[BlockCache]:
        """Return the caches, each once."""
        return list({id(cache): cache for cache in self.caches.values()}.values())

    def _to_upstream(self, blocks: list[Block]) -> None:
        for block in blocks:
            self.upstream.deallocate(block)

    def check_valid(self) -> None:
        """Assert the invariants; see audit.py."""
        self.settle(blocking=True)
        check_leases([lease for lease in list(Lease.live) if lease.owner is self], self.leases, self.distinct_caches())
        for kind, counts in self.counts.items():
            assert counts.leases == sum(lease.kind is kind for lease in self.leases.values())


def _out_of_memory(kind: BufferType, request: BufferRequest, freed: int) -> MemoryError:
    return MemoryError(
        f"no memory for a {kind.name} buffer of {request.describe()}, after giving back {freed} cached bytes"
    )
