"""Allocators over an upstream, each with one feature: counting, a limit, a log, a callback when memory is refused.

They stack in any order. Copies, pickled ones included, have a copy of the upstream and hold nothing: counters start anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from longattn.bufmgr.checks import check_whole, describe
from longattn.bufmgr.log import LOGGER
from longattn.bufmgr.memory.allocator import (
    Allocator,
    Block,
    check_block,
    check_upstream,
)
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


class LimitingAllocator:
    """Refuses to hold more than `limit_bytes` at once."""

    def __init__(self, upstream: Allocator, limit_bytes: int) -> None:
        check_upstream(upstream)
        check_whole("limit_bytes", limit_bytes)
        self.upstream = upstream
        self.limit_bytes = limit_bytes
        self._held = 0
        self._lock = ForkableLock()

    def __reduce__(self) -> tuple[type[LimitingAllocator], tuple[Allocator, int]]:
        return type(self), (self.upstream, self.limit_bytes)

    def allocate(self, nbytes: int) -> Block:
        """Return the upstream's block. Raises MemoryError at the limit, naming it and what is held, and what the upstream
        raises; then nothing more is held than before.
        """
        check_whole("nbytes", nbytes, 1)
        with self._lock:
            if self._held + nbytes > self.limit_bytes:
                raise MemoryError(
                    f"{nbytes} bytes over {self._held} held would pass the limit of {self.limit_bytes} bytes"
                )
            self._held += nbytes
        granted = 0
        try:
            block = self.upstream.allocate(nbytes)
            granted = block.nbytes
        finally:  # also when the upstream raises, whatever it raises
            with self._lock:
                self._held += granted - nbytes
        return block

    def deallocate(self, block: Block) -> None:
        """Give the block to the upstream and make room."""
        check_block(block)
        nbytes = block.nbytes
        self.upstream.deallocate(block)
        with self._lock:
            self._held -= nbytes


class LoggingAllocator:
    """Logs every block that is handed out, comes back or is refused, at DEBUG to the package's logger."""

    def __init__(self, upstream: Allocator) -> None:
        check_upstream(upstream)
        self.upstream = upstream

    def allocate(self, nbytes: int) -> Block:
        """Return the upstream's block and log it. Raises the upstream's MemoryError, and logs that."""
        try:
            block = self.upstream.allocate(nbytes)
        except MemoryError as error:
            LOGGER.debug("upstream: refused %d bytes: %s", nbytes, error)
            raise
        LOGGER.debug("upstream: %d bytes out", nbytes)
        return block

    def deallocate(self, block: Block) -> None:
        """Give the block to the upstream and log it."""
        check_block(block)
        nbytes = block.nbytes
        self.upstream.deallocate(block)
        LOGGER.debug("upstream: %d bytes back", nbytes)


class FailureCallbackAllocator:
    """Calls a function when the upstream refuses: `on_refusal(nbytes)` frees something and returns True to try
    again, or returns False to let the MemoryError through.
    """

    def __init__(self, upstream: Allocator, on_refusal: Callable[[int], bool]) -> None:
        check_upstream(upstream)
        self.upstream = upstream
        if not callable(on_refusal):
            raise TypeError(f"on_refusal must be a function of nbytes, got {describe(on_refusal)}")
        self.on_refusal = on_refusal

    def allocate(self, nbytes: int) -> Block:
        """Return the upstream's block, after as many refusals as the function answers with True."""
        while True:
            try:
                return self.upstream.allocate(nbytes)
            except MemoryError:
                if not self.on_refusal(nbytes):
                    raise

    def deallocate(self, block: Block) -> None:
        """Give the block to the upstream."""
        self.upstream.deallocate(block)
