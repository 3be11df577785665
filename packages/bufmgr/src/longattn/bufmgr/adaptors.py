"""Allocators over an upstream: what it costs to count, and where to stop."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from longattn.bufmgr.allocator import Allocator, Block
from longattn.bufmgr.gate import ForkableLock


@dataclass
class Statistics:
    """Bytes and pieces: held now, the most held at once, and all ever handed out."""

    current_bytes: int = 0
    current_count: int = 0
    peak_bytes: int = 0
    peak_count: int = 0
    total_bytes: int = 0
    total_count: int = 0

    def add(self, nbytes: int) -> None:
        """Count one piece that was handed out."""
        self.current_bytes += nbytes
        self.current_count += 1
        self.total_bytes += nbytes
        self.total_count += 1
        if self.current_bytes > self.peak_bytes:
            self.peak_bytes = self.current_bytes
        if self.current_count > self.peak_count:
            self.peak_count = self.current_count

    def remove(self, nbytes: int) -> None:
        """Count one piece that came back."""
        self.current_bytes -= nbytes
        self.current_count -= 1

    def restart(self) -> None:
        """Start the peaks again from what is held now, and the totals from nothing."""
        self.peak_bytes, self.peak_count = self.current_bytes, self.current_count
        self.total_bytes = self.total_count = 0

    def as_dict(self) -> dict[str, int]:
        """Return the six fields by name."""
        return asdict(self)


class StatisticsAllocator:
    """Counts what the upstream hands out.

    The lock is re-entrant: the collector may run a tensor's finaliser between any two lines of ours, and that gives a
    block back on the same thread.
    """

    def __init__(self, upstream: Allocator) -> None:
        self.upstream = upstream
        self.statistics = Statistics()
        self._lock = ForkableLock()

    def allocate(self, nbytes: int) -> Block:
        """Return the upstream's block and count its bytes. Raises the upstream's MemoryError, then counts nothing."""
        block = self.upstream.allocate(nbytes)
        with self._lock:
            self.statistics.add(block.nbytes)
        return block

    def deallocate(self, block: Block) -> None:
        """Give the block to the upstream and count it as gone."""
        nbytes = block.nbytes
        self.upstream.deallocate(block)
        with self._lock:
            self.statistics.remove(nbytes)


class LimitingAllocator:
    """Refuses to hold more than `limit_bytes` at once."""

    def __init__(self, upstream: Allocator, limit_bytes: int) -> None:
        self.upstream = upstream
        self.limit_bytes = limit_bytes
        self._held = 0
        self._lock = ForkableLock()

    def allocate(self, nbytes: int) -> Block:
        """Return the upstream's block. Raises MemoryError at the limit, naming it and what is held."""
        with self._lock:
            if self._held + nbytes > self.limit_bytes:
                raise MemoryError(
                    f"{nbytes} bytes over {self._held} held would pass the limit of {self.limit_bytes} bytes"
                )
            self._held += nbytes
        try:
            block = self.upstream.allocate(nbytes)
        except MemoryError:
            with self._lock:
                self._held -= nbytes
            raise
        with self._lock:
            self._held += block.nbytes - nbytes
        return block

    def deallocate(self, block: Block) -> None:
        """Give the block to the upstream and make room."""
        nbytes = block.nbytes
        self.upstream.deallocate(block)
        with self._lock:
            self._held -= nbytes
