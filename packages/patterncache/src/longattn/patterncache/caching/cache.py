"""`PatternCache`: bounded, thread-safe, one build per key.

The life of a key: (1) the first thread to ask for it builds it, outside the lock, while others wait for that build; (2) it is kept
and served, without a lock, until the policy evicts it; (3) asked for again, it is built again. A build that raises is not kept:
every waiter gets the exception, and the next caller builds again. A build that is interrupted (KeyboardInterrupt, SystemExit) stops its
own thread only: one of the waiters builds. What was being built when the cache was cleared goes to those who asked, and is not kept.

A hit is a read of a dict and two plain additions without a call in between, which CPython does not interrupt while it has a GIL, so
counts are exact. Without a GIL a hit takes the lock.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from longattn.patterncache.caching.freeze import ENTRY_BYTES, first_estimate, freeze
from longattn.patterncache.caching.hit_curve import HitCurve
from longattn.patterncache.caching.policy import POLICIES, Entry
from longattn.patterncache.caching.profile import BuildProfile
from longattn.patterncache.caching.single_flight import Flight, check_no_circle, survive_forks
from longattn.patterncache.caching.store import Store
from longattn.patterncache.spans import check_int, shortened

logger = logging.getLogger("longattn.patterncache")

T = TypeVar("T")

FREE_THREADED = not getattr(sys, "_is_gil_enabled", lambda: True)()
"""Whether this interpreter runs without a GIL."""


class PatternCache:
    """A bounded map from keys to built values: plans, arrays, numbers, tuples of those. Arrays are handed out read-only, plans packed.

    Keys are hashable, and their `__hash__` and `__eq__` do not use the cache. A copy, pickled ones included, is an empty cache of the
    same settings; a forked child has the parent's entries.

    Args:
        max_size: entries kept at most; 0 builds every time and keeps nothing. Default 1000.
        policy: "s3fifo", which a scan does not flush, or "lru", which evicts exactly the least recently used. Default "s3fifo".
        max_bytes: bytes kept at most: each value's `nbytes` as it is when built, of plans all that they hold by now, and `ENTRY_BYTES` an
            entry. What plans gather in use counts at the next miss and in `get_stats`. A value beyond the limit by itself is not kept; 0
            keeps nothing. Default None: no limit.
        enable_profiling: statistics get a `profile` entry. Default False.
        grow_to: entries that the cache may allow itself: when it has evicted as many as it holds, `max_size` becomes what the hit curve
            since then asks for, up to this. It never shrinks by itself. Default None: `max_size` stays.

    Raises:
        TypeError, ValueError: a limit is not an integer >= 0, the policy is unknown, or enable_profiling not a bool.
    """

    def __init__(
        self,
        max_size: int = 1000,
        policy: str = "s3fifo",
        max_bytes: int | None = None,
        enable_profiling: bool = False,
        grow_to: int | None = None,
    ) -> None:
        if not isinstance(policy, str) or policy not in POLICIES:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"policy must be one of {', '.join(map(repr, POLICIES))}, got {shortened(policy)}")
        self.policy = policy
        self._lock = threading.Lock()
        self._flights: dict[Hashable, Flight] = {}
        self._waiting: dict[int, Flight] = {}
        self.configure(max_size, max_bytes, enable_profiling, grow_to)
        survive_forks(self)

    def configure(
        self, max_size: int, max_bytes: int | None = None, enable_profiling: bool = False, grow_to: int | None = None
    ) -> None:
        """Set other limits, checked as by the constructor, and forget everything, as `clear` does."""
        size = check_int("max_size", max_size, minimum=0)
        limit = None if max_bytes is None else check_int("max_bytes", max_bytes, minimum=0)
        most = None if grow_to is None else check_int("grow_to", grow_to, minimum=size)
        if not isinstance(enable_profiling, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"enable_profiling must be a bool, got {shortened(enable_profiling)}")
        with self._lock:
            # The size that a growing cache starts from, and returns to when it is cleared.
            self._settings = (size, self.policy, limit, enable_profiling, most)
            # Replaced, not emptied: a hit that reads without the lock sees either the old store or the new one.
            self._store = Store(self.policy, size, limit, most)
            self._entries = self._store.entries
            self._flights = {}
            self._profile = BuildProfile() if enable_profiling else None
            # The clock ticks at each hit and each insertion; hits are its ticks less the insertions.
            self._clock = self._misses = 0

    @property
    def max_size(self) -> int:
        """Entries kept at most, as of now."""
        return self._store.max_size

    @property
    def max_bytes(self) -> int | None:
        """Bytes kept at most, or None."""
        return self._store.max_bytes

    @property
    def enable_profiling(self) -> bool:
        """Whether statistics have a `profile` entry."""
        return self._profile is not None

    @property
    def _hits(self) -> int:
        return self._clock - self._store.inserted

    def get_or_build(self, key: Hashable, build: Callable[[], T]) -> T:
        """The value of `key`; `build()` makes it where it is missing. Whatever `build` raises, this raises.

        Raises:
            RuntimeError: the build of `key` asks, itself or through builds of other threads, for `key`.
        """
        entry = self._entries.get(key)
        if entry is None or FREE_THREADED:
            return self._ask_locked(key, build)[0]
        self._clock = entry.used = self._clock + 1
        entry.hits += 1
        return entry.value

    def ask(self, key: Hashable, build: Callable[[], T]) -> tuple[T, bool]:
        """As `get_or_build`, and whether it was there. Waiting for another thread's build is a miss."""
        entry = self._entries.get(key)
        if entry is None or FREE_THREADED:
            return self._ask_locked(key, build)
        self._clock = entry.used = self._clock + 1
        entry.hits += 1
        return entry.value, True

    def _ask_locked(self, key: Hashable, build: Callable[[], T]) -> tuple[T, bool]:
        if not callable(build):
            raise TypeError(
                f"build must be a function without parameters, got {shortened(build)} ({type(build).__name__})"
            )
        missed = False
        while True:
            with self._lock:
                entry = self._entries.get(key)
                if entry is not None:
                    if not missed:
                        self._clock = entry.used = self._clock + 1
                        entry.hits += 1
                    return entry.value, not missed
                self._misses += not missed
                missed = True
                flight = self._flights.get(key)
                mine = flight is None
                if flight is None:
                    flight = self._flights[key] = Flight(key)
            if mine:
                return self._build(key, build, flight), False
            self._wait(flight)
            if flight.error is not None:
                raise flight.error
            if flight.built:
                return flight.value, False

    def _wait(self, flight: Flight) -> None:
        me = threading.get_ident()
        try:
            with self._lock:
                check_no_circle(flight, self._waiting)
                self._waiting[me] = flight
            flight.done.wait()
        finally:
            self._waiting.pop(me, None)

    def _build(self, key: Hashable, build: Callable[[], T], flight: Flight) -> T:
        started = time.perf_counter()
        try:
            try:
                value = freeze(build())
            except Exception as error:
                flight.error = error
                raise
            flight.value, flight.built = value, True
            seconds = time.perf_counter() - started
            nbytes = first_estimate(value) + ENTRY_BYTES
            logger.debug("build %s: %.3f ms, %d bytes", key, 1e3 * seconds, nbytes)
            self._keep(key, value, nbytes, seconds, flight)
            return value
        finally:
            with self._lock:
                if self._flights.get(key) is flight:
                    del self._flights[key]
            flight.done.set()
            # The exception's traceback holds this frame: without this, frame and exception hold each other.
            del flight

    def _keep(self, key: Hashable, value: Any, nbytes: int, seconds: float, flight: Flight) -> None:
        """Take a built value in, unless the cache was cleared since the build began or has no room for it at all."""
        with self._lock:
            if self._flights.get(key) is not flight:
                return
            if self._profile is not None:
                self._profile.note_build(key, nbytes, seconds)
            size, hits, before = self.max_size, self._hits, self._store.inserted
            evicted = self._store.take(Entry(key, value, nbytes, self._clock + 1), hits, hits + self._misses)
            self._clock += self._store.inserted - before
            self._note_evicted(evicted)
        self._log(evicted, size)

    def _note_evicted(self, evicted: list[Entry]) -> None:
        if self._profile is not None:
            for entry in evicted:
                self._profile.note_hits(entry)

    def _log(self, evicted: list[Entry], size: int) -> None:
        """Log and release outside the lock: log handlers and finalizers may call the cache."""
        for entry in evicted:
            logger.debug("evict %s", entry.key)
        if self.max_size != size:
            logger.debug("resize from %d to %d entries", size, self.max_size)

    def resize(self, max_size: int) -> None:
        """Allow so many entries from now on. Entries and statistics stay, but for what has no room any more, and the hit curve.

        Raises:
            TypeError, ValueError: max_size is not an integer >= 0.
        """
        size = check_int("max_size", max_size, minimum=0)
        with self._lock:
            before = self.max_size
            evicted = self._store.resize(size, self._hits, self._hits + self._misses)
            self._note_evicted(evicted)
        self._log(evicted, before)

    def clear(self) -> None:
        """Forget every entry; statistics start at zero. Builds under way go to those who asked for them, and are not kept."""
        size, _, max_bytes, enable_profiling, grow_to = self._settings
        self.configure(size, max_bytes, enable_profiling, grow_to)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def _cache(self) -> Mapping[Hashable, Any]:
        """{key: value} as it is now, read-only."""
        with self._lock:
            return MappingProxyType({key: entry.value for key, entry in self._entries.items()})

    def get_stats(self) -> dict[str, Any]:
        """`hits misses hit_rate evictions size max_size bytes max_bytes compression`, since the cache was made, cleared or reset.

        `compression`: the bytes that the values kept would take unpacked, over those that they take; 1.0 without any. With profiling also
        `profile`: {str(key): {count, bytes, time}}, asked for and served so often, bytes when last built, seconds spent building; for the
        keys built last.
        """
        with self._lock:
            evicted = self._store.measure(every=True)
            self._note_evicted(evicted)
            hits, misses, store = self._hits, self._misses, self._store
            stats: dict[str, Any] = {
                "hits": hits,
                "misses": misses,
                "hit_rate": hits / (hits + misses) if hits + misses else 0.0,
                "evictions": store.evictions,
                "size": len(self._entries),
                "max_size": store.max_size,
                "bytes": store.nbytes,
                "max_bytes": store.max_bytes,
                "compression": store.compression,
            }
            if self._profile is not None:
                stats["profile"] = self._profile.as_dict(self._entries.values())
        self._log(evicted, self.max_size)
        return stats

    def hit_curve(self) -> HitCurve:
        """How many hits more room would have brought since the size last changed, from the evicted keys that came back."""
        with self._lock:
            return self._store.curve(self._hits, self._hits + self._misses)

    def suggest_size(self, gain: float = 0.01) -> int:
        """A `max_size` for what was asked so far: the least whose hit rate is within `gain` of the best of `hit_curve`.

        Where nothing was evicted it is the number of entries: all that was ever asked for.

        Raises:
            TypeError, ValueError: gain is not a number from 0 to 1.
        """
        best = self.hit_curve().least_within(gain)
        return best if self._store.evictions or not self.max_size else len(self)

    def check_valid(self) -> None:
        """Assert the invariants, for tests: those of the store; nothing is pending that is also kept; counts are not negative."""
        with self._lock:
            self._store.check_valid()
            assert self._entries is self._store.entries and min(self._hits, self._misses) >= 0
            assert not (self._flights.keys() & self._entries.keys())

    def _after_fork_in_child(self) -> None:
        self._lock = threading.Lock()
        # Builds of other threads never end in the child. Builds of this thread do, without waiters; a waiter may have held the event's lock.
        mine = threading.get_ident()
        self._flights = {key: flight for key, flight in self._flights.items() if flight.owner == mine}
        for flight in self._flights.values():
            flight.done = threading.Event()
        self._waiting = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return PatternCache, self._settings
