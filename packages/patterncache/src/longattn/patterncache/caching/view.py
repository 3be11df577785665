"""`CacheView`: a cache's entries with hits and misses of one's own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

from longattn.patterncache.caching.cache import FREE_THREADED, PatternCache
from longattn.patterncache.caching.global_cache import get_global_pattern_cache
from longattn.patterncache.spans import shortened

T = TypeVar("T")


class CacheView:
    """One user's view of a cache that others use as well: hits and misses are its own, everything else is the cache's.

    A reset or `clear` of the cache leaves the view working, and its counts as they are. A copy, pickled ones included, counts from
    zero; a view of the global cache is then one of the global cache of where it lands.

    Args:
        upstream: the cache. Default None: the global one.

    Raises:
        TypeError: upstream is not a PatternCache.
    """

    def __init__(self, upstream: PatternCache | None = None) -> None:
        if upstream is not None and not isinstance(upstream, PatternCache):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"upstream must be a PatternCache or None, got {shortened(upstream)}")
        self._upstream = get_global_pattern_cache() if upstream is None else upstream
        self._hits = self._misses = 0
        self._lock = threading.Lock()

    @property
    def _cache(self) -> Mapping[Hashable, Any]:
        return self._upstream._cache  # pyright: ignore[reportPrivateUsage]

    def __len__(self) -> int:
        return len(self._upstream)

    def get_or_build(self, key: Hashable, build: Callable[[], T]) -> T:
        """The value of `key` from the cache, built where it is missing. Whatever `build` raises, this raises, and counts as a miss."""
        return self.ask(key, build)[0]

    def ask(self, key: Hashable, build: Callable[[], T]) -> tuple[T, bool]:
        """`get_or_build`, and whether it was a hit."""
        hit = False
        try:
            value, hit = self._upstream.ask(key, build)
            return value, hit
        finally:
            # Plain additions, uninterrupted as in the cache; without a GIL they need a lock.
            if FREE_THREADED:
                with self._lock:
                    self._count(hit)
            else:
                self._count(hit)

    def _count(self, hit: bool) -> None:
        self._hits += hit
        self._misses += not hit

    def get_stats(self) -> dict[str, Any]:
        """The cache's statistics, with `hits`, `misses` and `hit_rate` of this view."""
        hits, misses = self._hits, self._misses
        requests = hits + misses
        return self._upstream.get_stats() | {
            "hits": hits,
            "misses": misses,
            "hit_rate": hits / requests if requests else 0.0,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheView, (() if self._upstream is get_global_pattern_cache() else (self._upstream,))
