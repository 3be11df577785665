"""The global cache and its variables, views of it, copies and forks."""

import copy
import os
import pickle
import subprocess
import sys
import threading
import warnings

import pytest

from longattn.patterncache import (
    CacheView,
    PatternCache,
    get_global_device_tier,
    get_global_pattern_cache,
    reset_global_pattern_cache,
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A global cache of the default settings before and after each test."""
    for name in ("MAX_SIZE", "MAX_BYTES", "DEVICE_MAX_BYTES", "GROW_TO", "ENABLE_PROFILING"):
        monkeypatch.delenv(f"PATTERN_CACHE_{name}", raising=False)
    reset_global_pattern_cache()
    with monkeypatch.context() as context:
        yield context
    reset_global_pattern_cache()


def test_a_reset_empties_the_object_that_others_hold(fresh):
    """It stays the same object, and takes the variables' new values."""
    held = get_global_pattern_cache()
    held.get_or_build("a test's key", lambda: 1)
    assert held.get_stats()["max_size"] == 1000 and "profile" not in held.get_stats()
    fresh.setenv("PATTERN_CACHE_MAX_SIZE", "7")
    fresh.setenv("PATTERN_CACHE_ENABLE_PROFILING", "1")
    reset_global_pattern_cache()
    assert get_global_pattern_cache() is held and len(held) == 0
    stats = held.get_stats()
    assert (stats["misses"], stats["max_size"], stats["profile"]) == (0, 7, {})
    fresh.setenv("PATTERN_CACHE_MAX_BYTES", "5000")
    fresh.setenv("PATTERN_CACHE_GROW_TO", "9")
    fresh.setenv("PATTERN_CACHE_DEVICE_MAX_BYTES", "400")
    reset_global_pattern_cache()
    assert held.get_stats()["max_bytes"] == 5000 and held._settings[-1] == 9
    assert get_global_device_tier().max_bytes == 400


@pytest.mark.parametrize(
    ("text", "on"),
    [("1", True), ("true", True), ("Yes", True), (" on ", True)]
    + [(text, False) for text in ("0", "False", "no", "OFF", "", " ")],
)
def test_profiling_is_switched_by_a_word(fresh, text, on):
    """In any case, with spaces around it; nothing is off."""
    fresh.setenv("PATTERN_CACHE_ENABLE_PROFILING", text)
    reset_global_pattern_cache()
    assert get_global_pattern_cache().enable_profiling is on


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("PATTERN_CACHE_MAX_SIZE", "many"),
        ("PATTERN_CACHE_MAX_SIZE", "-1"),
        ("PATTERN_CACHE_MAX_SIZE", "1e3"),
        ("PATTERN_CACHE_ENABLE_PROFILING", "maybe"),
        ("PATTERN_CACHE_MAX_BYTES", "1 MB"),
        ("PATTERN_CACHE_DEVICE_MAX_BYTES", "-1"),
        ("PATTERN_CACHE_GROW_TO", "-5"),
        ("PATTERN_CACHE_GROW_TO", "999"),
    ],
)
def test_garbage_in_a_variable_is_named(fresh, name, text):
    """When the cache is reset, which leaves it as it was, and when it is made."""
    held = get_global_pattern_cache()
    held.get_or_build("kept", int)
    fresh.setenv(name, text)
    with pytest.raises(ValueError, match=f"{name}.*{text}"):
        reset_global_pattern_cache()
    assert len(held) == 1
    script = "from longattn.patterncache import get_global_pattern_cache as get\ntry: get()\nexcept ValueError as e: print(e)"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert name in answer.stdout


def test_views_count_for_themselves():
    """Hits and misses are the view's, the size is the cache's, and a reset leaves the view working."""
    mine, other = CacheView(), CacheView()
    for view in (mine, other, other):
        view.get_or_build("key", lambda: 1)
    found = [[view.get_stats()[name] for name in ("hits", "misses", "hit_rate", "size")] for view in (mine, other)]
    assert found == [[0, 1, 0.0, 1], [2, 0, 1.0, 1]]
    assert len(mine) == len(mine._cache) == 1
    reset_global_pattern_cache()
    mine.get_or_build("key", lambda: 2)
    assert mine.get_stats() == get_global_pattern_cache().get_stats() | {"misses": 2}


def test_a_build_that_fails_is_a_miss_of_the_view():
    """As it is of the cache."""
    view = CacheView(PatternCache(0))
    with pytest.raises(ZeroDivisionError):
        view.get_or_build("key", lambda: 1 // 0)
    assert view.get_stats()["misses"] == 1
    with pytest.raises(TypeError, match="upstream"):
        CacheView({})


@pytest.mark.parametrize("copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy])
def test_a_copy_is_empty_with_the_same_settings(copied):
    """Of a cache, of a view of it; a view of the global cache is one of the global cache again."""
    cache = PatternCache(7, "lru", 5000, enable_profiling=True, grow_to=9)
    cache.get_or_build("key", int)
    other = copied(cache)
    assert (other.max_size, other.policy, other.max_bytes, other.enable_profiling) == (7, "lru", 5000, True)
    assert other._settings == cache._settings
    assert len(other) == 0
    view = copied(CacheView(cache))
    view.get_or_build("key", int)
    assert view.get_stats()["hits"] + view.get_stats()["misses"] == 1
    assert copied(CacheView())._upstream is get_global_pattern_cache()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_forked_child_has_the_entries_and_no_foreign_builds():
    """Forked while one thread builds and others keep taking the lock: the child is served, and builds what the thread was building."""
    cache, go_on, building = PatternCache(5), threading.Event(), threading.Event()
    cache.get_or_build("kept", lambda: 1)

    def build():
        building.set()
        go_on.wait(30)
        return "parent"

    def churn():
        # Every ask takes the lock; "kept" stays, because it was hit twice and is hit again.
        while not go_on.is_set():
            cache.get_or_build("busy", int)
            cache.get_stats()

    threads = [threading.Thread(target=cache.get_or_build, args=("slow", build)), threading.Thread(target=churn)]
    for t in threads:
        t.start()
    building.wait(30)
    for _ in range(5):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads about is the point
            child = os.fork()
        if child == 0:
            right = (
                cache.get_or_build("kept", lambda: 2) == 1 and cache.get_or_build("slow", lambda: "child") == "child"
            )
            os._exit(0 if right else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    go_on.set()
    for t in threads:
        t.join()
    assert cache.get_or_build("slow", lambda: "again") == "parent"
    cache.check_valid()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_build_may_fork():
    """The child of a build ends the build for itself."""
    cache, ends = PatternCache(), []

    def build():
        child = os.fork()
        if child == 0:
            return "child"
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return "parent"

    value = cache.get_or_build("key", build)
    if value == "child":
        os._exit(0 if cache.get_or_build("key", int) == "child" else 1)
    assert value == "parent" and ends == [0]
