"""Counts of blocks: held now, the most held at once, and all that were ever handed out."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from longattn.bufmgr.memory.allocator import Allocator, Block, check_block, check_upstream
from longattn.bufmgr.memory.forking import ForkableLock


@dataclass
class Statistics:
    """Bytes and number of blocks: held now, the most held at once, and all that were ever handed out."""

    current_bytes: int = 0
    current_count: int = 0
    peak_bytes: int = 0
    peak_count: int = 0
    total_bytes: int = 0
    total_count: int = 0

    def add(self, nbytes: int) -> None:
        """Count one block that was handed out."""
        self.current_bytes += nbytes
        self.current_count += 1
        self.total_bytes += nbytes
        self.total_count += 1
        if self.current_bytes > self.peak_bytes:
            self.peak_bytes = self.current_bytes
        if self.current_count > self.peak_count:
            self.peak_count = self.current_count

    def remove(self, nbytes: int) -> None:
        """Count one block that came back."""
        self.current_bytes -= nbytes
        self.current_count -= 1

    def restart_peaks(self) -> None:
        """Start the peaks again from what is held now."""
        self.peak_bytes, self.peak_count = self.current_bytes, self.current_count

    def restart(self) -> None:
        """Start the peaks again from what is held now, and the totals from zero."""
        self.restart_peaks()
        self.total_bytes = self.total_count = 0

    def include(self, later: Statistics) -> None:
        """Add what `later` counted, which began from zero at this moment."""
        self.peak_bytes = max(self.peak_bytes, self.current_bytes + later.peak_bytes)
        self.peak_count = max(self.peak_count, self.current_count + later.peak_count)
        self.current_bytes += later.current_bytes
        self.current_count += later.current_count
        self.total_bytes += later.total_bytes
        self.total_count += later.total_count

    def as_dict(self) -> dict[str, int]:
        """Return the six fields by name."""
        return asdict(self)


class StatisticsAllocator:
    """Counts what the upstream hands out.

    The lock is re-entrant: the garbage collector may run a tensor's finaliser between any two lines of this class, and the
    finaliser gives a block back on the same thread.
    """

    def __init__(self, upstream: Allocator) -> None:
        check_upstream(upstream)
        self.upstream = upstream
        self.statistics = Statistics()
        self._outer: list[Statistics] = []
        self._lock = ForkableLock()

    def __reduce__(self) -> tuple[type[StatisticsAllocator], tuple[Allocator]]:
        return type(self), (self.upstream,)

    def allocate(self, nbytes: int) -> Block:
        """Return the upstream's block and count its bytes. Raises the upstream's MemoryError, then counts nothing."""
        block = self.upstream.allocate(nbytes)
        with self._lock:
            self.statistics.add(block.nbytes)
        return block

    def deallocate(self, block: Block) -> None:
        """Give the block to the upstream and count it as gone."""
        check_block(block)
        nbytes = block.nbytes
        self.upstream.deallocate(block)
        with self._lock:
            self.statistics.remove(nbytes)

    def restart_peaks(self) -> None:
        """Start the peaks again from what is held now."""
        with self._lock:
            self.statistics.restart_peaks()

    def push_statistics(self) -> None:
        """Begin counting from zero; `pop_statistics` ends it and returns the counts. Calls nest, as in RMM."""
        with self._lock:
            self._outer.append(self.statistics)
            self.statistics = Statistics()

    def pop_statistics(self) -> Statistics:
        """Return what was counted since the last `push_statistics`, and add it to the counts from before.

        Raises ValueError without a push.
        """
        with self._lock:
            if not self._outer:
                raise ValueError("pop_statistics must follow a push_statistics, got none before it")
            inner, outer = self.statistics, self._outer.pop()
            outer.include(inner)
            self.statistics = outer
        return inner
