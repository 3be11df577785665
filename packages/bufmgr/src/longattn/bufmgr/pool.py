"""The process-wide memory pool: where managers take blocks from, and where modules without a manager lease scratch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from longattn.bufmgr.adaptors import StatisticsAllocator
from longattn.bufmgr.allocator import Allocator, Block, SystemAllocator
from longattn.bufmgr.book import LeaseBook
from longattn.bufmgr.gate import ForkableLock
from longattn.bufmgr.log import LOGGER
from longattn.bufmgr.lru import LruShelf
from longattn.bufmgr.request import resolve_request
from longattn.bufmgr.spec import MIB, BufferType, parse_type


class MemoryPool:
    """Untyped reuse over an upstream, and the upstream of every manager.

    As a tensor allocator (`empty`, `release`) it keeps what comes back, in one shelf for all roles. As an Allocator
    (`allocate`, `deallocate`) it serves managers from the upstream and gives their blocks straight back to it: their
    own shelves keep, so nothing is kept twice and clearing a manager frees memory.

    upstream: default SystemAllocator(). max_cached_buffers: most free blocks kept, default 32. max_cached_mb: most MiB
    of them, default 512.
    """

    def __init__(
        self, upstream: Allocator | None = None, *, max_cached_buffers: int = 32, max_cached_mb: float = 512.0
    ) -> None:
        self._host = StatisticsAllocator(SystemAllocator() if upstream is None else upstream)
        self._shelf = LruShelf(max_cached_buffers, int(max_cached_mb * MIB))
        self._book = LeaseBook(self._host, dict.fromkeys(BufferType, self._shelf))

    def allocate(self, nbytes: int) -> Block:
        """Return a block for a manager. Raises MemoryError when the system and the pool's own cache have none."""
        try:
            return self._host.allocate(nbytes)
        except MemoryError:
            freed = self._book.clear()
            LOGGER.debug("cleanup: a manager was refused %d bytes; the pool gave back %d", nbytes, freed)
            if not freed:
                raise
            return self._host.allocate(nbytes)

    def deallocate(self, block: Block) -> None:
        """Take back a manager's block, and give its memory back to the system."""
        self._host.deallocate(block)

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None = None, role: str = "temp"
    ) -> torch.Tensor:
        """Return an uninitialised contiguous buffer of `shape`; `role` is a BufferType's name in lower case.

        Raises TypeError or ValueError that names the parameter, and MemoryError.
        """
        if torch.compiler.is_compiling():  # a graph owns its memory
            return torch.empty(shape, dtype=dtype, device=device)
        return self._book.lease(resolve_request(shape, dtype, device), parse_type(role, "role"), zero=False)

    def release(self, tensor: torch.Tensor, role: str = "temp") -> None:
        """Give back what `empty` returned for this role; see AttentionBufferManager.deallocate, whose rules hold."""
        if torch.compiler.is_compiling():
            return
        self._book.release(tensor, parse_type(role, "role"), sys.getrefcount(tensor))

    def reset(self) -> None:
        """Give every free block back and start the counters again. Leased buffers stay as they are."""
        freed = self._book.clear()
        self._host.statistics.restart()
        for counts in self._book.counts.values():
            counts.hits = counts.misses = counts.from_torch = 0
        for statistics in self._book.from_torch.values():
            statistics.restart()
        LOGGER.debug("cleanup: the pool was reset and gave back %d bytes", freed)

    def get_stats(self) -> dict[str, Any]:
        """Return the pool's counters; all sizes are bytes.

        total_allocated: held now, leased and free, managers' blocks included. peak_allocated: the most of that at once
        (with several devices the sum of each one's). allocation_count: requests served so far, managers' included.
        reuse_rate: the part of them served without new memory, 0 to 1. cached_bytes, cached_buffers: free now.
        devices: the six Statistics fields of each device.
        """
        self._book.settle(blocking=True)
        devices = {"cpu": self._host.statistics}
        for device, statistics in list(self._book.from_torch.items()):
            # Zero-size host buffers come from torch: they hold nothing, but they are requests.
            devices["cpu (torch)" if device.type == "cpu" else str(device)] = statistics
        served = devices.values()
        hits = sum(counts.hits for counts in self._book.counts.values())
        requests = hits + sum(statistics.total_count for statistics in served)
        return {
            "total_allocated": sum(statistics.current_bytes for statistics in served),
            "peak_allocated": sum(statistics.peak_bytes for statistics in served),
            "allocation_count": requests,
            "reuse_rate": hits / requests if requests else 0.0,
            "cached_bytes": self._shelf.nbytes,
            "cached_buffers": len(self._shelf),
            "devices": {device: statistics.as_dict() for device, statistics in devices.items()},
        }

    def check_valid(self) -> None:
        """Assert the invariants of shelf and leases."""
        self._book.check_valid()


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
    """Empty the pool and start its counters again. It stays the same object, which live modules hold."""
    pool = _global_pool
    if pool is not None:
        pool.reset()
