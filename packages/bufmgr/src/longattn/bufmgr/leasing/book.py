"""The book of leases: the buffers that are in use, and how one is leased and released.

A lease that the cache admits is kept open as a slot, which is handed out again without a lock. What happens to memory that
comes back is in reclaim.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch

from longattn.bufmgr.leasing import guard
from longattn.bufmgr.leasing.cache import BlockCache
from longattn.bufmgr.leasing.debug import Inspector
from longattn.bufmgr.leasing.lease import Lease, UseCounter, lend_block, lend_from_torch
from longattn.bufmgr.leasing.reclaim import FreeMemory
from longattn.bufmgr.leasing.release import release_lease
from longattn.bufmgr.log import LOGGER
from longattn.bufmgr.memory.allocator import Allocator, Block
from longattn.bufmgr.memory.statistics import Statistics
from longattn.bufmgr.request import BufferRequest
from longattn.bufmgr.spec import BufferType


class LeaseBook(FreeMemory):
    """Leases over an upstream, with free memory in one cache per type (types may share a cache).

    inspector: records and checks each lease for a debugging manager; there are no slots then. device_pools: torch's pool of each CUDA
    device from which buffers there come, made when first used; None (default): they come from where all tensors do.
    """

    def __init__(
        self, upstream: Allocator, caches: Mapping[BufferType, BlockCache], inspector: Inspector | None = None
    ) -> None:
        super().__init__(upstream, caches, inspector)
        self.last_miss = 0.0
        self.device_pools: dict[torch.device, torch.cuda.MemPool] | None = None
        self._torch_clock = UseCounter()
        self.has_slots = inspector is None and guard.fresh_counts() is not None  # measured at start-up
        if guard.fresh_counts() is None:
            LOGGER.debug("guard: reference counts cannot be trusted here; no slots, and handles are never emptied")

    def reuse(self, request: BufferRequest, kind: BufferType) -> Lease | None:
        """Return a free slot for exactly this request, or None."""
        for slot in reversed(self.caches[kind].slots.copy()):
            if slot.serves(request, kind) and slot.is_free():
                return slot
        return None

    def lease(
        self, request: BufferRequest, kind: BufferType, *, bounds: tuple[int, int], zero: bool, pinned: bool = False
    ) -> tuple[torch.Tensor, Lease]:
        """Return a buffer and its lease. Raises MemoryError (torch.OutOfMemoryError on an accelerator); then nothing
        is leased. `bounds`: the size of a new block, and of the largest free one that may serve.
        """
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # an inference tensor cannot be emptied outside that mode
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
                if block is None:
                    cache.note_miss(bounds[0])
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
            if not lent:  # torch refused the dtype: there is no storage whose end would return the block
                self._to_upstream([block])
        if self.has_slots and cache.admits(block.nbytes):
            tensor = lease.open_slot(tensor)
        self._record(lease, hit=hit)
        return tensor, lease, zeroed

    def _lease_from_torch(
        self, request: BufferRequest, kind: BufferType, *, pinned: bool
    ) -> tuple[torch.Tensor, Lease]:
        lease = Lease(self, kind, request, None, self._torch_clock)
        with self._use_device_pool(request.device):
            try:
                tensor = lend_from_torch(lease, request, pinned=pinned)
            except torch.OutOfMemoryError:
                # torch has emptied its own cache already; this book's free blocks are what is left to give back.
                LOGGER.debug("cleanup: %s refused %d bytes; gave back %d", request.device, request.nbytes, self.clear())
                tensor = lend_from_torch(lease, request, pinned=pinned)
        self._record(lease, hit=False)
        return tensor, lease

    def _use_device_pool(self, device: torch.device) -> AbstractContextManager[None]:
        if self.device_pools is None or device.type != "cuda":
            return nullcontext()
        pool = self.device_pools.get(device)
        if pool is None:
            pool = self.device_pools.setdefault(device, torch.cuda.MemPool())
        return torch.cuda.use_mem_pool(pool, device)

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
        """End a lease: empty the handle if nothing else references it, else leave the buffer to its last owner.

        `tensor_references` is sys.getrefcount(tensor) as counted in the function that the user called.
        Raises TypeError for no tensor, ValueError for a view, a foreign tensor, a wrong type or a second release.
        """
        lease = release_lease(self.leases, tensor, kind, tensor_references)
        if lease.is_slot:
            lease.used = self.caches[kind].stamp()
        if lease.handle_id < 0:  # `released`, without its call
            self.count_release_in_use(kind)
        if self._pending:
            self.settle(blocking=False)

    def outstanding(self, kind: BufferType) -> list[Lease]:
        """Return the leases of a type whose memory something still references."""
        return [lease for lease in list(self.leases.values()) if lease.kind is kind and not lease.is_free()]


def _out_of_memory(kind: BufferType, request: BufferRequest, freed: int) -> MemoryError:
    return MemoryError(
        f"no memory for a {kind.name} buffer of {request.describe()}, after giving back {freed} cached bytes"
    )
