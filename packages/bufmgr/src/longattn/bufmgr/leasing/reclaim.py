"""Reclaiming: what happens to memory whose last reference died.

Blocks move in one circle: upstream -> leased -> (last owner dies) -> pending -> cache -> leased again, or from the
cache back to the upstream when a limit or `clear` requires it. The finaliser of a buffer only appends to `pending` and tries
to enter the gate. It never waits, because it may run inside the garbage collector or between any two lines of this module. The
next thread that enters the gate moves the pending blocks on. The upstream is never called inside the gate.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from longattn.bufmgr.leasing.cache import BlockCache
from longattn.bufmgr.leasing.debug import Inspector, check_leases
from longattn.bufmgr.leasing.lease import Lease
from longattn.bufmgr.leasing.profile import Profile
from longattn.bufmgr.memory.allocator import Allocator, Block, block_bytes
from longattn.bufmgr.memory.forking import ForkListener, Gate, listen_to_forks
from longattn.bufmgr.memory.statistics import Statistics
from longattn.bufmgr.spec import BufferType


@dataclass
class TypeCounts:
    """Plain counters of one buffer type. `from_torch` counts those misses that torch itself served, `released_in_use`
    those releases that emptied no handle because something else referenced the buffer, `slow_requests` the requests that took the
    slow path, and `slots_in_use` those whose key led to a slot that was in use.
    """

    hits: int = 0
    misses: int = 0
    from_torch: int = 0
    released_in_use: int = 0
    slow_requests: int = 0
    slots_in_use: int = 0
    leases: int = 0


class FreeMemory(ForkListener):
    """One cache per buffer type (types may share one) over an upstream, and the index of the leases that are out.

    inspector: records and checks each lease for a debugging manager. profile: what a profiling manager keeps.
    name: whose book this is.
    """

    def __init__(
        self, upstream: Allocator, caches: Mapping[BufferType, BlockCache], inspector: Inspector | None
    ) -> None:
        self.upstream = upstream
        self.caches = caches
        self.inspector = inspector
        self.profile: Profile | None = None
        self.name = ""
        self.counts = {kind: TypeCounts() for kind in BufferType}
        self.from_torch: dict[torch.device, Statistics] = {}
        self.leases: dict[int, Lease] = {}  # address of the storage -> lease, until it ended
        self._gate = Gate()
        self._pending: deque[Lease | None] = deque()  # None: the owner of this book died
        self._closed = False
        listen_to_forks(self)

    def count_release_in_use(self, kind: BufferType) -> None:
        """Count a release that emptied no handle."""
        if self._gate.enter(blocking=True):
            try:
                self.counts[kind].released_in_use += 1
            finally:
                self._gate.leave()

    def count_slow_request(self, kind: BufferType, *, slot_in_use: bool) -> None:
        """Count a request that takes the slow path."""
        if self._gate.enter(blocking=True):
            try:
                self.counts[kind].slow_requests += 1
                self.counts[kind].slots_in_use += slot_in_use
            finally:
                self._gate.leave()

    def take_back(self, lease: Lease) -> None:
        """Take the memory of a lease that ended. Called from finalisers of buffers: never waits, never logs."""
        if self.profile is not None:
            self.profile.note_end(lease.kind, lease.nbytes, lease.serial)
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

    def put_free(self, sizes: Iterable[tuple[BufferType, int]]) -> int:
        """Make sure that the cache of each type has a free block of so many bytes, as many as it is named; return how many there are.

        Raises MemoryError when the upstream refuses, after which what was readied so far stays.
        """
        self.settle(blocking=True)
        ready, fresh = 0, list[tuple[BufferType, Block]]()
        named: Counter[tuple[BufferType, int]] = Counter()
        try:
            for kind, size in sizes:
                cache = self.caches[kind]
                named[kind, size] += 1
                if cache.count_free(size) >= named[kind, size]:
                    ready += 1
                elif cache.admits(size):
                    # Held until all are there: an arena keeps as much free memory as was once in use at the same time.
                    fresh.append((kind, self._written(size)))
                    ready += 1
        finally:
            evicted = [block for _, block in fresh]
            if self._gate.enter(blocking=True):
                try:
                    evicted = [
                        evictee for kind, block in fresh for evictee in self.caches[kind].put(block)
                    ] + self._drain()
                finally:
                    self._gate.leave()
            self._to_upstream(evicted)
        return ready

    def _written(self, size: int) -> Block:
        block = self.upstream.allocate(size)
        # Every page is written now, so that the later hit pays for no page fault; the block stays zero.
        block_bytes(block).zero_()
        block.zeroed = True
        return block

    def clear(self, kind: BufferType | None = None) -> int:
        """Give the free blocks of one type, or of all, to the upstream; return their bytes. Leased ones stay leased."""
        return self.give_back(None, kind)

    def give_back(self, nbytes: int | None, kind: BufferType | None = None, *, least: int = 0) -> int:
        """Give free blocks to the upstream, of the fullest cache first and there the oldest first, until they sum
        to `nbytes` or more (None: all); return their bytes. Blocks under `least` bytes stay.
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
                    gained = fullest.evict_oldest(least) + self._drain()
                    if not gained:
                        break
                    evicted += gained
            finally:
                self._gate.leave()
        freed = sum(block.nbytes for block in evicted)
        self._to_upstream(evicted)
        return freed

    def shrink_caches(self) -> None:
        """Set the limits of caches that adapted back to their policies."""
        evicted: list[Block] = []
        if self._gate.enter(blocking=True):
            try:
                for cache in self.distinct_caches():
                    evicted += cache.shrink()
                evicted += self._drain()
            finally:
                self._gate.leave()
        self._to_upstream(evicted)

    def free_bytes(self) -> int:
        """Return the bytes of all free blocks."""
        return sum(cache.free_bytes() for cache in self.distinct_caches())

    def close(self) -> None:
        """Keep no free blocks from now on. Called when the owner dies, perhaps inside the garbage collector: never waits."""
        self._pending.append(None)
        self.settle(blocking=False)

    def after_fork_in_child(self) -> None:
        """Empty the caches in the child: free blocks of the parent stay with the parent."""
        self._gate.renew_in_child()
        self.clear()

    def distinct_caches(self) -> list[BlockCache]:
        """Return the caches, each once."""
        return list({id(cache): cache for cache in self.caches.values()}.values())

    def _to_upstream(self, blocks: list[Block]) -> None:
        for block in blocks:
            self.upstream.deallocate(block)

    def check_valid(self) -> None:
        """Assert the invariants; see debug.py."""
        self.settle(blocking=True)
        check_leases([lease for lease in list(Lease.live) if lease.owner is self], self.leases, self.distinct_caches())
        for kind, counts in self.counts.items():
            assert counts.leases == sum(lease.kind is kind for lease in self.leases.values())
