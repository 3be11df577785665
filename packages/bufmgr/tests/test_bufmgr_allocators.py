"""The conformance checks, applied to everything that claims to be an allocator."""

from typing import Any

import pytest

from longattn.bufmgr import (
    ArenaAllocator,
    AttentionBufferManager,
    FailureCallbackAllocator,
    LimitingAllocator,
    LoggingAllocator,
    MemoryPool,
    NumaAllocator,
    PoisoningAllocator,
    RecordingAllocator,
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
    "poisoning": lambda: PoisoningAllocator(SystemAllocator()),
    "recording": lambda: RecordingAllocator(SystemAllocator()),
    "logging": lambda: LoggingAllocator(SystemAllocator()),
    "callback": lambda: FailureCallbackAllocator(SystemAllocator(), lambda nbytes: False),
    "numa": lambda: NumaAllocator(SystemAllocator(), "bind"),
    "all of them": lambda: PoisoningAllocator(
        RecordingAllocator(LoggingAllocator(LimitingAllocator(StatisticsAllocator(ArenaAllocator()), 2**30)))
    ),
    "pool": MemoryPool,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_allocators_conform(make):
    check_allocator(make)


@pytest.mark.parametrize("nbytes", [0, -1, True, 1.5])
def test_the_system_allocator_refuses_what_is_no_size(nbytes: Any):
    """Under a pool every size is checked before; this one is also an upstream of one's own."""
    with pytest.raises((ValueError, TypeError), match="nbytes must be"):
        SystemAllocator().allocate(nbytes)


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


class BrokenAllocator(SystemAllocator):
    """Raises what it is told to raise."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def allocate(self, nbytes):
        raise self.error("broken")


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, OSError, ValueError, KeyboardInterrupt])
def test_nothing_is_counted_whatever_the_upstream_raises(error: type[BaseException]):
    """A limit keeps no room reserved, statistics count nothing, and the next request is served."""
    upstream = BrokenAllocator(error)
    limited = LimitingAllocator(upstream, 100)
    counted = StatisticsAllocator(limited)
    for _ in range(3):
        with pytest.raises(error, match="broken"):
            counted.allocate(60)
    limited.upstream = SystemAllocator()
    assert counted.allocate(100).nbytes == 100
    assert counted.statistics == Statistics(100, 1, 100, 1, 100, 1)


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_a_manager_survives_an_upstream_that_breaks(error: type[BaseException]):
    """Nothing is leased after an error that is no MemoryError either."""
    manager = AttentionBufferManager(upstream=BrokenAllocator(error))
    for _ in range(2):
        with pytest.raises(error, match="broken"):
            manager.allocate("temp", (10,))
        with pytest.raises(error, match="broken"):
            manager.preallocate_buffers(1, 2, 3, 4)
    assert (manager.get_stats()["outstanding"], manager.get_stats()["cache_misses"]) == (0, 0)
    manager.check_valid()


def test_nested_statistics():
    """Each level counts what happened since its push; what ends is counted into the level around it, each figure."""
    allocator = StatisticsAllocator(SystemAllocator())
    first = allocator.allocate(100)
    allocator.push_statistics()
    second = allocator.allocate(10)
    allocator.push_statistics()
    third, fourth = allocator.allocate(7), allocator.allocate(5)
    allocator.deallocate(third)
    allocator.deallocate(second)  # a level may see more come back than go out
    assert allocator.pop_statistics() == Statistics(-5, 0, 12, 2, 12, 2)
    assert allocator.statistics == Statistics(5, 1, 22, 3, 22, 3)
    fifth = allocator.allocate(1)
    assert allocator.pop_statistics() == Statistics(6, 2, 22, 3, 23, 4)
    assert allocator.statistics == Statistics(106, 3, 122, 4, 123, 5)
    for block in (first, fourth, fifth):
        allocator.deallocate(block)
    assert allocator.statistics == Statistics(0, 0, 122, 4, 123, 5)
    with pytest.raises(ValueError, match="pop_statistics must follow a push_statistics"):
        allocator.pop_statistics()
