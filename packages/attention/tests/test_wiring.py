"""Every flag changes something that can be seen: statistics, attributes, where memory comes from."""

import copy
import gc
import pickle

import pytest
import torch

from longattn.attention import (
    DilatedAttention,
    ImprovedDilatedAttentionV2,
    PatternAttention,
    RingDilatedAttentionV3,
    Wiring,
)
from longattn.attention.testing import MULTIHEAD_PRESETS, PRESET_FLAGS, PRESETS, small_inputs, small_preset
from longattn.bufmgr import AttentionBufferManager, reset_global_memory_pool
from longattn.kernels import Environment, attend, reference_attention
from longattn.patterncache import (
    Dilated,
    Rectangle,
    Span,
    get_global_pattern_cache,
    reset_global_pattern_cache,
)

ALL = {**PRESETS, **MULTIHEAD_PRESETS}
SHAPE = {"segment_lengths": (8, 16), "dilation_rates": (1, 2)}


@pytest.fixture
def torch_rows(monkeypatch):
    """What a test says about scratch is the torch rows': the native row, which comes first, needs other scratch."""
    monkeypatch.setenv("LONGATTN_NATIVE", "0")


@pytest.mark.parametrize("name", ALL)
def test_off_is_off(name, pool_leases):
    """Without flags: attributes None, no manager at all, empty statistics, and no environment."""
    module = small_preset(name)
    assert (module.use_pattern_cache, module.enable_memory_pool) == (False, False)
    assert module._pattern_cache is None and module._memory_pool is None
    assert not hasattr(module, "buffer_manager") and module.get_buffer_stats() == {}
    assert module._resources.environment is None
    module.cleanup_buffers()
    before = pool_leases()
    module(*small_inputs(name))
    assert pool_leases() == before


@pytest.mark.parametrize("name", ALL)
def test_enable_memory_pool_leases_scratch_and_returns_it(name, pool_leases):
    """Each forward and backward asks the pool; afterwards nothing is in use."""
    module = small_preset(name, enable_memory_pool=True)
    assert module.enable_memory_pool
    with torch.no_grad():
        for _ in range(2):
            module(*small_inputs(name))
    held, asked = pool_leases()
    assert held == 0 and asked >= 2 and module._memory_pool.get_stats()["reuse_rate"] > 0
    out = module(*small_inputs(name, requires_grad=True))
    out.sum().backward()
    del out
    gc.collect()
    assert pool_leases()[0] == 0
    assert "profile" not in module._memory_pool.get_stats()


@pytest.mark.usefixtures("torch_rows")
@pytest.mark.parametrize("name", ALL)
def test_what_is_saved_for_backward_stays_leased(name, pool_leases):
    """lse, from forward until nobody sees it."""
    out = small_preset(name, enable_memory_pool=True)(*small_inputs(name, requires_grad=True))
    assert pool_leases()[0] > 0
    out.sum().backward()
    del out
    gc.collect()
    assert pool_leases()[0] == 0


@pytest.mark.usefixtures("torch_rows")
def test_half_precision_accumulators_are_the_pools():
    """Overlapping branches add up in float32; that memory is leased, the output is not."""
    module = DilatedAttention((8, 16), (1, 2), enable_memory_pool=True, enable_profiling=True)
    q = torch.randn(1, 64, 2, 8, dtype=torch.bfloat16)
    module(q, q, q)
    assert module._memory_pool.get_stats()["profile"]["temp"]["bytes"] >= 4 * q.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [None, "sdpa", "gather"])
def test_branches_on_the_same_rows_are_rounded_once_under_a_manager(dtype, backend):
    """The half-precision output is the manager's, its sums are float32: as exact as without one, also in memory that served before."""
    pattern = Dilated((8, 16, 24), (1, 2, 1), causal=True)
    q, k, v = (torch.randn(2, 24, 2, 8, dtype=dtype, generator=torch.Generator().manual_seed(n)) for n in range(3))
    exact = reference_attention(q, k, v, pattern.counts(Rectangle(2, Span(0, 24), Span(0, 24)))).out
    manager = AttentionBufferManager()
    options = {"backend": backend, "out_dtype": dtype, "environment": Environment(allocator=manager)}
    for _ in range(3):
        out = attend(q, k, v, pattern, **options).out
        # Half a unit in the last place of the largest, and what float32 adds.
        assert (out.double() - exact).abs().max() <= 0.51 * torch.finfo(dtype).eps * exact.abs().max()
        assert torch.equal(out, attend(q, k, v, pattern, backend=backend, out_dtype=dtype).out)
        del out
    assert manager.get_stats()["outstanding"] == 0


@pytest.mark.usefixtures("torch_rows")
def test_lightweight_pool_leaves_small_scratch_to_torch(pool_leases):
    """Nothing under 1 MiB is leased."""
    q = torch.randn(1, 64, 2, 8)
    DilatedAttention(**SHAPE, enable_memory_pool=True, lightweight_pool=True)(q, q, q)
    assert pool_leases() == (0, 0)
    DilatedAttention(**SHAPE, enable_memory_pool=True)(q, q, q)
    assert pool_leases()[1] > 0
    reset_global_memory_pool()
    large = torch.randn(1, 4096, 4, 32, dtype=torch.bfloat16)
    DilatedAttention((64, 128), (1, 2), enable_memory_pool=True, lightweight_pool=True)(large, large, large)
    assert pool_leases()[1] == 1  # the float32 accumulators, 2 MiB; not lse, 64 KiB


def test_enable_profiling_adds_profiles():
    """Count, bytes and time per key of the cache, per role of the pool, per type of the manager."""
    module = RingDilatedAttentionV3(**SHAPE, use_pattern_cache=True, enable_memory_pool=True, enable_profiling=True)
    for _ in range(3):
        module(*small_inputs("RingDilatedAttentionV3"))
    profile = module._pattern_cache.get_stats()["profile"]
    assert [set(row) for row in profile.values()] == [{"count", "bytes", "time"}] and next(iter(profile.values()))[
        "count"
    ] == 3
    count = module._memory_pool.get_stats()["profile"]["temp"]["count"]
    assert count >= 3 and count % 3 == 0  # each call alike
    managed = ImprovedDilatedAttentionV2(**SHAPE, enable_buffer_manager=True, enable_profiling=True)
    managed(*small_inputs("ImprovedDilatedAttentionV2"))
    assert managed.get_buffer_stats()["profile"]["output"]["count"] == 1
    plain = RingDilatedAttentionV3(**SHAPE, use_pattern_cache=True)
    assert "profile" not in plain._pattern_cache.get_stats()


@pytest.mark.parametrize("name", [n for n in ALL if "use_pattern_cache" in PRESET_FLAGS[n]])
def test_use_pattern_cache_counts_a_modules_own_hits(name):
    """Hits and misses are the module's; size is global; both survive a reset of the global cache."""
    first, second = small_preset(name, use_pattern_cache=True), small_preset(name, use_pattern_cache=True)
    assert first.use_pattern_cache
    for _ in range(3):
        first(*small_inputs(name))
    second(*small_inputs(name))
    assert (first._pattern_cache.get_stats()["hits"], first._pattern_cache.get_stats()["misses"]) == (2, 1)
    stats = second._pattern_cache.get_stats()
    assert (stats["hits"], stats["misses"], stats["hit_rate"]) == (1, 0, 1.0)
    assert len(first._pattern_cache._cache) == len(first._pattern_cache) == len(get_global_pattern_cache()) == 1
    reset_global_pattern_cache()
    assert stats["size"] == 1 and second._pattern_cache.get_stats()["size"] == 0
    first(*small_inputs(name))
    assert first._pattern_cache.get_stats()["misses"] == 2 and len(second._pattern_cache._cache) == 1


@pytest.mark.usefixtures("torch_rows")
def test_cache_on_gpu_keeps_index_tensors_with_the_plan(monkeypatch):
    """With the flag the second call makes none; without it every call makes its own."""
    made = []
    from longattn.kernels.eager import tiles

    original = torch.from_numpy
    monkeypatch.setattr(tiles.torch, "from_numpy", lambda rows: (made.append(rows), original(rows))[1])
    padding = torch.zeros(1, 21, dtype=torch.bool)
    x = small_inputs("RingDilatedAttentionV3")
    module = RingDilatedAttentionV3(**SHAPE, use_pattern_cache=True, cache_on_gpu=True)
    plain = RingDilatedAttentionV3(**SHAPE, use_pattern_cache=True)
    assert torch.equal(plain(*x, key_padding_mask=padding), plain(*x, key_padding_mask=padding))
    each = len(made) // 2
    expected = plain(*x, key_padding_mask=padding)
    made.clear()
    for calls in (1, 2, 3):
        assert torch.equal(module(*x, key_padding_mask=padding), expected)
        assert (0 < len(made) <= each) if calls == 1 else True
        if calls == 1:
            made.clear()
        assert made == []
    assert module._pattern_cache.get_stats()["resident_bytes"] > 0
    assert "resident_bytes" not in plain._pattern_cache.get_stats()
    reset_global_pattern_cache()
    assert module._pattern_cache.get_stats()["resident_bytes"] == 0


def test_the_buffer_manager_serves_outputs_and_scratch():
    """The second forward's output is a hit once the first is gone; cleanup gives free memory back."""
    module = ImprovedDilatedAttentionV2(**SHAPE, enable_buffer_manager=True)
    x = small_inputs("ImprovedDilatedAttentionV2")
    out = module(*x)
    stats = module.get_buffer_stats()
    assert stats["types"]["output"]["outstanding"] == 1 and stats["cache_hits"] == 0 and stats["cache_hit_rate"] == 0
    del out
    module(*x)
    stats = module.get_buffer_stats()
    assert stats["types"]["output"]["cache_hits"] == 1 and stats["cached_bytes"] > 0
    module.cleanup_buffers()
    assert module.buffer_manager.get_stats()["cached_bytes"] == 0


def test_enable_buffer_reuse_off_never_hits():
    """What comes back is not kept."""
    module = ImprovedDilatedAttentionV2(**SHAPE, enable_buffer_manager=True, enable_buffer_reuse=False)
    for _ in range(3):
        module(*small_inputs("ImprovedDilatedAttentionV2"))
    assert module.get_buffer_stats()["cache_hits"] == 0


def test_enable_preallocation_acts_at_the_first_forward():
    """The very first output is a hit: its pages were written to before."""
    options = {"enable_buffer_manager": True, "enable_preallocation": True}
    module = ImprovedDilatedAttentionV2(**SHAPE, **options)
    assert module.get_buffer_stats()["cached_buffers"] == 0
    assert module.buffer_manager.enable_preallocation
    out = module(*small_inputs("ImprovedDilatedAttentionV2"))
    types = module.get_buffer_stats()["types"]
    assert types["output"]["cache_hits"] == 1 and types["query"]["cached_buffers"] == 1
    assert types["scores"]["cached_buffers"] == 0 and out.shape == (1, 21, 2, 8)


@pytest.mark.parametrize("value", [True, False])
def test_the_manager_says_how_it_was_wired(value: bool):
    """Each flag reads on the module's manager as it was given, also after a copy."""
    flags = {"enable_preallocation": value, "enable_profiling": value, "enable_buffer_reuse": value}
    module = ImprovedDilatedAttentionV2(**SHAPE, enable_buffer_manager=True, **flags)
    module(*small_inputs("ImprovedDilatedAttentionV2"))
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        manager = twin.buffer_manager
        assert [manager.enable_preallocation, manager.enable_profiling, manager.enable_reuse] == [value] * 3
        assert (twin is module) == (manager.get_stats()["cache_misses"] > 0)


def test_wiring_works_on_any_pattern():
    """The flags are no privilege of presets."""
    module = PatternAttention(Dilated((8,), (1,)), wiring=Wiring(use_pattern_cache=True, enable_buffer_manager=True))
    module(*small_inputs("DilatedAttention"))
    assert module._pattern_cache.get_stats()["misses"] == 1 and module.get_buffer_stats()["cache_misses"] > 0
