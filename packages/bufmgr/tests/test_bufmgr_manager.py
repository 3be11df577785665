"""What a manager promises: hits, limits, zeros, preallocation, defaults, statistics."""

import logging
from typing import Any

import pytest
import torch

from longattn.bufmgr import (
    DEFAULT_CONFIGS,
    AttentionBufferManager,
    BufferConfig,
    BufferType,
    MemoryPool,
    create_attention_buffer_manager,
)
from longattn.bufmgr.testing import FailingAllocator

Q, K, TEMP = BufferType.QUERY, BufferType.KEY, BufferType.TEMP


def only(kind: BufferType, **policy: Any) -> dict[BufferType, BufferConfig]:
    return {kind: BufferConfig(**policy)}


def used_bytes(manager: AttentionBufferManager) -> tuple[int, int]:
    stats = manager.get_stats()
    return stats["outstanding"], stats["cached_bytes"]


def test_guide_example_hits_while_the_names_are_in_scope():
    """seeds/000, basic usage: the next QUERY buffer reuses the memory, though `query` is still a name."""
    manager = create_attention_buffer_manager(enable_reuse=True, enable_preallocation=False, lightweight=True)
    query = manager.allocate(Q, shape=(2, 1024, 8, 64), dtype=torch.float32, device="cpu")
    key = manager.allocate(K, shape=(2, 1024, 8, 64))
    value = manager.allocate(BufferType.VALUE, shape=(2, 1024, 8, 64))
    address = query.data_ptr()
    manager.deallocate(query, Q)
    manager.deallocate(key, K)
    manager.deallocate(value, BufferType.VALUE)
    query2 = manager.allocate(Q, shape=(2, 1024, 8, 64))
    assert query2.data_ptr() == address
    assert (query.shape, query2.shape) == ((0,), (2, 1024, 8, 64))
    stats = manager.get_stats()
    assert (stats["cache_hits"], stats["cache_misses"], stats["cache_hit_rate"]) == (1, 3, 0.25)
    with pytest.raises(ValueError, match="empty tensor"):
        manager.deallocate(query, Q)


def test_types_do_not_share_a_cache():
    manager = AttentionBufferManager()
    manager.deallocate(manager.allocate(Q, (64,)), Q)
    manager.allocate(K, (64,))
    types = manager.get_stats()["types"]
    assert (types["query"]["cached_buffers"], types["key"]["cache_misses"], types["key"]["cache_hits"]) == (1, 1, 0)


def test_a_block_serves_any_shape_and_dtype_of_its_size():
    manager = AttentionBufferManager()
    manager.deallocate(manager.allocate(TEMP, (16, 4), torch.float32), TEMP)
    assert manager.allocate(TEMP, (2, 64), torch.bfloat16).shape == (2, 64)
    assert manager.get_stats()["cache_hits"] == 1


def test_evicts_exactly_the_least_recently_used():
    """Of sizes 1..4 (in lines of 64 bytes) with room for 3, the one whose return is longest ago goes."""
    upstream = FailingAllocator()
    manager = AttentionBufferManager(only(TEMP, max_cached_buffers=3), upstream=upstream)
    tensors = {n: manager.allocate(TEMP, (64 * n,), torch.uint8) for n in (1, 2, 3, 4)}
    for n in (2, 1, 3):
        manager.deallocate(tensors[n], TEMP)
    again = manager.allocate(TEMP, (128,), torch.uint8)  # 2 is used again, so now 1 is the oldest
    manager.deallocate(again, TEMP)
    manager.deallocate(tensors[4], TEMP)
    assert [block.nbytes // 64 for block in manager._book.caches[TEMP].blocks()] == [3, 2, 4]
    assert upstream.held_bytes == 64 * (3 + 2 + 4)
    assert manager.get_stats()["evictions"] == 1


def test_many_shapes_stay_within_the_limits():
    """200 shapes retain no more than the type's count and bytes allow (the original kept 137 times the peak)."""
    upstream = FailingAllocator()
    manager = AttentionBufferManager(only(TEMP, max_cached_buffers=5, max_cached_mb=0.5), upstream=upstream)
    for n in range(200):
        manager.deallocate(manager.allocate(TEMP, (1024 * (n + 1),), torch.uint8), TEMP)
        stats = manager.get_stats()
        assert stats["cached_buffers"] <= 5
        assert upstream.held_bytes == stats["cached_bytes"] <= 2**19
    assert upstream.held_bytes > 0


def test_a_buffer_over_the_byte_limit_is_not_kept():
    manager = AttentionBufferManager(only(TEMP, max_cached_mb=0.25))
    manager.deallocate(manager.allocate(TEMP, (2**18,), torch.uint8), TEMP)
    assert used_bytes(manager) == (0, 2**18)
    manager.deallocate(manager.allocate(TEMP, (2**18 + 1,), torch.uint8), TEMP)
    assert used_bytes(manager) == (0, 2**18)


@pytest.mark.parametrize("numel", [10, 100_000])
@pytest.mark.parametrize("kind", list(BufferType))
def test_zeros_by_type_also_after_dirty_reuse(kind: BufferType, numel: int):
    """OUTPUT starts as zeros every time; `zero_init` decides otherwise in both directions."""
    manager = AttentionBufferManager()
    for zero_init in (None, True, False):
        dirty = manager.allocate(kind, (numel,)).fill_(7.0)
        manager.deallocate(dirty, kind)
        tensor = manager.allocate(kind, (numel,), zero_init=zero_init)
        zeros = DEFAULT_CONFIGS[kind].zero_init if zero_init is None else zero_init
        assert tensor.unique().tolist() == ([0.0] if zeros else [7.0])
        manager.deallocate(tensor, kind)
    assert manager.get_stats()["cache_hits"] == 5


def test_preallocated_buffers_hit():
    """One each of QUERY, KEY, VALUE and OUTPUT, never SCORES; each is hit by the next allocate of that shape."""
    manager = AttentionBufferManager()
    assert manager.preallocate_buffers(batch_size=2, seq_len=256, num_heads=8, head_dim=64) == 4
    types = manager.get_stats()["types"]
    ready = {name for name, entry in types.items() if entry["cached_buffers"]}
    assert ready == {"query", "key", "value", "output"}
    assert manager.preallocate_buffers(2, 256, 8, 64) == 4  # they are there: nothing is added
    tensors = [manager.allocate(name, (2, 256, 8, 64)) for name in sorted(ready)]
    assert not torch.stack(tensors).any()
    stats = manager.get_stats()
    assert (stats["cache_hits"], stats["cache_misses"], stats["cached_buffers"]) == (4, 0, 0)


def test_preallocated_buffers_hit_also_where_they_are_large():
    """More than the arena's floor: what was readied is not given back before it was used once."""
    manager = AttentionBufferManager(upstream=MemoryPool())
    assert manager.preallocate_buffers(1, 8192, 8, 64) == 4
    held = [manager.allocate(kind, (1, 8192, 8, 64)) for kind in ("query", "key", "value", "output")]
    assert [manager.get_stats()["types"][kind]["cache_hits"] for kind in ("query", "key", "value", "output")] == [1] * 4
    assert all(x.count_nonzero() == 0 for x in held)


def test_preallocation_within_limits_and_failures():
    upstream = FailingAllocator()
    manager = AttentionBufferManager(only(K, max_cached_mb=0.001), upstream=upstream)
    assert manager.preallocate_buffers(1, 64, 2, 16) == 3
    assert AttentionBufferManager(enable_reuse=False).preallocate_buffers(1, 64, 2, 16) == 0
    assert manager.preallocate_buffers(0, 64, 2, 16) == 0
    assert manager.preallocate_buffers(1, 64, 2, 16, device="meta") == 0
    upstream.refusals_left = 1
    with pytest.raises(MemoryError):
        manager.preallocate_buffers(1, 128, 2, 16)
    manager.clear_cache()
    manager.check_valid()
    assert upstream.held_bytes == 0


def test_enable_preallocation_readies_the_rest_of_a_step():
    manager = AttentionBufferManager(enable_preallocation=True)
    tensors = [manager.allocate(kind, (1, 32, 2, 16)) for kind in ("query", "key", "value", "output")]
    stats = manager.get_stats()
    assert (len(tensors), stats["cache_hits"], stats["cache_misses"]) == (4, 3, 1)


def test_clear_cache_frees_memory_of_one_type_or_all():
    upstream = FailingAllocator()
    manager = AttentionBufferManager(upstream=upstream)
    for kind in (Q, K, TEMP):
        manager.deallocate(manager.allocate(kind, (64,), torch.uint8), kind)
    kept = manager.allocate(Q, (128,), torch.uint8)
    manager.clear_cache(TEMP)
    assert upstream.held_bytes == 256
    manager.clear_cache()
    assert upstream.held_bytes == 128
    assert used_bytes(manager) == (1, 0)
    manager.deallocate(kept, Q)
    assert used_bytes(manager) == (0, 128)


def test_without_reuse_every_request_is_a_miss():
    upstream = FailingAllocator()
    manager = AttentionBufferManager(enable_reuse=False, upstream=upstream)
    for _ in range(3):
        manager.deallocate(manager.allocate(Q, (64,)), Q)
    stats = manager.get_stats()
    assert (stats["cache_hits"], stats["cache_misses"], stats["evictions"], upstream.held_bytes) == (0, 3, 0, 0)


def test_profile_is_there_when_asked_for():
    assert "profile" not in AttentionBufferManager().get_stats()
    manager = AttentionBufferManager(enable_profiling=True)
    manager.allocate(Q, (10,), torch.float32)
    manager.allocate(Q, (0,))
    profile = manager.get_stats()["profile"]
    assert set(profile) == {kind.value for kind in BufferType}
    assert (profile["query"]["count"], profile["query"]["bytes"]) == (2, 40)
    assert profile["query"]["time"] > 0 == profile["key"]["time"]


def test_kernels_names_for_the_same_thing():
    """`empty` leaves memory as it is, for OUTPUT too; `release` is deallocate by role."""
    manager = AttentionBufferManager()
    tensor = manager.empty((4,), torch.float32, torch.device("cpu"), "output").fill_(3)
    with pytest.raises(ValueError, match="type must be OUTPUT, which this buffer was leased as, got TEMP"):
        manager.release(tensor, "temp")
    manager.release(tensor, "output")
    assert manager.empty((4,), torch.float32, torch.device("cpu"), "output").tolist() == [3] * 4


def test_debug_log_tells_of_misses_and_cleanups(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG, logger="longattn.bufmgr"):
        manager = AttentionBufferManager()
        manager.deallocate(manager.allocate(Q, (3,), torch.float32), Q)
        manager.clear_cache()
    assert [record.getMessage() for record in caplog.records] == [
        "miss: QUERY buffer of shape (3,), torch.float32, 12 bytes (0.00 GiB) on cpu",
        "cleanup: all types gave back 64 bytes",
    ]


def test_refused_memory_is_asked_for_again_after_a_cleanup():
    """When the upstream refuses, the manager gives its free blocks back and tries once more."""
    upstream = FailingAllocator()
    manager = AttentionBufferManager(upstream=upstream)
    manager.deallocate(manager.allocate(Q, (64,), torch.uint8), Q)
    upstream.refusals_left = 1
    tensor = manager.allocate(K, (128,), torch.uint8)
    assert upstream.held_bytes == 128 == tensor.numel()
    upstream.refusals_left = 1
    with pytest.raises(MemoryError, match="no memory for a KEY buffer of shape \\(64,\\)"):
        manager.allocate(K, (64,))
    manager.check_valid()
    assert used_bytes(manager) == (1, 0)


def test_pool_gives_up_its_free_blocks_for_a_manager():
    upstream = FailingAllocator()
    pool = MemoryPool(upstream)
    pool.release(pool.empty((64,), torch.uint8))
    manager = AttentionBufferManager(upstream=pool)
    upstream.refusals_left = 1
    assert manager.allocate(K, (128,), torch.uint8).numel() == 128 == upstream.held_bytes
