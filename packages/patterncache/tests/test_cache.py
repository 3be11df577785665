"""The cache: a bounded map, one build per key, under threads."""

import threading
from collections import OrderedDict

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from longattn.patterncache import PatternCache, get_global_pattern_cache, reset_global_pattern_cache


class CacheMachine(RuleBasedStateMachine):
    """Any sequence of look-ups and clears behaves as an OrderedDict that is cut to size."""

    @initialize(max_size=st.integers(0, 4))
    def start(self, max_size: int):
        self.cache = PatternCache(max_size)
        self.model: OrderedDict[int, str] = OrderedDict()
        self.hits = self.misses = 0

    @rule(key=st.integers(0, 6))
    def look_up(self, key: int):
        built = []
        value = self.cache.get_or_build(key, lambda: built.append(key) or f"plan {key}")
        assert value == f"plan {key}"
        assert bool(built) == (key not in self.model)
        self.hits, self.misses = self.hits + (not built), self.misses + bool(built)
        self.model[key] = value
        self.model.move_to_end(key)
        while len(self.model) > self.cache.max_size:
            self.model.popitem(last=False)

    @rule(key=st.integers(0, 6))
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
        self.hits = self.misses = 0

    @invariant()
    def agrees_with_the_model(self):
        if not hasattr(self, "cache"):
            return
        self.cache.check_valid()
        stats = self.cache.get_stats()
        assert (stats["hits"], stats["misses"], stats["size"]) == (self.hits, self.misses, len(self.model))
        assert list(self.cache._cache) == list(self.model)


TestCacheMachine = CacheMachine.TestCase


@pytest.mark.parametrize("fails", [False, True])
def test_threads_share_one_build(fails):
    """16 threads ask at once: one builds, all get its value, or its exception."""
    cache, barrier, builds, seen = PatternCache(), threading.Barrier(16), [], []
    building = threading.Event()

    def build():
        builds.append(1)
        building.wait(0.2)
        if fails:
            raise OSError("no")
        return "plan"

    def ask():
        barrier.wait()
        try:
            seen.append(cache.get_or_build("key", build))
        except OSError as error:
            seen.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert builds == [1] and seen == (["no"] if fails else ["plan"]) * 16
    assert len(cache) == (0 if fails else 1)
    cache.check_valid()


def test_a_reset_empties_the_object_that_others_hold():
    """The global cache stays the same object."""
    held = get_global_pattern_cache()
    held.get_or_build("a test's key", lambda: 1)
    reset_global_pattern_cache()
    assert get_global_pattern_cache() is held and len(held) == 0 and held.get_stats()["misses"] == 0


@pytest.mark.parametrize(("arguments", "error"), [((-1,), ValueError), ((1.5,), TypeError), ((3, "fifo"), ValueError)])
def test_a_bad_limit_is_named(arguments, error):
    """max_size and policy are checked."""
    with pytest.raises(error, match="max_size|policy"):
        PatternCache(*arguments)
