"""The cache: a bounded map, one build per key, under threads."""

import logging
import threading
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from longattn.patterncache import Dilated, Full, Listed, PatternCache, Rectangle, Span
from longattn.patterncache.caching.freeze import ENTRY_BYTES
from longattn.patterncache.caching.held_bytes import held_bytes

KEYS = st.integers(0, 9)


def value_of(key: int) -> np.ndarray:
    """What the tests' builds make: its size depends on the key."""
    return np.full(8 * key, key)


class LRUMachine(RuleBasedStateMachine):
    """Any sequence of look-ups, failing builds and clears, with policy "lru", behaves as an OrderedDict that is cut to size."""

    @initialize(max_size=st.integers(0, 5), max_bytes=st.none() | st.integers(0, 4000))
    def start(self, max_size: int, max_bytes: int | None):
        self.cache = PatternCache(max_size, "lru", max_bytes)
        self.model: OrderedDict[int, int] = OrderedDict()
        self.hits = self.misses = self.evictions = 0

    def fits(self, nbytes: int, entries: int) -> bool:
        return entries <= self.cache.max_size and (self.cache.max_bytes is None or nbytes <= self.cache.max_bytes)

    @rule(key=KEYS)
    def look_up(self, key: int):
        built = []
        value = self.cache.get_or_build(key, lambda: built.append(key) or value_of(key))
        np.testing.assert_array_equal(value, value_of(key))
        assert bool(built) == (key not in self.model)
        self.hits, self.misses = self.hits + (not built), self.misses + bool(built)
        if built and not self.fits(value.nbytes + ENTRY_BYTES, 1):
            return
        self.model[key] = value.nbytes + ENTRY_BYTES
        self.model.move_to_end(key)
        while not self.fits(sum(self.model.values()), len(self.model)):
            self.model.popitem(last=False)
            self.evictions += 1

    @rule(key=KEYS)
    def a_build_fails(self, key: int):
        def build():
            raise KeyError(key)

        if key in self.model:
            return
        with pytest.raises(KeyError):
            self.cache.get_or_build(key, build)
        self.misses += 1

    @rule()
    def clear(self):
        self.cache.clear()
        self.model.clear()
        self.hits = self.misses = self.evictions = 0

    @invariant()
    def agrees_with_the_model(self):
        if not hasattr(self, "cache"):
            return
        self.cache.check_valid()
        stats = self.cache.get_stats()
        assert (stats["hits"], stats["misses"], stats["evictions"]) == (self.hits, self.misses, self.evictions)
        assert (stats["size"], stats["bytes"]) == (len(self.model), sum(self.model.values()))
        assert set(self.cache._cache) == set(self.model)


class ThreadMachine(RuleBasedStateMachine):
    """Threads that ask, at any size and with any policy, get what belongs to their key, and every ask is a hit or a miss."""

    @initialize(max_size=st.integers(0, 12), policy=st.sampled_from(["s3fifo", "lru"]))
    def start(self, max_size: int, policy: str):
        self.cache = PatternCache(max_size, policy)
        self.asked = self.built = 0
        self.ever: set[int] = set()

    @rule(work=st.lists(st.lists(KEYS, min_size=1, max_size=20), min_size=2, max_size=4))
    def ask_at_once(self, work: list[list[int]]):
        barrier, built, wrong = threading.Barrier(len(work)), [], []

        def ask(keys: list[int]):
            barrier.wait()
            for key in keys:
                value = self.cache.get_or_build(key, lambda key=key: built.append(key) or value_of(key))
                if not np.array_equal(value, value_of(key)):
                    wrong.append(key)

        threads = [threading.Thread(target=ask, args=(keys,)) for keys in work]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert wrong == []
        self.asked += sum(map(len, work))
        self.built += len(built)
        self.ever |= set().union(*work)

    @rule()
    def clear(self):
        self.cache.clear()
        self.asked = self.built = 0
        self.ever = set()

    @invariant()
    def adds_up(self):
        if not hasattr(self, "cache"):
            return
        self.cache.check_valid()
        stats = self.cache.get_stats()
        assert stats["hits"] + stats["misses"] == self.asked
        assert (
            stats["misses"]
            >= self.built
            == stats["size"] + stats["evictions"] + (0 if stats["max_size"] else self.built)
        )
        if stats["max_size"] >= 10:
            assert self.built == len(self.ever)


TestLRUMachine = LRUMachine.TestCase
TestThreadMachine = ThreadMachine.TestCase


def test_hits_are_counted_exactly_under_threads():
    """No lock, and no hit is lost."""
    cache = PatternCache()

    def ask():
        for i in range(20_000):
            cache.get_or_build(i % 7, int)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    stats = cache.get_stats()
    assert stats["hits"] + stats["misses"] == 160_000 and stats["size"] == 7


def test_values_cannot_be_changed():
    """Arrays, in tuples too, are read-only for good; a view is copied, so that its base cannot change it."""
    base = np.arange(6)
    arrays = PatternCache().get_or_build("key", lambda: (np.arange(3), base[1:4]))
    base[:] = 7
    for array in arrays:
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 9
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
    np.testing.assert_array_equal(arrays[1], [1, 2, 3])


def test_arrays_of_a_plan_are_read_only():
    """Those that it lists, whatever becomes of the array they came from, and those that it keeps once computed."""
    source = np.arange(4)[:, None]
    listed = Listed(source, 1, 1)
    source[:] = 9
    np.testing.assert_array_equal(listed.starts[:, 0], range(4))
    branch = Full(causal=True).plan(Rectangle(1, Span(0, 8), Span(0, 8))).branches[0]
    assert not any(array.flags.writeable for array in (listed.starts, branch.seeing, branch.visible))


def test_bytes_of_a_plan_are_its_own():
    """A plan is taken at all that it holds, and the constant."""
    cache, pattern = PatternCache(), Dilated((4, 8), (1, 2))
    plan = cache.get_or_build("plan", lambda: pattern.plan(Rectangle(2, Span(0, 8), Span(0, 8))))
    assert cache.get_stats()["bytes"] == held_bytes(plan) + ENTRY_BYTES


def test_profiling_counts_keys():
    """count, bytes and time per key, of those that were evicted too."""
    cache = PatternCache(1, enable_profiling=True)
    for key in ("a", "a", "a", "b", "a", "a"):
        cache.get_or_build(key, lambda: np.zeros(2))
    profile = cache.get_stats()["profile"]
    assert {key: row["count"] for key, row in profile.items()} == {"a": 5, "b": 1}
    assert profile["a"]["bytes"] == 16 + ENTRY_BYTES and profile["a"]["time"] > 0


def test_builds_and_evictions_are_logged(caplog):
    """At DEBUG, by key."""
    cache = PatternCache(1)
    with caplog.at_level(logging.DEBUG, "longattn.patterncache"):
        cache.get_or_build(("first", 1), int)
        cache.get_or_build("second", int)
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [
        "build ('first', 1)",
        "build second",
        "evict ('first', 1)",
    ]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"max_size": -1}, ValueError),
        ({"max_size": 1.5}, TypeError),
        ({"max_size": True}, TypeError),
        ({"policy": "fifo"}, ValueError),
        ({"max_bytes": -1}, ValueError),
        ({"max_bytes": "1 MB"}, TypeError),
        ({"enable_profiling": 1}, TypeError),
    ],
)
def test_bad_arguments_are_named(arguments, error):
    """Every argument is checked."""
    with pytest.raises(error, match=next(iter(arguments))):
        PatternCache(**arguments)
