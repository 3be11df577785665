"""Which entries stay: S3-FIFO beside LRU and Belady on seeded traces, and the hit curve beside larger caches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longattn.patterncache import PatternCache
from longattn.patterncache.caching.policy import AGEING, S3FIFO, Entry
from longattn.patterncache.testing import TRACES, belady


def played(trace, size, policy):
    """The cache after the trace."""
    cache = PatternCache(size, policy)
    for key in trace:
        cache.get_or_build(key, int)
    cache.check_valid()
    return cache


@pytest.mark.parametrize(("size", "small"), [(1, 1), (2, 1), (3, 1), (4, 2), (100, 2), (149, 2), (150, 3), (400, 8)])
def test_new_entries_wait_in_a_fiftieth_of_the_room(size, small):
    """Two at least, where that is at most half of it."""
    policy = S3FIFO(10, None)
    policy.resize(size)
    assert policy._small_size == S3FIFO(size, None)._small_size == small


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("size", [5, 10, 20, 100, 400])
@pytest.mark.parametrize("name", TRACES)
def test_s3fifo_is_never_below_lru(name, size, seed):
    """On every committed trace."""
    trace = TRACES[name](seed)
    rates = [played(trace, size, policy).get_stats()["hit_rate"] for policy in ("s3fifo", "lru")]
    assert rates[0] >= rates[1]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("name", "size"), [*((name, size) for name in TRACES for size in (100, 200, 400)), ("attention lengths", 10)]
)
def test_s3fifo_is_near_belady(name, size, seed):
    """At least 0.85 of the best with room for a hundred of some two thousand and six hundred keys; with less room see the results."""
    trace = TRACES[name](seed)
    assert played(trace, size, "s3fifo").get_stats()["hit_rate"] >= 0.85 * belady(trace, size)


def test_a_scan_does_not_flush_s3fifo():
    """Ten entries in use survive a thousand that are asked for once."""
    cache = played([*list(range(10)) * 4, *range(100, 1100), *range(10)], 50, "s3fifo")
    assert cache.get_stats()["hits"] == 40


def test_a_scan_before_the_cache_is_full_leaves_room_for_what_comes_again():
    """What is asked for once leaves from the small queue, though there is room in the main one, which stays for what is asked for twice."""
    cache = PatternCache(50)
    for key in range(200):
        cache.get_or_build(key, int)
    assert not cache._entries.keys() & set(range(150))
    for key in [*list(range(1000, 1040)) * 2, *range(2000, 2010), *range(1000, 1040)]:
        cache.get_or_build(key, int)
        cache.check_valid()
    assert len(cache) == 50 and cache.get_stats()["hits"] >= 40


@pytest.mark.parametrize("asked", range(1, 12))
def test_frequencies_are_halved_with_age(asked):
    """After AGEING insertions for each entry that there is room for: of entries that stay, and of keys that left and come back."""
    room = 2
    policy = S3FIFO(room, None)
    kept, gone = Entry("kept", 0, 1, 1), Entry("gone", 0, 1, 1)
    for entry in (kept, gone):
        entry.hits = asked - 1
    policy.ghosts.add("gone", asked)
    policy.insert(kept, 0)
    for n in range(AGEING * room - 2):
        policy.insert(Entry(n, 0, 1, 1), 0)
    assert kept.before + 1 + kept.hits == asked
    policy.insert(Entry("last", 0, 1, 1), 0)
    assert kept.before + 1 + kept.hits == asked // 2
    assert policy.recall("gone") == max(1, asked // 2) and policy.recall("gone") == 0


@given(st.lists(st.integers(0, 15), max_size=200), st.integers(1, 6))
def test_the_hit_curve_of_lru_is_exact(trace, size):
    """What it says of size + j is what a cache of that size has."""
    curve = played(trace, size, "lru").hit_curve()
    assert curve.exact and len(curve.hits) == 10 * size + 1
    assert list(curve.hits) == [played(trace, size + j, "lru").get_stats()["hits"] for j in range(10 * size + 1)]


@given(st.lists(st.integers(0, 15), max_size=200), st.integers(1, 12), st.integers(0, 1))
def test_the_hit_curve_of_s3fifo_says_that_it_is_an_estimate(trace, size, limited):
    """Its first point is exact in any case, and it does not fall."""
    cache = played(trace, size, "s3fifo")
    curve = cache.hit_curve()
    assert not curve.exact and curve.hits[0] == cache.get_stats()["hits"] and list(curve.hits) == sorted(curve.hits)


def test_a_suggested_size():
    """A loop of 15 keys needs 15; one that fits needs what it has; none needs less than it has once something was evicted."""
    assert played(list(range(15)) * 9, 10, "lru").suggest_size() == 15
    assert played(list(range(15)) * 9, 1000, "s3fifo").suggest_size() == 15
    assert played(list(range(1000)), 10, "lru").suggest_size() == 10
    assert PatternCache(0).suggest_size() == 0


@pytest.mark.parametrize("policy", ["s3fifo", "lru"])
def test_a_cache_grows_to_what_its_hit_curve_asks_for(policy):
    """A loop of 30 keys fits after a few turns, with no more room than it needs; what never comes again brings no growth."""
    cache = PatternCache(10, policy, grow_to=100)
    for key in list(range(30)) * 20:
        cache.get_or_build(key, int)
        cache.check_valid()
    stats = cache.get_stats()
    assert 30 <= stats["max_size"] <= 40 and stats["hits"] > 300
    cache.clear()
    assert cache.max_size == 10
    for key in range(500):
        cache.get_or_build(key, int)
    assert cache.max_size == 10 and played(list(range(30)) * 20, 10, policy).max_size == 10


@given(
    st.lists(st.integers(0, 15), max_size=120), st.integers(0, 6), st.integers(0, 9), st.sampled_from(["s3fifo", "lru"])
)
def test_a_resized_cache_keeps_what_fits(trace, first, then, policy):
    """Statistics go on; the least recently used leave first where that is the policy."""
    cache = played(trace, first, policy)
    kept, before = sorted(cache._cache, key=lambda key: cache._entries[key].used), cache.get_stats()
    cache.resize(then)
    cache.check_valid()
    assert len(cache) == min(then, len(kept)) and cache.get_stats()["hits"] == before["hits"]
    assert policy != "lru" or set(cache._cache) == set(kept[len(kept) - len(cache) :])
    for key in trace:
        cache.get_or_build(key, int)
        cache.check_valid()
    curve = cache.hit_curve()
    assert list(curve.hits) == sorted(curve.hits)
    # The curve begins anew with a new size.
    assert curve.asked == len(trace) * (1 if then != first else 2)
    assert curve.hits[0] == cache.get_stats()["hits"] - (before["hits"] if then != first else 0)


@pytest.mark.parametrize("grow_to", [9, "more"])
def test_a_bad_bound_of_growth_is_named(grow_to):
    """It is an integer, and at least the size."""
    with pytest.raises((TypeError, ValueError), match="grow_to must be an integer >= 10"):
        PatternCache(10, grow_to=grow_to)


@pytest.mark.parametrize(("gain", "error"), [(-0.1, ValueError), (2, ValueError), ("1%", TypeError), (True, TypeError)])
def test_a_bad_gain_is_named(gain, error):
    """gain is a number from 0 to 1."""
    with pytest.raises(error, match="gain"):
        PatternCache().suggest_size(gain)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 900)), max_size=150), st.integers(0, 6000))
def test_bytes_are_bounded_and_equal_a_recount(asks, max_bytes):
    """With either policy, whatever the sizes; `check_valid` recounts."""
    for policy in ("s3fifo", "lru"):
        cache = PatternCache(20, policy, max_bytes)
        for key, size in asks:
            cache.get_or_build(key, lambda size=size: np.zeros(size, np.uint8))
            cache.check_valid()
