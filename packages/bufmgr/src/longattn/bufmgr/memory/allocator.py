"""Where memory comes from: blocks, the Allocator protocol, and the simplest upstream.

An Allocator hands out blocks of host memory and takes them back. Allocators stack: one takes another as its upstream
and adds a feature (see adaptors.py). The life of a block: `allocate` makes it, whoever asked holds it and may lend it
any number of times, and `deallocate` is called once, when no tensor lies over it. Dropping a block without
`deallocate` frees its memory too, but leaves the books of a counting allocator wrong.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

# Under this size one page per block would waste too much; from here on each block is its own private mapping.
_MAPPED_FROM = 64 * 1024
_ALIGNMENT = 64


class Block:
    """A piece of host memory that can be lent to one tensor at a time.

    nbytes: usable bytes. zeroed: every byte is known to be zero, until the block is lent for the first time. loans: how
    often it was lent, as far as somebody counts (see debug.py).
    """

    __slots__ = ("loans", "memory", "nbytes", "zeroed")

    def __init__(self, memory: memoryview, *, zeroed: bool) -> None:
        self.memory = memory
        self.nbytes = memory.nbytes
        self.zeroed = zeroed
        self.loans = 0


@runtime_checkable
class Allocator(Protocol):
    """Source of blocks. `allocate` raises MemoryError when it cannot; both are safe to call from any thread."""

    def allocate(self, nbytes: int) -> Block:
        """Return a writable block of exactly nbytes (1 or more), aligned to 64 bytes. Raises MemoryError."""
        ...

    def deallocate(self, block: Block) -> None:
        """Take back a block that came from this allocator and that no tensor lies over."""
        ...


@runtime_checkable
class TensorAllocator(Protocol):
    """What kernels take scratch and outputs from, without knowing this package. Managers and the pool satisfy it."""

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
        check_nbytes(nbytes)
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


def check_nbytes(nbytes: object) -> None:
    """Raise TypeError or ValueError unless `nbytes` is a size that an Allocator can be asked for."""
    if not isinstance(nbytes, int) or isinstance(nbytes, bool):
        raise TypeError(f"nbytes: expected a whole number of 1 or more, got {nbytes!r}")
    if nbytes < 1:
        raise ValueError(f"nbytes: expected a whole number of 1 or more, got {nbytes!r}")


def check_block(block: object) -> None:
    """Raise TypeError unless `block` is a Block."""
    if not isinstance(block, Block):
        raise TypeError(f"block: expected a Block that allocate returned, got {block!r}")


def check_upstream(upstream: object) -> None:
    """Raise TypeError unless `upstream` can be asked for blocks."""
    if isinstance(upstream, type) or not isinstance(upstream, Allocator):
        raise TypeError(f"upstream: expected an Allocator (allocate and deallocate), got {upstream!r}")


def check_limit(limit_bytes: object, name: str = "limit_bytes") -> None:
    """Raise TypeError or ValueError unless `limit_bytes` is a number of bytes."""
    if not isinstance(limit_bytes, int) or isinstance(limit_bytes, bool):
        raise TypeError(f"{name}: expected a whole number of 0 or more, got {limit_bytes!r}")
    if limit_bytes < 0:
        raise ValueError(f"{name}: expected a whole number of 0 or more, got {limit_bytes!r}")


def private_mapping(nbytes: int) -> mmap.mmap:
    """Return zeroed memory of this process alone. Raises OSError or OverflowError when the system refuses."""
    # A plain mmap(-1, n) is shared with forked children: their writes would show in the parent.
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, nbytes)


def _aligned(nbytes: int) -> memoryview:
    raw = memoryview(bytearray(nbytes + _ALIGNMENT))
    # Vector loads of the kernels want whole cache lines; a bytearray is only aligned to 16 bytes.
    address = torch.frombuffer(raw, dtype=torch.uint8).data_ptr()
    start = -address % _ALIGNMENT
    return raw[start : start + nbytes]
