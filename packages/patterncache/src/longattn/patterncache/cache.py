"""`PatternCache`: bounded, thread-safe, one build per key.

The life of a key: (1) the first thread to ask for it builds it, outside the lock, while others wait for that build; (2) it is kept
and served until it is evicted, least recently used first; (3) asked for again, it is built again. A build that raises is kept by
nobody: every waiter sees the exception, and the next caller tries anew.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, TypeVar

from longattn.patterncache.index import check_int

logger = logging.getLogger("longattn.patterncache")

T = TypeVar("T")


class PatternCache:
    """A bounded map from keys to built values, usually plans.

    Args:
        max_size: entries kept at most; 0 builds every time and keeps nothing. Default 1000.
        policy: "lru", which evicts exactly the least recently used. Default "lru".

    Raises:
        TypeError, ValueError: max_size is not an integer >= 0, or the policy is unknown.
    """

    def __init__(self, max_size: int = 1000, policy: str = "lru") -> None:
        if policy != "lru":
            raise ValueError(f"policy must be 'lru', got {policy!r}")
        self.max_size = check_int("max_size", max_size, minimum=0)
        self.policy = policy
        self._cache: OrderedDict[Hashable, Any] = OrderedDict()
        self._pending: dict[Hashable, Future[Any]] = {}
        self._lock = threading.Lock()
        self._hits = self._misses = self._evictions = 0

    def get_or_build(self, key: Hashable, build: Callable[[], T]) -> T:
        """The value of `key`; `build()` makes it where it is missing. Whatever `build` raises, this raises."""
        with self._lock:
            if key in self._cache:
                self._hits += 1
                self._cache.move_to_end(key)
                return self._cache[key]
            self._misses += 1
            future = self._pending.get(key)
            mine = future is None
            if future is None:
                future = self._pending[key] = Future()
        return self._build(key, build, future) if mine else future.result()

    def _build(self, key: Hashable, build: Callable[[], T], future: Future[Any]) -> T:
        try:
            value = build()
        except BaseException as error:
            with self._lock:
                self._pending.pop(key, None)
            future.set_exception(error)
            raise
        with self._lock:
            self._pending.pop(key, None)
            if self.max_size:
                self._cache[key] = value
            while len(self._cache) > self.max_size:
                evicted, _ = self._cache.popitem(last=False)
                self._evictions += 1
                logger.debug("evict %s", evicted)
        future.set_result(value)
        logger.debug("build %s", key)
        return value

    def clear(self) -> None:
        """Forget every entry; statistics start at zero."""
        with self._lock:
            self._cache.clear()
            self._hits = self._misses = self._evictions = 0

    def __len__(self) -> int:
        return len(self._cache)

    def get_stats(self) -> dict[str, Any]:
        """`hits misses hit_rate evictions size max_size`; waiting for another thread's build is a miss."""
        with self._lock:
            asked = self._hits + self._misses
            return {
                "hits": self._hits,
                "misses": self._misses,
                "hit_rate": self._hits / asked if asked else 0.0,
                "evictions": self._evictions,
                "size": len(self._cache),
                "max_size": self.max_size,
            }

    def check_valid(self) -> None:
        """Assert the invariants, for tests: bounded, and nothing is pending that is also kept."""
        with self._lock:
            assert len(self._cache) <= self.max_size
            assert not (self._pending.keys() & self._cache.keys())
            assert min(self._hits, self._misses, self._evictions) >= 0


_GLOBAL = PatternCache()


def get_global_pattern_cache() -> PatternCache:
    """The process-wide cache that every forward uses unless told otherwise."""
    return _GLOBAL


def reset_global_pattern_cache() -> None:
    """Empty the process-wide cache. It stays the same object, so modules that hold it see the reset."""
    _GLOBAL.clear()
