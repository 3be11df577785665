"""Conformance checks, strategies and a model for tests of allocators, of managers, and of what is built on them.

Needs the extra `longattn-bufmgr[testing]`. Nothing that ships imports this module.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

from longattn.bufmgr.leasing.guard import storage_address
from longattn.bufmgr.manager import AttentionBufferManager
from longattn.bufmgr.memory.allocator import Allocator, Block, SystemAllocator, TensorAllocator
from longattn.bufmgr.spec import BufferConfig, BufferType

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
"""Dtypes that every tensor allocator must serve on CPU."""


def buffer_types() -> st.SearchStrategy[BufferType]:
    """Generate every buffer type."""
    return st.sampled_from(BufferType)


def shapes(max_numel: int = 4096) -> st.SearchStrategy[tuple[int, ...]]:
    """Generate shapes of up to four axes and max_numel elements, with zero sizes and the empty shape."""
    sizes = st.lists(st.sampled_from([0, 1, 2, 3, 8, 64, 4096]), max_size=4).map(tuple)
    return sizes.filter(lambda shape: torch.Size(shape).numel() <= max_numel)


def dtypes() -> st.SearchStrategy[torch.dtype]:
    """Generate dtypes that buffers come in."""
    return st.sampled_from(DTYPES)


def configs() -> st.SearchStrategy[BufferConfig]:
    """Generate policies with small limits, so that eviction happens within a few steps."""
    return st.builds(
        BufferConfig,
        zero_init=st.booleans(),
        max_cached_buffers=st.integers(0, 3),
        max_cached_mb=st.sampled_from([0, 4096 / 2**20, 0.25, 1.0]),
    )


class FailingAllocator:
    """An upstream whose allocate raises MemoryError while `refusals_left` is above zero; it counts blocks in use."""

    def __init__(self, upstream: Allocator | None = None) -> None:
        self.upstream = SystemAllocator() if upstream is None else upstream
        self.refusals_left = 0
        self.blocks: dict[int, Block] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes handed out and not given back."""
        return sum(block.nbytes for block in list(self.blocks.values()))

    def allocate(self, nbytes: int) -> Block:
        """Return a block, or raise MemoryError as often as told."""
        if self.refusals_left > 0:
            self.refusals_left -= 1
            raise MemoryError("refused on purpose")
        block = self.upstream.allocate(nbytes)
        self.blocks[id(block)] = block
        return block

    def deallocate(self, block: Block) -> None:
        """Take a block back. Asserts that it is out, so a block that comes back twice is noticed."""
        assert self.blocks.pop(id(block)) is block
        self.upstream.deallocate(block)


def check_allocator(make: Callable[[], Allocator]) -> None:
    """Assert what every Allocator must do: exact sizes, alignment, writable memory of its own, refusal by MemoryError."""
    allocator = make()
    assert isinstance(allocator, Allocator)
    held: list[tuple[Block, int]] = []
    for fill, nbytes in enumerate([1, 64, 4096, 65536, 3 * 2**20, 64], start=1):
        block = allocator.allocate(nbytes)
        view = torch.frombuffer(block.memory, dtype=torch.uint8)
        assert block.nbytes == nbytes == view.numel()
        assert view.data_ptr() % 64 == 0
        assert not block.zeroed or not view.any()
        view.fill_(fill)
        held.append((block, fill))
    for block, fill in held:
        assert bool((torch.frombuffer(block.memory, dtype=torch.uint8) == fill).all()), "blocks overlap"
    for block, _ in random.Random(0).sample(held, len(held)):
        allocator.deallocate(block)
    try:
        allocator.allocate(2**62)
    except MemoryError:
        return
    raise AssertionError("expected MemoryError for 2**62 bytes")


def check_tensor_allocator(make: Callable[[], TensorAllocator]) -> None:
    """Assert what every allocator for kernels must do: right tensors, no aliases while they live, a release per lease."""
    allocator = make()
    assert isinstance(allocator, TensorAllocator)
    cpu = torch.device("cpu")
    for dtype in DTYPES:
        for shape in [(), (0,), (3,), (2, 0, 5), (2, 3, 5), (1, 512, 2, 64)]:
            tensor = allocator.empty(shape, dtype, cpu, "output")
            assert (tuple(tensor.shape), tensor.dtype, tensor.device) == (shape, dtype, cpu)
            assert tensor.is_contiguous()
            assert not tensor.requires_grad
            allocator.release(tensor, "output")
    held = [allocator.empty((100 + i,), torch.float32, cpu, "temp").fill_(i) for i in range(8)]
    view = held[0][:50]
    released = held.pop(0)
    allocator.release(released, "temp")  # a view still sees it: it must not be lent again
    held += [allocator.empty((100,), torch.float32, cpu, "temp").fill_(-1) for _ in range(4)]
    assert bool((view == 0).all()), "memory was lent again under a view"
    assert all(bool((tensor == tensor[0]).all()) for tensor in held), "buffers overlap"
    while held:
        allocator.release(held.pop(), "temp")


@dataclass
class ManagerModel:
    """A manager beside a plain list of what it must have given out: each live tensor with the value it was filled with.

    `owned` are handles not released yet; `seen` are views, or handles released while something else saw them.
    """

    manager: AttentionBufferManager
    owned: list[tuple[torch.Tensor, BufferType, int]] = field(
        default_factory=list[tuple[torch.Tensor, BufferType, int]]
    )
    seen: list[tuple[torch.Tensor, int]] = field(default_factory=list[tuple[torch.Tensor, int]])
    requests: int = 0
    next_value: int = 1

    def allocate(
        self, kind: BufferType, shape: tuple[int, ...], dtype: torch.dtype, zero_init: bool | None = None
    ) -> None:
        """Allocate, check what came, and fill it with a value that no other buffer has (as far as the dtype goes)."""
        tensor = self.manager.allocate(kind, shape, dtype, zero_init=zero_init)
        self.requests += 1
        assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
        zeros = self.manager.configs[kind].zero_init if zero_init is None else zero_init
        assert not zeros or not bool(tensor.any())
        tensor.fill_(self.next_value)
        self.owned.append((tensor, kind, self.next_value))
        self.next_value = self.next_value % 100 + 1

    def check(self) -> None:
        """Assert that every live tensor still holds its value and that the manager agrees with itself and with us."""
        for tensor, _, value in self.owned:
            _check_filled(tensor, value)
        for tensor, value in self.seen:
            _check_filled(tensor, value)
        self.manager.check_valid()
        stats = self.manager.get_stats()
        assert stats["cache_hits"] + stats["cache_misses"] == self.requests
        storages = {storage_address(tensor) for tensor in [*(t for t, _, _ in self.owned), *(t for t, _ in self.seen)]}
        assert stats["outstanding"] == len(storages)


def _check_filled(tensor: torch.Tensor, value: int) -> None:
    expected = torch.full((), value).to(tensor.dtype)
    assert bool((tensor == expected).all()), f"a live buffer changed: {tensor.flatten()[:4]} is not {expected}"
