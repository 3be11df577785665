"""Allocators over an upstream, each with one feature: a limit, a log, a callback when memory is refused, poison.

They stack in any order, also with those of statistics.py and traces.py. Copies, pickled ones included, have a copy of the
upstream and hold nothing: counters start anew.
"""

from __future__ import annotations

from collections.abc import Callable

from longattn.bufmgr.checks import check_whole, describe
from longattn.bufmgr.log import LOGGER
from longattn.bufmgr.memory.allocator import (
    Allocator,
    Block,
    check_block,
    check_upstream,
    fill_with_poison,
)
from longattn.bufmgr.memory.forking import ForkableLock


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

    max_retries: most tries of one request after the first, default 16. A function that always returns True ends there,
    too, and the error says so.
    """

    def __init__(self, upstream: Allocator, on_refusal: Callable[[int], bool], *, max_retries: int = 16) -> None:
        check_upstream(upstream)
        if not callable(on_refusal):
            raise TypeError(f"on_refusal must be a function of nbytes, got {describe(on_refusal)}")
        self.upstream = upstream
        self.on_refusal = on_refusal
        self.max_retries = check_whole("max_retries", max_retries)

    def allocate(self, nbytes: int) -> Block:
        """Return the upstream's block, after as many refusals as the function answers with True, up to `max_retries`."""
        for _ in range(self.max_retries):
            try:
                return self.upstream.allocate(nbytes)
            except MemoryError:
                if not self.on_refusal(nbytes):
                    raise
        try:
            return self.upstream.allocate(nbytes)
        except MemoryError as error:
            error.add_note(f"refused again after {self.max_retries} retries, each of which on_refusal had asked for")
            raise

    def deallocate(self, block: Block) -> None:
        """Give the block to the upstream."""
        self.upstream.deallocate(block)


class PoisoningAllocator:
    """Fills every block with 0xFF bytes (NaN in floating dtypes, -1 in signed integers) when it is handed out and when it
    comes back, so that code which reads memory before it wrote to it, or after it gave it back, gets values that show.

    Each block is written twice in full. `AttentionBufferManager(debug=True)` also notices writes to memory that came back.
    """

    def __init__(self, upstream: Allocator) -> None:
        check_upstream(upstream)
        self.upstream = upstream

    def allocate(self, nbytes: int) -> Block:
        """Return the upstream's block, poisoned. Raises the upstream's MemoryError."""
        block = self.upstream.allocate(nbytes)
        block.zeroed = False
        fill_with_poison(block)
        return block

    def deallocate(self, block: Block) -> None:
        """Poison the block and give it to the upstream."""
        check_block(block)
        fill_with_poison(block)
        self.upstream.deallocate(block)
