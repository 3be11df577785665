"""The conformance checks, applied to everything that claims to be an allocator."""

import pytest

from longattn.bufmgr import (
    AttentionBufferManager,
    LimitingAllocator,
    MemoryPool,
    Statistics,
    StatisticsAllocator,
    SystemAllocator,
)
from longattn.bufmgr.testing import FailingAllocator, check_allocator, check_tensor_allocator

MAKERS = {
    "system": SystemAllocator,
    "counting": lambda: StatisticsAllocator(SystemAllocator()),
    "limited": lambda: LimitingAllocator(SystemAllocator(), 2**30),
    "failing": FailingAllocator,
    "pool": MemoryPool,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_allocators_conform(make):
    check_allocator(make)


@pytest.mark.parametrize(
    "make", [MemoryPool, AttentionBufferManager, lambda: AttentionBufferManager(enable_reuse=False)]
)
def test_tensor_allocators_conform(make):
    check_tensor_allocator(make)


def test_statistics_count_bytes_and_pieces():
    """Current, peak and total, each in bytes and count; a refused request counts nowhere."""
    failing = FailingAllocator()
    allocator = StatisticsAllocator(failing)
    first, second = allocator.allocate(100), allocator.allocate(50)
    allocator.deallocate(first)
    third = allocator.allocate(20)
    failing.refusals_left = 1
    with pytest.raises(MemoryError):
        allocator.allocate(7)
    assert allocator.statistics == Statistics(70, 2, 150, 2, 170, 3)
    allocator.deallocate(second)
    allocator.deallocate(third)
    assert allocator.statistics == Statistics(0, 0, 150, 2, 170, 3)
    assert failing.held_bytes == 0


def test_limit_refuses_and_recovers():
    failing = FailingAllocator()
    allocator = LimitingAllocator(failing, 100)
    first = allocator.allocate(60)
    with pytest.raises(MemoryError, match="41 bytes over 60 held would pass the limit of 100"):
        allocator.allocate(41)
    failing.refusals_left = 1
    with pytest.raises(MemoryError, match="on purpose"):
        allocator.allocate(40)
    second = allocator.allocate(40)
    allocator.deallocate(first)
    allocator.deallocate(second)
    allocator.deallocate(allocator.allocate(100))
    assert failing.held_bytes == 0
