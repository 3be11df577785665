"""Managers, pools and allocators copy, pickle and travel to spawned workers: options travel, memory and counters do not."""

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from longattn.bufmgr import (
    ArenaAllocator,
    AttentionBufferManager,
    BufferConfig,
    BufferType,
    FailureCallbackAllocator,
    LimitingAllocator,
    LoggingAllocator,
    MemoryPool,
    PoisoningAllocator,
    RecordingAllocator,
    StatisticsAllocator,
    SystemAllocator,
    get_global_memory_pool,
)

TEMP = BufferType.TEMP
SHAPE = (4, 8)
COPIES: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))]


@pytest.fixture(params=COPIES, ids=["copy", "deepcopy", "pickle"])
def twin_of(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return request.param


def test_a_manager_keeps_its_options_and_starts_anew(twin_of: Callable[[Any], Any]):
    config = BufferConfig(max_cached_buffers=3, zero_init=True)
    options = {"enable_preallocation": True, "enable_profiling": True, "lightweight": False, "cleanup": "aggressive"}
    options |= {"numa": "interleave", "name": "layer 0", "adaptive_cache": True, "device_pools": True}
    manager = AttentionBufferManager({TEMP: config}, debug=True, **options)
    held = manager.allocate(TEMP, SHAPE).fill_(3)
    twin = twin_of(manager)
    assert {name: getattr(twin, name) for name in options} == options
    assert (twin.configs, twin.debug, twin.enable_reuse) == (manager.configs, True, True)
    stats = twin.get_stats()
    assert (stats["outstanding"], stats["cache_misses"], twin._profile.as_dict()["temp"]["count"]) == (0, 0, 0)
    assert not twin.allocate(TEMP, SHAPE).any()
    with pytest.raises(ValueError, match="a tensor from elsewhere"):
        twin.deallocate(held, TEMP)
    manager.deallocate(held, TEMP)
    assert twin.get_stats()["cache_misses"] == 1


def test_the_global_pool_stays_one(twin_of: Callable[[Any], Any]):
    """A manager over the global pool is, wherever it arrives, over the global pool of that process."""
    assert twin_of(get_global_memory_pool()) is get_global_memory_pool()
    twin = twin_of(AttentionBufferManager())
    before = get_global_memory_pool().get_stats()["total_allocated"]
    held = twin.allocate("cache", (1000, 1000))
    assert get_global_memory_pool().get_stats()["total_allocated"] - before >= held.nbytes


def test_a_pool_of_ones_own(twin_of: Callable[[Any], Any]):
    pool = MemoryPool(max_cached_buffers=2, max_cached_mb=1, cleanup="aggressive")
    held = pool.empty(SHAPE, torch.float32)
    twin = twin_of(pool)
    assert twin is not pool and held.shape == SHAPE
    assert (twin._cache.max_buffers, twin._cache.max_bytes, twin._gauge.cleanup) == (2, 2**20, "aggressive")
    assert twin.get_stats()["allocation_count"] == 0
    twin.empty((300, 300), torch.float32)
    assert twin.get_stats()["arena"]["in_use"] > 0
    twin.check_valid()


def always(nbytes: int) -> bool:
    return True


def test_a_stack_of_allocators(twin_of: Callable[[Any], Any]):
    """Each layer is of the same kind, with the same limit, and holds nothing."""
    arena = ArenaAllocator(limit_bytes=2**20, floor_bytes=4096, huge_pages=False)
    poisoning = PoisoningAllocator(RecordingAllocator(LoggingAllocator(arena)))
    limited = LimitingAllocator(FailureCallbackAllocator(poisoning, always), 10 * 2**20)
    counted = StatisticsAllocator(limited)
    counted.push_statistics()
    held = counted.allocate(2**19)
    twin = twin_of(counted)
    assert twin.statistics.total_count == 0
    layers: Any = twin
    kinds = [
        StatisticsAllocator, LimitingAllocator, FailureCallbackAllocator, PoisoningAllocator, RecordingAllocator,
        LoggingAllocator, ArenaAllocator,
    ]  # fmt: skip
    for kind in kinds:
        assert type(layers) is kind
        if kind is not ArenaAllocator:
            layers = layers.upstream
    assert (layers.limit_bytes, layers.floor_bytes, layers.huge_pages) == (2**20, 4096, False)
    twin.deallocate(twin.allocate(2**18))
    counted.deallocate(held)
    assert (counted.statistics.current_bytes, limited._held) == (0, 0)


def test_a_prepared_slot_and_a_scope_bring_their_manager():
    manager = AttentionBufferManager(upstream=SystemAllocator())
    slot, scope = manager.prepare(TEMP, SHAPE, torch.float64, zero_init=True), manager.scope()
    twin, twin_scope = copy.deepcopy((slot, scope))
    assert twin._table is twin_scope._table is not manager
    with twin_scope:
        tensor = twin.acquire()
        assert (tuple(tensor.shape), tensor.dtype, bool(tensor.any())) == (SHAPE, torch.float64, False)
        with pytest.raises(TypeError, match="scope must be closed"):
            copy.copy(twin_scope)
    assert (tensor.shape, manager.get_stats()["cache_misses"]) == ((0,), 0)


def serve_in_worker(manager: AttentionBufferManager, pool: MemoryPool) -> tuple[Any, ...]:
    tensor = manager.allocate(TEMP, SHAPE).fill_(2.0)
    total = float(tensor.sum())
    manager.deallocate(tensor, TEMP)
    pool.release(pool.empty(SHAPE, torch.float32))
    stats = manager.get_stats()
    return total, stats["cache_misses"], stats["outstanding"], pool.get_stats()["allocation_count"]


def test_spawned_workers():
    """A manager that served already is an argument of a spawned process, and serves there from zero."""
    manager, pool = AttentionBufferManager(), MemoryPool()
    held = [manager.allocate(TEMP, SHAPE) for _ in range(3)]
    with multiprocessing.get_context("spawn").Pool(1) as workers:
        assert workers.apply(serve_in_worker, (manager, pool)) == (64.0, 1, 0, 1)
    assert (len(held), manager.get_stats()["outstanding"]) == (3, 3)
