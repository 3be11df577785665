"""The memory pool of the process: managers take blocks from it, and modules without a manager lease scratch from it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from longattn.bufmgr.checks import check_kind, check_mib, check_whole, describe
from longattn.bufmgr.leasing.book import LeaseBook
from longattn.bufmgr.leasing.cache import BlockCache
from longattn.bufmgr.leasing.lease import Lease
from longattn.bufmgr.leasing.slots import SlotTable
from longattn.bufmgr.log import LOGGER
from longattn.bufmgr.memory.allocator import Allocator, Block, check_block, check_upstream
from longattn.bufmgr.memory.arena import LARGE_BYTES, ArenaAllocator
from longattn.bufmgr.memory.forking import ForkableLock
from longattn.bufmgr.memory.pressure import Cleanup, PressureGauge, check_cleanup
from longattn.bufmgr.memory.statistics import Statistics, StatisticsAllocator
from longattn.bufmgr.report import manager_stats, memory_report, torch_style_stats
from longattn.bufmgr.request import BufferRequest
from longattn.bufmgr.spec import MIB, BufferType
from longattn.bufmgr.strategy import block_size


class MemoryPool(SlotTable):
    """Untyped reuse over an upstream, and the upstream of every manager.

    As a tensor allocator (`empty`, `release`: see SlotTable) it keeps free memory in one cache for all roles. As an Allocator
    (`allocate`, `deallocate`) it serves managers from the upstream and gives their blocks straight back to it: managers
    have caches of their own, so nothing is kept twice and clearing a manager frees memory. Before it takes new pages from
    the system, it takes free large blocks out of the caches of all its managers.

    upstream: default an ArenaAllocator. max_cached_buffers: most free blocks kept, default 32. max_cached_mb: most MiB
    of them, default 512. cleanup: how soon free memory goes back when memory gets short, "adaptive" (default) or
    "aggressive"; see pressure.py.

    A copy, pickled ones included, is an empty pool of the same options; a copy of the global pool is the global pool of the
    process that makes it.
    """

    def __init__(
        self,
        upstream: Allocator | None = None,
        *,
        max_cached_buffers: int = 32,
        max_cached_mb: float = 512.0,
        cleanup: Cleanup = "adaptive",
    ) -> None:
        if upstream is not None:
            check_upstream(upstream)
        check_whole("max_cached_buffers", max_cached_buffers)
        check_mib("max_cached_mb", max_cached_mb, zero_allowed=True)
        self._gauge = PressureGauge(check_cleanup(cleanup))
        self._options: dict[str, Any] = {
            "max_cached_buffers": max_cached_buffers, "max_cached_mb": max_cached_mb, "cleanup": cleanup,
        }  # fmt: skip
        self._upstream = upstream
        self._arena = ArenaAllocator() if upstream is None else upstream
        self._host = StatisticsAllocator(self._arena)
        self._cache = BlockCache(max_cached_buffers, int(max_cached_mb * MIB), adapts=False)
        super().__init__(LeaseBook(self, dict.fromkeys(BufferType, self._cache)))
        self._borrowers: weakref.WeakSet[LeaseBook] = weakref.WeakSet([self._book])
        self._reset_hits = 0
        if isinstance(self._arena, ArenaAllocator):
            # A weak reference: with a bound method, arena and pool would keep each other alive.
            this = weakref.ref(self)
            self._arena.reclaim = lambda nbytes: 0 if (pool := this()) is None else pool.reclaim(nbytes, LARGE_BYTES)

    def __reduce__(self) -> tuple[Callable[..., MemoryPool], tuple[()] | tuple[Allocator | None]]:
        if self is _global_pool:
            return get_global_memory_pool, ()
        return functools.partial(type(self), **self._options), (self._upstream,)

    def add_borrower(self, book: LeaseBook) -> None:
        """Register a book whose upstream is this pool, and whose free blocks the pool may take."""
        self._borrowers.add(book)

    def allocate(self, nbytes: int) -> Block:
        """Return a block for a manager. Raises MemoryError when the system and all caches have none."""
        share = self._gauge.share_to_give_back()
        if share:
            self.relieve(share)
        try:
            return self._host.allocate(nbytes)
        except MemoryError:
            freed = self.relieve(1.0)
            LOGGER.debug("cleanup: %d bytes were refused; the pool gave back %d", nbytes, freed)
            if not freed:
                raise
            return self._host.allocate(nbytes)

    def deallocate(self, block: Block) -> None:
        """Take back a manager's block."""
        check_block(block)
        self._host.deallocate(block)

    def reclaim(self, nbytes: int, least: int = 0) -> int:
        """Take free blocks of `least` bytes or more out of the caches over this pool, beginning with the cache whose
        last miss is longest ago, until they sum to `nbytes` or more; return their bytes.
        """
        freed = 0
        for book in sorted(self._borrowers, key=lambda book: book.last_miss):
            if freed < nbytes:
                freed += book.give_back(nbytes - freed, least=least)
        return freed

    def relieve(self, share: float = 1.0) -> int:
        """Give a share (0 to 1) of all free memory back to the system; return the bytes that caches gave back."""
        free = sum(book.free_bytes() for book in list(self._borrowers))
        freed = self.reclaim(int(free * share))
        trimmed = self._arena.trim() if isinstance(self._arena, ArenaAllocator) else 0
        LOGGER.debug("cleanup: caches gave back %d bytes; the arena gave %d bytes to the system", freed, trimmed)
        return freed

    def _make(self, request: BufferRequest, kind: BufferType, zero: bool) -> tuple[torch.Tensor, Lease]:
        size = block_size(request.nbytes)
        try:
            return self._book.lease(request, kind, bounds=(size, size), zero=zero)
        except (MemoryError, torch.OutOfMemoryError) as error:
            error.add_note(self.memory_summary())
            raise

    def reset(self) -> None:
        """Give every free block of the pool back to the system and start the counters again.

        Leased buffers stay as they are, and so do the caches of managers.
        """
        freed = self._book.clear()
        if isinstance(self._arena, ArenaAllocator):
            self._arena.trim()
        self._host.statistics.restart()
        for counts in self._book.counts.values():
            counts.hits = counts.misses = counts.from_torch = 0
        self._reset_hits = self._cache.slot_hits
        for statistics in self._book.from_torch.values():
            statistics.restart()
        LOGGER.debug("cleanup: the pool was reset and gave back %d bytes", freed)

    def _statistics(self) -> dict[str, Statistics]:
        self._book.settle(blocking=True)
        devices = {"cpu": self._host.statistics}
        for device, statistics in list(self._book.from_torch.items()):
            # Zero-size host buffers come from torch: they hold nothing, but they are requests.
            devices["cpu (torch)" if device.type == "cpu" else str(device)] = statistics
        return devices

    def get_stats(self) -> dict[str, Any]:
        """Return the pool's counters; all sizes are bytes.

        total_allocated: held now, leased and free, managers' blocks included. peak_allocated: the most of that at once
        (with several devices the sum of each one's). allocation_count: requests served so far, managers' included.
        reuse_rate: the part of them served without new memory, 0 to 1. cached_bytes, cached_buffers: free now.
        devices: the six Statistics fields of each device. With an arena also arena: in_use, dirty (free pages still
        held), mapped (address space), peak_in_use.
        """
        devices = self._statistics()
        served = devices.values()
        hits = sum(counts.hits for counts in self._book.counts.values()) + self._cache.slot_hits - self._reset_hits
        requests = hits + sum(statistics.total_count for statistics in served)
        free = self._cache.blocks()
        stats = {
            "total_allocated": sum(statistics.current_bytes for statistics in served),
            "peak_allocated": sum(statistics.peak_bytes for statistics in served),
            "allocation_count": requests,
            "reuse_rate": hits / requests if requests else 0.0,
            "cached_bytes": sum(block.nbytes for block in free),
            "cached_buffers": len(free),
            "devices": {device: statistics.as_dict() for device, statistics in devices.items()},
        }
        if isinstance(self._arena, ArenaAllocator):
            arena = self._arena
            names = ("in_use", "dirty_bytes", "mapped_bytes", "peak_in_use")
            stats["arena"] = {name.removesuffix("_bytes"): getattr(arena, name) for name in names}
        return stats

    def accounts(self) -> list[dict[str, Any]]:
        """Return what each manager over this pool, and the pool's own buffers (named "pool"), hold and have been served: name,
        in_use_bytes, outstanding (buffers), cached_bytes, cache_hits, cache_misses; the most bytes in use first.
        """
        rows: list[dict[str, Any]] = []
        for book in list(self._borrowers):
            stats = manager_stats(book)
            leases = [lease for kind in BufferType for lease in book.outstanding(kind)]
            in_use = sum(lease.nbytes for lease in leases)
            row = {
                "name": "pool" if book is self._book else book.name,
                "in_use_bytes": in_use,
                "outstanding": len(leases),
            }
            if book is self._book:  # its types share one cache
                hits = sum(counts.hits for counts in book.counts.values()) + self._cache.slot_hits
                stats |= {"cached_bytes": book.free_bytes(), "cache_hits": hits}
            rows.append({**row, **{key: stats[key] for key in ("cached_bytes", "cache_hits", "cache_misses")}})
        return sorted(rows, key=lambda row: (-row["in_use_bytes"], row["name"]))

    def memory_stats(self, device: str = "cpu") -> dict[str, int]:
        """Return one device's memory in the keys of torch.cuda.memory_stats; devices are those of `get_stats`.

        Raises ValueError for a device that was never asked for.
        """
        devices = self._statistics()
        check_kind("device", device, str, "a device's name")
        if device not in devices:
            raise ValueError(f"device must be one of {', '.join(devices)}, got {describe(device)}")
        free = self._cache.blocks() if device == "cpu" else []
        return torch_style_stats(devices[device], sum(block.nbytes for block in free), len(free))

    def memory_summary(self) -> str:
        """Return text for a person whose memory runs out: totals of all devices, the largest holders of this pool and of
        the managers over it, fragmentation, and what to do.

        A MemoryError of `empty`, or torch.OutOfMemoryError, carries it as a note, which tracebacks show.
        """
        return memory_report("pool", self._statistics(), list(self._borrowers), self.memory_snapshot())

    def memory_snapshot(self) -> list[dict[str, Any]]:
        """Return the arena's segments as torch.cuda.memory_snapshot does: sizes, and blocks by offset and state."""
        return self._arena.snapshot() if isinstance(self._arena, ArenaAllocator) else []

    def reset_peak_memory_stats(self) -> None:
        """Start the peaks again from what is held now."""
        self._host.restart_peaks()
        for statistics in list(self._book.from_torch.values()):
            statistics.restart_peaks()

    def empty_cache(self) -> None:
        """Give all free memory, that of managers over this pool included, back to the system."""
        self.relieve(1.0)

    def push_statistics(self) -> None:
        """Begin counting host memory anew, until `pop_statistics`."""
        self._host.push_statistics()

    def pop_statistics(self) -> Statistics:
        """Return what was counted since the last `push_statistics`. Raises ValueError without one."""
        return self._host.pop_statistics()

    def check_valid(self) -> None:
        """Assert the invariants of cache, leases and arena."""
        self._book.check_valid()
        if isinstance(self._arena, ArenaAllocator):
            self._arena.check_valid()


_global_pool: MemoryPool | None = None
_global_pool_lock = ForkableLock()


def get_global_memory_pool() -> MemoryPool:
    """Return the one pool of this process; it is made at the first call."""
    global _global_pool
    with _global_pool_lock:
        if _global_pool is None:
            _global_pool = MemoryPool()
        return _global_pool


def reset_global_memory_pool() -> None:
    """Empty the pool and start its counters again. It stays the same object, because modules hold it."""
    pool = _global_pool
    if pool is not None:
        pool.reset()
