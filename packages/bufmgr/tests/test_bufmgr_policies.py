"""Strategies, memory pressure, scopes, debugging, profiling and statistics."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from longattn.bufmgr import (
    AttentionBufferManager,
    BufferConfig,
    BufferType,
    FailureCallbackAllocator,
    LoggingAllocator,
    MemoryPool,
    MemoryReading,
    StatisticsAllocator,
    Strategy,
    SystemAllocator,
)
from longattn.bufmgr.memory.pressure import read_host_memory, share_to_give_back
from longattn.bufmgr.strategy import block_bounds, choose_strategy, size_class
from longattn.bufmgr.testing import FailingAllocator

TEMP, SCORES = BufferType.TEMP, BufferType.SCORES
MIB = 2**20


@pytest.mark.parametrize(
    ("policy", "mib", "nodes", "expected"),
    [
        ({"prefer_bucketed": True, "reuse_frequency": "high"}, 0.99, 1, Strategy.BUCKETED),
        ({"prefer_bucketed": True, "reuse_frequency": "high"}, 1.0, 1, Strategy.DIRECT),
        ({"prefer_bucketed": True, "reuse_frequency": "low"}, 0.5, 1, Strategy.DIRECT),
        ({"prefer_numa": True, "typical_size_mb": 32.0}, 17, 2, Strategy.NUMA_AWARE),
        ({"prefer_numa": True, "typical_size_mb": 32.0}, 17, 1, Strategy.DIRECT),
        ({"prefer_numa": True, "typical_size_mb": 32.0}, 16, 2, Strategy.DIRECT),
        ({"typical_size_mb": 4.0}, 8.5, 1, Strategy.FRAGMENT_AWARE),
        ({"typical_size_mb": 4.0}, 8, 1, Strategy.DIRECT),
    ],
)
def test_strategies(policy: dict[str, Any], mib: float, nodes: int, expected: Strategy):
    """The guide's four rules; `lightweight` leaves the two in the middle out."""
    config = BufferConfig(**policy)
    nbytes = int(mib * MIB)
    assert choose_strategy(config, nbytes, lightweight=False, nodes=nodes) is expected
    slower = expected in (Strategy.NUMA_AWARE, Strategy.FRAGMENT_AWARE)
    assert choose_strategy(config, nbytes, lightweight=True, nodes=nodes) is (Strategy.DIRECT if slower else expected)


def test_size_classes_waste_an_eighth_at_most():
    for nbytes in [*range(1, 5000, 7), *range(65000, 2**20, 4099)]:
        size = size_class(nbytes)
        exact, _ = block_bounds(Strategy.DIRECT, nbytes)
        assert exact <= size <= max(exact * 9 // 8 + 4096 * (nbytes > 65536), exact)
        assert size_class(size) == size


def test_fragment_aware_takes_the_tightest_block():
    manager = AttentionBufferManager({SCORES: BufferConfig(typical_size_mb=0.01)}, lightweight=False)
    held = [manager.allocate(SCORES, (size,), torch.uint8) for size in (131072, 143360, 262144)]
    address = held[1].data_ptr()
    held.clear()
    assert manager.strategy(SCORES, (135168,), torch.uint8) is Strategy.FRAGMENT_AWARE
    tensor = manager.allocate(SCORES, (135168,), torch.uint8)
    assert tensor.data_ptr() == address
    assert manager.get_stats()["strategies"]["fragment_aware"] == 4


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_pressure_readings(tmp_path: Path):
    """The nearest limit counts: the machine's, or a control group's of either version, without idle file pages."""
    assert read_host_memory(tmp_path) is None
    write(tmp_path, proc__meminfo="MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 500 kB\n")
    assert read_host_memory(tmp_path) == MemoryReading(1024000, 512000, "machine")
    write(tmp_path, proc__self__cgroup="0::/jobs/one\n")
    group = tmp_path / "sys/fs/cgroup/jobs"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("1000\n")
    (group / "memory.current").write_text("900\n")
    (group / "memory.stat").write_text("anon 700\ninactive_file 200\n")
    assert read_host_memory(tmp_path) == MemoryReading(1000, 300, "cgroup")
    (group / "memory.max").write_text("max\n")
    write(tmp_path, proc__self__cgroup="4:cpu,memory:/old\n")
    old = tmp_path / "sys/fs/cgroup/memory"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("1000\n")
    (old / "memory.usage_in_bytes").write_text("990\n")
    assert read_host_memory(tmp_path) == MemoryReading(1000, 10, "cgroup")
    (old / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    reading = read_host_memory(tmp_path)
    assert reading is not None and reading.source == "machine"


@pytest.mark.parametrize(
    ("cleanup", "used", "share"),
    [
        ("adaptive", 0.84, 0.0),
        ("adaptive", 0.86, 0.5),
        ("adaptive", 0.96, 1.0),
        ("aggressive", 0.69, 0.0),
        ("aggressive", 0.71, 1.0),
    ],
)
def test_policies_of_cleanup(cleanup: Any, used: float, share: float):
    assert share_to_give_back(cleanup, MemoryReading(1000, round(1000 * (1 - used)), "machine")) == share
    assert share_to_give_back(cleanup, None) == 0.0


@pytest.mark.parametrize(("cleanup", "left"), [("adaptive", 2048), ("aggressive", 0)])
def test_free_memory_goes_when_memory_is_short(monkeypatch: pytest.MonkeyPatch, cleanup: Any, left: int):
    """At 90 % in use, adaptive gives the older half of what is free back, aggressive all of it."""
    upstream = FailingAllocator()
    manager = AttentionBufferManager(upstream=upstream, cleanup=cleanup)
    for kind in ("query", "key"):
        manager.allocate(kind, (2048,), torch.uint8)
    assert upstream.held_bytes == 4096
    monkeypatch.setattr("longattn.bufmgr.memory.pressure.read_host_memory", lambda: MemoryReading(100, 10, "machine"))
    manager._gauge._next_reading = 0.0
    tensor = manager.allocate("value", (64,), torch.uint8)
    assert upstream.held_bytes == left + tensor.nbytes
    with pytest.raises(ValueError, match="cleanup must be 'adaptive' or 'aggressive', got 'never'"):
        AttentionBufferManager(cleanup="never")  # pyright: ignore[reportArgumentType]


def test_scope_returns_what_nothing_else_saw():
    manager = AttentionBufferManager()
    with manager.scope() as scope:
        alone, seen, kept = (manager.allocate(TEMP, (8,)).fill_(n) for n in range(3))
        view = seen[2:]
        scope.keep(kept)
        inner_address = manager.allocate("key", (8,)).data_ptr()
        with manager.scope():
            nested = manager.empty((16,), torch.float32)
        assert nested.shape == (0,)
    assert (alone.shape, seen.shape, kept.shape, view.unique().tolist()) == ((0,), (8,), (8,), [1.0])
    assert manager.get_stats()["outstanding"] == 2
    with pytest.raises(ValueError, match="tensor must be a buffer of this scope"):
        scope.keep(alone)
    assert manager.allocate("key", (8,)).data_ptr() == inner_address


def test_scope_ends_on_an_exception_and_leaves_released_ones_alone():
    manager = AttentionBufferManager()
    prepared = manager.prepare(TEMP, (8,))
    prepared.acquire()
    with contextlib.suppress(RuntimeError), manager.scope():
        first, second = manager.allocate(TEMP, (4,)), prepared.acquire()
        manager.deallocate(first, TEMP)
        raise RuntimeError("in the middle")
    assert (first.shape, second.shape, manager.get_stats()["outstanding"]) == ((0,), (0,), 0)
    again = manager.allocate(TEMP, (4,))
    assert again.shape == (4,)  # outside, nothing is noted any more


def test_allocate_like():
    manager = AttentionBufferManager()
    model = torch.ones(3, 5, dtype=torch.bfloat16).mT
    tensor = manager.allocate_like("output", model)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous(), tensor.any().item()) == (
        (5, 3),
        model.dtype,
        True,
        False,
    )
    assert manager.allocate_like("temp", model, torch.int8).dtype == torch.int8
    assert manager.allocate_like("temp", model.to("meta")).is_meta
    with pytest.raises(TypeError, match="tensor must be a tensor"):
        manager.allocate_like("temp", (3, 5))  # pyright: ignore[reportArgumentType]


def test_leak_seven_find_seven():
    """Debugging names what is out: type, shape, how often the memory was lent, and the line of the call."""
    manager = AttentionBufferManager(debug=True)
    manager.allocate(TEMP, (64,))
    leaked = [manager.allocate(TEMP, (64,)) for _ in range(7)]
    found = manager.outstanding()
    assert [buffer.shape for buffer in found] == [(64,)] * 7
    assert [buffer.note.generation for buffer in found if buffer.note] == [2, 1, 1, 1, 1, 1, 1]
    assert all(buffer.note and "test_bufmgr_policies.py" in buffer.note.site for buffer in found)
    view = leaked[0][1:]
    manager.deallocate(leaked[0], TEMP)
    assert [buffer.released for buffer in manager.outstanding()] == [True] + [False] * 6
    with pytest.raises(ValueError, match="released before.*generation 2"):
        manager.deallocate(leaked[0], TEMP)
    leaked.clear()
    assert (len(manager.outstanding()), view.shape) == (1, (63,))


def test_poison_finds_late_writers():
    """Memory that came back reads as NaN; whoever writes there through a raw pointer is named at the next loan."""
    manager = AttentionBufferManager(debug=True)
    tensor = manager.allocate(TEMP, (64,)).fill_(1.0)
    del tensor
    (block,) = manager._book.caches[TEMP].blocks()
    raw = torch.frombuffer(block.memory, dtype=torch.float32)
    assert raw.isnan().all()
    assert manager.allocate(TEMP, (64,)).isnan().all()
    raw[3] = 0.0
    with pytest.raises(RuntimeError, match="written to after it came back from its loan number 2"):
        manager.allocate(TEMP, (64,))
    manager.check_valid()
    assert manager.allocate(TEMP, (64,)).shape == (64,)


def test_timeline_and_outstanding_without_lightweight():
    manager = AttentionBufferManager(enable_profiling=True, lightweight=False)
    tensor = manager.allocate(TEMP, (4,), torch.float32)
    (event,) = manager.timeline()
    assert (event.type, event.nbytes) == ("temp", 16) and event.nanoseconds > 0
    (buffer,) = manager.outstanding()
    assert buffer.note is not None and buffer.nbytes == tensor.nbytes
    assert AttentionBufferManager(enable_profiling=True).timeline() == []


def test_statistics_in_torchs_words():
    manager = AttentionBufferManager(upstream=SystemAllocator())
    held = manager.allocate(TEMP, (64,), torch.uint8)
    manager.allocate(TEMP, (128,), torch.uint8)
    stats = manager.memory_stats()
    assert (stats["reserved_bytes.all.current"], stats["allocated_bytes.all.current"]) == (192, held.nbytes)
    assert (stats["segment.all.current"], stats["allocation.all.current"]) == (2, 1)
    manager.clear_cache()
    manager.reset_peak_memory_stats()
    assert manager.memory_stats()["reserved_bytes.all.peak"] == 64
    assert "cpu" in manager.memory_summary()


def test_pool_statistics_push_and_pop():
    pool = MemoryPool()
    first = pool.allocate(64)
    pool.push_statistics()
    second = pool.allocate(128)
    pool.deallocate(first)
    inner = pool.pop_statistics()
    assert (inner.total_bytes, inner.current_bytes, inner.peak_bytes) == (128, 64, 128)
    assert pool.memory_stats()["reserved_bytes.all.peak"] == 192
    assert "cpu" in pool.memory_summary()
    stats = pool.memory_stats()
    assert (stats["allocated_bytes.all.current"], stats["allocation.all.current"]) == (128, 1)
    pool.deallocate(second)
    pool.empty_cache()
    assert (pool.memory_stats()["reserved_bytes.all.current"], pool.memory_snapshot()) == (0, [])
    with pytest.raises(ValueError, match="pop_statistics must follow a push_statistics"):
        pool.pop_statistics()


def test_logging_and_failure_callback(caplog: pytest.LogCaptureFixture):
    failing = FailingAllocator()
    asked = []

    def free_something(nbytes: int) -> bool:
        asked.append(nbytes)
        return len(asked) < 3

    allocator = StatisticsAllocator(FailureCallbackAllocator(LoggingAllocator(failing), free_something))
    failing.refusals_left = 2
    with caplog.at_level(logging.DEBUG, logger="longattn.bufmgr"):
        allocator.deallocate(allocator.allocate(100))
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["upstream: refused 100 bytes: refused on purpose"] * 2 + [
        "upstream: 100 bytes out",
        "upstream: 100 bytes back",
    ]
    failing.refusals_left = 1
    with pytest.raises(MemoryError):
        allocator.allocate(7)
    assert asked == [100, 100, 7]


def test_torchs_profiler_sees_allocations():
    """A profiling manager's requests stand among torch's own operations, by type."""
    manager = AttentionBufferManager(enable_profiling=True, upstream=SystemAllocator())
    plain = AttentionBufferManager(upstream=SystemAllocator())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        for _ in range(3):
            manager.allocate(SCORES, (8, 8))
            plain.allocate(TEMP, (8, 8))
    counts = {row.key: row.count for row in profiler.key_averages() if row.key.startswith("bufmgr::")}
    assert counts == {"bufmgr::allocate scores": 3}


def test_a_pool_accounts_for_its_managers():
    """Modules share one pool's memory, and each one's part is known; memory that one drops serves another."""
    pool = MemoryPool()
    first, second = (AttentionBufferManager(upstream=pool, name=name) for name in ("layer 0", "layer 1"))
    held = [first.allocate(SCORES, (MIB,), torch.uint8) for _ in range(2)]
    scratch = pool.empty((MIB // 2,), torch.uint8)
    second.deallocate(second.allocate(TEMP, (MIB // 4,), torch.uint8), TEMP)
    rows = {row["name"]: row for row in pool.accounts()}
    assert [row["name"] for row in pool.accounts()] == ["layer 0", "pool", "layer 1"]
    assert (rows["layer 0"]["in_use_bytes"], rows["layer 0"]["outstanding"]) == (2 * MIB, 2)
    assert rows["pool"]["in_use_bytes"] == scratch.nbytes
    assert (rows["layer 1"]["in_use_bytes"], rows["layer 1"]["cached_bytes"]) == (0, MIB // 4)
    used = pool.get_stats()["arena"]
    assert sum(row["in_use_bytes"] + row["cached_bytes"] for row in rows.values()) == used["in_use"]
    del held
    second.allocate(SCORES, (MIB,), torch.uint8)
    assert {row["name"]: row["cache_misses"] for row in pool.accounts()} == {"layer 0": 2, "layer 1": 2, "pool": 1}


def rounds(manager: AttentionBufferManager, shapes: int, count: int = 6) -> float:
    """Take and drop so many shapes in turn; return the hit rate of the last rounds."""
    for _ in range(count):
        for size in range(1, shapes + 1):
            manager.allocate(TEMP, (size * MIB // 64,), torch.uint8)
    before = manager.get_stats()
    for size in range(1, shapes + 1):
        manager.allocate(TEMP, (size * MIB // 64,), torch.uint8)
    return (manager.get_stats()["cache_hits"] - before["cache_hits"]) / shapes


def test_a_cache_adapts_to_what_its_limit_costs(monkeypatch: pytest.MonkeyPatch):
    """Five shapes in turn never hit in a cache of three; the misses that the limit costs are counted, and raise it to five."""
    configs = {TEMP: BufferConfig(max_cached_buffers=3)}
    fixed = AttentionBufferManager(configs, upstream=SystemAllocator())
    assert rounds(fixed, 5) == 0.0
    stats = fixed.get_stats()["types"]["temp"]
    assert (stats["max_buffers"], stats["limit_misses"]) == (3, 5 * 6)
    adaptive = AttentionBufferManager(configs, upstream=SystemAllocator(), adaptive_cache=True)
    assert rounds(adaptive, 5) == 1.0
    assert adaptive.get_stats()["types"]["temp"]["max_buffers"] == 5
    assert adaptive.get_stats()["cached_buffers"] == 5
    adaptive.check_valid()
    monkeypatch.setattr(adaptive._gauge, "share_to_give_back", lambda: 0.5)
    adaptive.allocate("scores", (16,))
    assert adaptive.get_stats()["types"]["temp"]["max_buffers"] == 3
    assert adaptive.get_stats()["types"]["temp"]["cached_buffers"] <= 3
    adaptive.check_valid()


def test_a_cache_grows_four_times_at_most_and_not_for_what_it_would_not_serve():
    """Shapes that never come again raise nothing; more shapes than four times the limit raise it to that and no further."""
    configs = {TEMP: BufferConfig(max_cached_buffers=2)}
    manager = AttentionBufferManager(configs, upstream=SystemAllocator(), adaptive_cache=True)
    for size in range(1, 100):
        manager.allocate(TEMP, (size * 4096,), torch.uint8)
    assert manager.get_stats()["types"]["temp"]["max_buffers"] == 2
    rounds(manager, 7)
    assert manager.get_stats()["types"]["temp"]["max_buffers"] <= 8
    manager.check_valid()
