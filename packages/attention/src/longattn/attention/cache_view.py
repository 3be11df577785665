"""A module's own view of the global pattern cache, and the profile that all views keep."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

from longattn.kernels.interface import keep_tensors, kept_tensors
from longattn.patterncache import CacheView, Plan, get_global_device_tier

T = TypeVar("T")


class CacheProfile:
    """Count, bytes and seconds per key. Safe to use from any thread."""

    def __init__(self) -> None:
        self._rows: dict[str, list[float]] = {}
        self._lock = threading.Lock()

    def note(self, key: str, nbytes: int, seconds: float) -> None:
        """One more of `key`."""
        with self._lock:
            row = self._rows.setdefault(key, [0, 0, 0.0])
            row[0] += 1
            row[1] += nbytes
            row[2] += seconds

    def as_dict(self) -> dict[str, dict[str, float]]:
        """{key: {count, bytes, time}}."""
        with self._lock:
            return {key: {"count": row[0], "bytes": row[1], "time": row[2]} for key, row in self._rows.items()}


class PatternCacheView:
    """A `CacheView` of the global pattern cache that can keep index tensors with the plans, and profile each key.

    Args:
        profile: keep count, bytes and time per key.
        resident: index tensors stay with the plans that come this way.
    """

    def __init__(self, *, profile: bool = False, resident: bool = False) -> None:
        self._upstream = CacheView()
        self._profile = CacheProfile() if profile else None
        self.resident = resident

    @property
    def _cache(self) -> Mapping[Hashable, Any]:
        """The global cache's entries, for those who ask how many there are."""
        return self._upstream._cache  # pyright: ignore[reportPrivateUsage]

    def __len__(self) -> int:
        return len(self._upstream)

    def get_or_build(self, key: Hashable, build: Callable[[], T]) -> T:
        """The value of `key` from the global cache, built where it is missing."""
        started = time.perf_counter() if self._profile is not None else 0.0
        value, hit = self._upstream.ask(key, build)
        if isinstance(value, Plan):
            if self.resident:
                keep_tensors(value)
                get_global_device_tier().hold(value, kept_tensors)
            if self._profile is not None:
                self._profile.note(str(key), 0 if hit else value.nbytes, time.perf_counter() - started)
        return value

    def get_stats(self) -> dict[str, Any]:
        """`hits misses hit_rate` of this view; `evictions size max_size` of the global cache.

        With `resident` also the global device tier's `resident_bytes`, of index tensors kept with plans, and its limit and evictions.
        With profiling also `profile`: {key: {count, bytes, time}}, asked for so often, bytes of index built, seconds in the cache.
        """
        stats = self._upstream.get_stats()
        if self.resident:
            stats |= get_global_device_tier().get_stats()
        return stats if self._profile is None else stats | {"profile": self._profile.as_dict()}
