"""Sources of memory: blocks, the Allocator protocol, and the simplest upstream.

An Allocator hands out blocks of host memory and takes them back. Allocators stack: one takes another as its upstream
and adds a feature (adaptors.py, statistics.py, traces.py). The life of a block: `allocate` makes it, the caller holds it and may lend it
any number of times, and `deallocate` is called once, when no tensor uses its memory. Dropping a block without
`deallocate` frees its memory too, but leaves the counters of a counting allocator wrong.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from longattn.bufmgr.checks import check_kind, check_whole, describe

# Smaller blocks would waste too much of a page; blocks of this size and larger are private mappings of their own.
_MAPPED_FROM = 64 * 1024
_ALIGNMENT = 64

POISON = 0xFF
"""The byte of memory that nobody may read: NaN for floating dtypes, -1 for signed integers, True for bool."""


class Block:
    """A piece of host memory that can be lent to one tensor at a time.

    nbytes: usable bytes. zeroed: every byte is known to be zero, until the block is lent for the first time. loans: how
    often it was lent; only debugging managers count (see debug.py). nodes: the NUMA nodes that it is placed on, None where
    the system places it (see numa/placement.py).
    """

    __slots__ = ("loans", "memory", "nbytes", "nodes", "zeroed")

    def __init__(self, memory: memoryview, *, zeroed: bool) -> None:
        self.memory = memory
        self.nbytes = memory.nbytes
        self.zeroed = zeroed
        self.loans = 0
        self.nodes: tuple[int, ...] | None = None


@runtime_checkable
class Allocator(Protocol):
    """Source of blocks. `allocate` raises MemoryError when it cannot; both are safe to call from any thread."""

    def allocate(self, nbytes: int) -> Block:
        """Return a writable block of exactly nbytes (1 or more), aligned to 64 bytes. Raises MemoryError."""
        ...

    def deallocate(self, block: Block) -> None:
        """Take back a block that came from this allocator and whose memory no tensor uses."""
        ...


@runtime_checkable
class TensorAllocator(Protocol):
    """The source of scratch and outputs for kernels, which need not know this package. Managers and the pool satisfy it."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, role: str) -> torch.Tensor:
        """Return an uninitialised contiguous tensor; `role` is a BufferType's name in lower case."""
        ...

    def release(self, tensor: torch.Tensor, role: str) -> None:
        """Give back a tensor that `empty` returned for this role."""
        ...


class SystemAllocator:
    """The simplest upstream: private memory from the operating system, given back at once."""

    def allocate(self, nbytes: int) -> Block:
        """Return a zeroed block. Raises MemoryError when the system refuses."""
        check_whole("nbytes", nbytes, 1)
        if nbytes < _MAPPED_FROM:
            return Block(_aligned(nbytes), zeroed=True)
        try:
            return Block(memoryview(private_mapping(nbytes)), zeroed=True)
        except (OSError, OverflowError) as error:
            raise MemoryError(f"the system refused {nbytes} bytes ({nbytes / 2**30:.2f} GiB): {error}") from error

    def deallocate(self, block: Block) -> None:
        """Forget the block; its memory goes back when the last memoryview over it dies, which is here."""
        check_block(block)
        block.memory = memoryview(b"")


def check_block(block: object) -> None:
    """Raise TypeError unless `block` is a Block."""
    check_kind("block", block, Block, "a Block that allocate returned")


def check_upstream(upstream: object) -> None:
    """Raise TypeError unless `upstream` can be asked for blocks."""
    if isinstance(upstream, type) or not isinstance(upstream, Allocator):
        raise TypeError(f"upstream must be an Allocator (allocate and deallocate), got {describe(upstream)}")


def block_bytes(block: Block) -> torch.Tensor:
    """Return the block's memory as a tensor of uint8."""
    return torch.frombuffer(memoryview(block.memory), dtype=torch.uint8)


def fill_with_poison(block: Block) -> None:
    """Write POISON over the block."""
    block_bytes(block).fill_(POISON)


def private_mapping(nbytes: int) -> mmap.mmap:
    """Return zeroed memory of this process alone. Raises OSError or OverflowError when the system refuses."""
    # mmap(-1, n) alone is shared with forked children: their writes would change the parent's memory.
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, nbytes)


def _aligned(nbytes: int) -> memoryview:
    raw = memoryview(bytearray(nbytes + _ALIGNMENT))
    # The kernels' vector loads need whole cache lines; a bytearray is aligned to 16 bytes only.
    address = torch.frombuffer(raw, dtype=torch.uint8).data_ptr()
    start = -address % _ALIGNMENT
    return raw[start : start + nbytes]
