"""What the cache says it holds is what it holds: plans with their branches, and what they gather in use."""

import gc
import sys
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from longattn.patterncache import BlockSparse, Dilated, Documents, PatternCache, Plan, Rectangle, Span
from longattn.patterncache.caching.held_bytes import held_bytes
from longattn.patterncache.planning.bands import pieces

Make = Callable[[int], Plan]


def packed(seed: int) -> Plan:
    """A packing of its own for each seed."""
    borders = np.cumsum(np.random.default_rng(seed).integers(1, 60, 24)).tolist()
    return plan_of(Documents([0, *borders], Dilated((16, 32), (1, 2), causal=True)), borders[-1])


def longnet(seed: int) -> Plan:
    """A length of its own for each seed."""
    return plan_of(Dilated((64, 128, 256), (1, 2, 4)), 300 + 7 * seed)


def blocks(seed: int) -> Plan:
    """A mask of its own for each seed."""
    mask = np.random.default_rng(seed).random((40, 40)) < 0.3
    return plan_of(BlockSparse(16, mask, causal=True), 640)


def plan_of(pattern: Documents | Dilated | BlockSparse, length: int) -> Plan:
    return pattern.plan(Rectangle(4, Span(0, length), Span(0, length)))


def use(plan: Plan) -> Plan:
    """As rows of the dispatch table do: cut it, and keep masks and tables beside it."""
    for piece in pieces(plan):
        assert piece.visible is None or len(piece.seeing)
    plan.derived.setdefault("table of a test", {})["rows"] = np.zeros((20, len(plan.branches)))
    return plan


@pytest.mark.parametrize("make", [packed, longnet, blocks])
@pytest.mark.parametrize("used", [False, True])
def test_bytes_are_what_is_held(make: Make, used: bool) -> None:
    """Within a tenth of what the allocator was asked for, before and after use.

    The allocator also counts what else the interpreter keeps meanwhile, which only adds: of three readings the nearest one speaks.
    """
    use(make(99))
    readings = []
    for first in (0, 12, 24):
        held, counted = held_and_counted(make, used, first)
        if held == pytest.approx(counted, rel=0.1):
            return
        readings.append((held, counted))
    pytest.fail(f"held and counted: {readings}")


def held_and_counted(make: Make, used: bool, first: int) -> tuple[int, int]:
    """Bytes that twelve plans in a new cache are by the allocator, and by the cache's statistics."""
    cache = PatternCache()
    gc.collect()
    tracemalloc.start()
    try:
        begin = tracemalloc.get_traced_memory()[0]
        for seed in range(first, first + 12):
            plan = cache.get_or_build(seed, lambda seed=seed: make(seed))
            if used:
                use(plan)
        del plan
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - begin, cache.get_stats()["bytes"]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("value", [None, True, 7, -5, "name", int, len, np.dtype("int64")])
def test_what_python_keeps_for_all_is_nobodys(value: object) -> None:
    """Small integers, names, types and functions; a list of them is the list."""
    assert held_bytes(value) == 0
    some = [value, value]
    assert held_bytes(some) == held_bytes([some[0]] * 2) == sys.getsizeof(some)


def test_an_object_counts_once() -> None:
    """However often it is reached, from a circle too; a long text and a large integer are somebody's."""
    text, number = "x" * 100, 2**80
    circle: list[object] = [text, text, number]
    circle.append(circle)
    assert held_bytes(circle) == sys.getsizeof(circle) + sys.getsizeof(text) + sys.getsizeof(number)


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_the_limit_holds_for_what_plans_gather(policy: str) -> None:
    """After every ask, no more is kept than the limit, and one plan's growth; in statistics, no more than the limit."""
    cache = PatternCache(1000, policy, max_bytes=400_000)
    for seed in range(30):
        use(cache.get_or_build(seed, lambda seed=seed: packed(seed)))
        cache.check_valid()
        held = [held_bytes(plan) for plan in cache._cache.values()]
        assert sum(held) <= 400_000 + max(held)
    stats = cache.get_stats()
    assert 100_000 < stats["bytes"] <= 400_000 and stats["evictions"] > 0
    assert sum(held_bytes(plan) for plan in cache._cache.values()) <= 400_000


def test_what_a_hit_adds_is_counted() -> None:
    """A plan that gathers something after a hit is measured again."""
    cache = PatternCache()
    before = use(cache.get_or_build(0, lambda: longnet(0))) and cache.get_stats()["bytes"]
    cache.get_or_build(0, lambda: longnet(0)).derived["more"] = np.zeros(50_000)
    assert 400_000 <= cache.get_stats()["bytes"] - before < 401_000


def test_tensors_in_host_memory_are_counted_once() -> None:
    """Two views of a storage are one."""
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(10_000)
    assert 40_000 <= held_bytes({"a": tensor, "b": tensor[5:], "c": tensor.view(100, 100)}) < 42_000
