"""`Memo`: a bounded map of what was looked up before, read without a lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable
from typing import Any, Generic, Protocol, TypeVar


class Remembered(Protocol):
    """A value of a memo; the memo sets `used` when it is looked up."""

    used: bool


T = TypeVar("T", bound=Remembered)


class Memo(Generic[T]):
    """Keeps at most `max_size` values. A full memo evicts the oldest value that was not looked up since it was last passed over (CLOCK).

    A look-up is one read of a dict and takes no lock; keeping a value takes one.
    """

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self._values: dict[Hashable, T] = {}
        self._hits = self._misses = self._evictions = 0
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        # Another thread of the parent may have held the lock.
        self._lock = threading.Lock()

    def find(self, key: Hashable) -> T | None:
        """The value kept under `key`, or None."""
        value = self._values.get(key)
        if value is None:
            self._misses += 1
        else:
            self._hits += 1
            value.used = True
        return value

    def peek(self, key: Hashable) -> T | None:
        """The same, without counting as a look-up."""
        return self._values.get(key)

    def keep(self, key: Hashable, value: T) -> None:
        """Keep `value` under `key`, in place of what stood there."""
        with self._lock:
            self._values.pop(key, None)
            while len(self._values) >= self.max_size:
                oldest = next(iter(self._values))
                passed_over = self._values.pop(oldest)
                if passed_over.used:
                    passed_over.used = False
                    self._values[oldest] = passed_over
                else:
                    self._evictions += 1
            self._values[key] = value

    def clear(self) -> None:
        """Forget every value; the counters stay."""
        with self._lock:
            self._values.clear()

    def __len__(self) -> int:
        return len(self._values)

    def get_stats(self) -> dict[str, Any]:
        """`hits misses hit_rate evictions size max_size`."""
        hits, misses = self._hits, self._misses
        return {
            "hits": hits,
            "misses": misses,
            "hit_rate": hits / (hits + misses) if hits + misses else 0.0,
            "evictions": self._evictions,
            "size": len(self._values),
            "max_size": self.max_size,
        }
