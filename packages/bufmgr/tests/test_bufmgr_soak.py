"""Many operations from random and recorded traces: nothing is overwritten, memory stays bounded, every invariant holds at the end.

LONGATTN_SOAK_OPERATIONS says how many; `nox -s soak` runs ten million.
"""

import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from longattn.bufmgr import (
    AllocationTrace,
    ArenaAllocator,
    AttentionBufferManager,
    BufferType,
    MemoryPool,
    RecordingAllocator,
    StatisticsAllocator,
)

OPERATIONS = int(os.environ.get("LONGATTN_SOAK_OPERATIONS", "20000"))
CHECKED_EVERY = 50_000
MIB = 2**20
KINDS = (BufferType.TEMP, BufferType.SCORES, BufferType.QUERY, BufferType.CACHE)


def resident_bytes() -> int | None:
    """Return this process's resident memory, or None where /proc does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else None


def check_bound(pool: MemoryPool, managers: Sequence[AttentionBufferManager]) -> None:
    """Assert every invariant, and that what the arena holds is at most the peak in use and 2 %, or its floor."""
    for manager in managers:
        manager.check_valid()
    pool.check_valid()
    arena = pool.get_stats()["arena"]
    assert arena["in_use"] + arena["dirty"] <= max(8 * MIB, 1.02 * arena["peak_in_use"]) + MIB


@pytest.mark.parametrize("seed", [0, 1])
def test_random_operations(seed: int):
    """Take, release, drop and view buffers of sixty sizes with two managers over one pool."""
    rng = random.Random(seed)
    pool = MemoryPool()
    managers = [AttentionBufferManager(upstream=pool), AttentionBufferManager(upstream=pool, lightweight=False)]
    # Sizes from 64 bytes to 4 MiB; a few come often, most hardly ever.
    sizes = sorted((int(2 ** rng.uniform(4, 20)) for _ in range(60)), key=lambda size: rng.random())
    held: list[tuple[AttentionBufferManager, BufferType, torch.Tensor, float]] = []
    views: list[tuple[torch.Tensor, float]] = []
    first_resident = None
    for step in range(OPERATIONS // 2):
        if len(held) < 24 and (not held or rng.random() < 0.55):
            manager, kind = managers[rng.random() < 0.1], rng.choice(KINDS)
            size = sizes[min(int(rng.expovariate(0.15)), 59)]
            tensor = manager.allocate(kind, (size,), torch.float32, zero_init=False)
            value = float(step % 1000)
            tensor[0] = tensor[-1] = value
            held.append((manager, kind, tensor, value))
        else:
            manager, kind, tensor, value = held.pop(rng.randrange(len(held)))
            assert tensor[0].item() == value == tensor[-1].item()
            choice = rng.random()
            if choice < 0.1:
                views.append((tensor[-1:], value))
            if choice < 0.6:
                manager.deallocate(tensor, kind)
            if len(views) > 8:
                view, expected = views.pop(rng.randrange(len(views)))
                assert view.item() == expected
                del view
            del tensor
        if step % CHECKED_EVERY == CHECKED_EVERY - 1:
            check_bound(pool, managers)
            resident = resident_bytes()
            first_resident = first_resident or resident
            if resident is not None and first_resident is not None:
                assert resident < first_resident + 256 * MIB
    held.clear()
    views.clear()
    tensor = None  # the last one
    check_bound(pool, managers)
    for manager in managers:
        manager.clear_cache()
        assert manager.get_stats()["outstanding"] == 0
    pool.empty_cache()
    assert pool.get_stats()["total_allocated"] == 0


def record_steps(steps: int = 20) -> AllocationTrace:
    """Record what a manager takes from its upstream in training steps of varying length and in decoding steps."""
    recording = RecordingAllocator(ArenaAllocator())
    manager = AttentionBufferManager(upstream=recording)
    rng = random.Random(0)
    for step in range(steps):
        length = rng.randrange(128, 1024, 64)
        saved = [manager.allocate(kind, (length, 8, 64)) for kind in ("query", "key", "value")]
        for _ in range(4):
            scores = manager.allocate("scores", (8, length, 64))
            manager.deallocate(scores, "scores")
        cache = manager.allocate("cache", (step + 1, 8, 64))
        del saved, cache
    manager.clear_cache()
    return recording.trace()


def test_recorded_operations():
    """A recorded trace, again and again over one arena: the same statistics each time, and the arena is empty in between."""
    trace = record_steps()
    assert len(trace.events) > 100
    arena = ArenaAllocator()
    counted = StatisticsAllocator(arena)
    first = trace.replay(counted)
    for _ in range(OPERATIONS // len(trace.events)):
        assert trace.replay(counted) == first
        assert (counted.statistics.current_bytes, arena.in_use) == (0, 0)
    arena.check_valid()
    assert counted.statistics.peak_bytes == first.peak_bytes
    assert arena.held_bytes <= max(8 * MIB, 1.02 * arena.peak_in_use)
