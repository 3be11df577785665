"""The process-wide pool: one object, honest counters, bounded."""

import threading

import pytest
import torch

from longattn.bufmgr import (
    AttentionBufferManager,
    BufferType,
    MemoryPool,
    get_global_memory_pool,
    reset_global_memory_pool,
)
from longattn.bufmgr.testing import FailingAllocator

CPU = torch.device("cpu")


def test_one_pool_for_all_threads():
    """Every caller gets the same object, also when the first calls come at once."""
    found = []
    threads = [threading.Thread(target=lambda: found.append(get_global_memory_pool())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {id(pool) for pool in found} == {id(get_global_memory_pool())}


def test_reset_empties_the_same_object():
    """Live modules hold the pool: reset keeps the object and what is leased from it."""
    pool = get_global_memory_pool()
    reset_global_memory_pool()
    base = pool.get_stats()["total_allocated"]
    held = pool.empty((256,), torch.uint8, CPU, "temp").fill_(3)
    pool.release(pool.empty((4096,), torch.uint8, CPU, "temp"), "temp")
    stats = pool.get_stats()
    assert (stats["total_allocated"] - base, stats["cached_bytes"]) == (256 + 4096, 4096)
    reset_global_memory_pool()
    assert get_global_memory_pool() is pool
    stats = pool.get_stats()
    assert (stats["total_allocated"] - base, stats["peak_allocated"] - base) == (256, 256)
    assert (stats["allocation_count"], stats["reuse_rate"], stats["cached_buffers"]) == (0, 0.0, 0)
    assert held.unique().tolist() == [3]
    pool.release(held, "temp")


def test_counters():
    """total: held now. peak: the most at once. allocation_count: all requests. reuse_rate: those without new memory."""
    pool = MemoryPool()
    assert pool.get_stats()["reuse_rate"] == 0.0
    first, second = (pool.empty((1024,), torch.uint8, CPU, "scores") for _ in range(2))
    pool.release(first, "scores")
    third = pool.empty((128,), torch.float64, CPU, "temp")  # the pool has no types: the block fits
    stats = pool.get_stats()
    assert {name: stats[name] for name in ("total_allocated", "peak_allocated", "allocation_count")} == {
        "total_allocated": 2048,
        "peak_allocated": 2048,
        "allocation_count": 3,
    }
    assert stats["reuse_rate"] == pytest.approx(1 / 3)
    assert stats["devices"]["cpu"]["current_count"] == 2
    pool.release(second, "scores")
    pool.release(third, "temp")
    pool.check_valid()


def test_pool_counts_what_managers_hold():
    upstream = FailingAllocator()
    pool = MemoryPool(upstream)
    manager = AttentionBufferManager(upstream=pool)
    manager.deallocate(manager.allocate(BufferType.KEY, (64,), torch.uint8), BufferType.KEY)
    assert (pool.get_stats()["total_allocated"], pool.get_stats()["allocation_count"]) == (64, 1)
    manager.clear_cache()
    assert (pool.get_stats()["total_allocated"], pool.get_stats()["peak_allocated"], upstream.held_bytes) == (0, 64, 0)


def test_pool_is_bounded():
    upstream = FailingAllocator()
    pool = MemoryPool(upstream, max_cached_buffers=4, max_cached_mb=1.0)
    for n in range(100):
        pool.release(pool.empty((n * 5000 + 1,), torch.uint8, CPU, "temp"), "temp")
        assert upstream.held_bytes == pool.get_stats()["cached_bytes"] <= 2**20
    assert pool.get_stats()["cached_buffers"] <= 4


def test_other_devices_are_counted_apart():
    pool = MemoryPool()
    tensor = pool.empty((8,), torch.float32, torch.device("meta"), "temp")
    none = pool.empty((0,), torch.float32, CPU, "temp")
    devices = pool.get_stats()["devices"]
    assert (devices["meta"]["current_bytes"], devices["cpu"]["current_bytes"]) == (32, 0)
    assert pool.get_stats()["allocation_count"] == 2
    pool.release(tensor, "temp")
    pool.release(none, "temp")
    assert pool.get_stats()["total_allocated"] == 0


def test_pool_refuses_as_managers_do():
    pool = MemoryPool()
    tensor = pool.empty((8,), torch.float32, CPU, "temp")
    with pytest.raises(ValueError, match="type must be TEMP, which this buffer was leased as, got SCORES"):
        pool.release(tensor, "scores")
    with pytest.raises(ValueError, match="release the tensor that allocate returned"):
        pool.release(tensor[1:], "temp")
    pool.release(tensor, "temp")
    with pytest.raises(ValueError, match="released before"):
        pool.release(tensor, "temp")
