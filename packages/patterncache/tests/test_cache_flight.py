"""One build per key: what waiters get when it ends, fails, is interrupted, goes in a circle, or is overtaken by a clear."""

import threading

import pytest

from longattn.patterncache import PatternCache


def run(*targets):
    """Run the functions in threads of their own, to their end."""
    threads = [threading.Thread(target=target, daemon=True) for target in targets]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
        assert not t.is_alive(), "a thread waits for ever"


def waiting(cache, count):
    """Wait until so many threads wait for a build."""
    while len(cache._waiting) < count:
        threading.Event().wait(0.001)


@pytest.mark.parametrize("max_size", [0, 10])
@pytest.mark.parametrize("fails", [False, True])
def test_threads_share_one_build(fails, max_size):
    """32 threads ask at once: one builds, all get its value, or its exception, which is not kept."""
    cache, builds, seen = PatternCache(max_size), [], []

    def build():
        builds.append(1)
        waiting(cache, 31)
        if fails:
            raise OSError("no")
        return "plan"

    def ask():
        try:
            seen.append(cache.get_or_build("key", build))
        except OSError as error:
            seen.append(str(error))

    run(*[ask] * 32)
    assert builds == [1] and seen == (["no"] if fails else ["plan"]) * 32
    assert len(cache) == (0 if fails or not max_size else 1)
    assert cache.get_stats()["misses"] == 32
    cache.check_valid()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_build_is_done_by_a_waiter(interrupt):
    """Ctrl-C stops the thread that it hits; the others build, once."""
    cache, builds, seen = PatternCache(), [], []

    def build():
        builds.append(1)
        if len(builds) == 1:
            waiting(cache, 7)
            raise interrupt
        return "plan"

    def ask():
        try:
            seen.append(cache.get_or_build("key", build))
        except interrupt:
            seen.append("interrupted")

    run(*[ask] * 8)
    assert len(builds) == 2 and sorted(seen) == ["interrupted"] + ["plan"] * 7
    assert cache.get_stats()["misses"] == 8
    cache.check_valid()


def test_a_build_that_asks_for_its_own_key_is_refused():
    """Not a deadlock, also over another key; and the key can be built afterwards."""
    cache = PatternCache()

    def own():
        return cache.get_or_build("key", own)

    with pytest.raises(RuntimeError, match="'key' needs its own value"):
        own()
    with pytest.raises(RuntimeError, match="'a' needs its own value"):
        cache.get_or_build("a", lambda: cache.get_or_build("b", lambda: cache.get_or_build("a", int)))
    assert cache.get_or_build("key", lambda: 1) == 1
    cache.check_valid()


def test_two_builds_that_wait_for_each_other_are_refused():
    """One of the two threads is refused, so both end."""
    cache, barrier, errors = PatternCache(), threading.Barrier(2), []

    def ask(mine, other):
        def build():
            barrier.wait()
            return cache.get_or_build(other, int)

        try:
            cache.get_or_build(mine, build)
        except RuntimeError as error:
            errors.append(str(error))

    run(lambda: ask("a", "b"), lambda: ask("b", "a"))
    assert errors and all("needs its own value" in error for error in errors)
    assert len(cache) == 0
    cache.check_valid()


def test_a_build_may_ask_for_other_keys():
    """Nested builds of different keys are two entries."""
    cache = PatternCache()
    assert cache.get_or_build("sum", lambda: 1 + cache.get_or_build("part", lambda: 2)) == 3
    assert len(cache) == 2


def test_what_was_being_built_at_a_clear_is_not_kept():
    """Those who asked before get the old value; those who ask after build a new one."""
    cache, seen = PatternCache(), []
    started, cleared = threading.Event(), threading.Event()

    def old():
        started.set()
        cleared.wait(30)
        return "old"

    def clear():
        waiting(cache, 1)
        cache.clear()
        seen.append(cache.get_or_build("key", lambda: "new"))
        cleared.set()

    def late():
        started.wait(30)
        seen.append(cache.get_or_build("key", lambda: "never"))

    run(lambda: seen.append(cache.get_or_build("key", old)), late, clear)
    assert seen[0] == "new" and seen[1:] == ["old", "old"]
    assert dict(cache._cache) == {"key": "new"}
    cache.check_valid()
