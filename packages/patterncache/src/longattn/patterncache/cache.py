"""`PatternCache`: bounded, thread-safe, one build per key.

The life of a key: (1) the first thread to ask for it builds it, outside the lock, while others wait for that build; (2) it is kept
and served, without a lock, until the policy evicts it; (3) asked for again, it is built again. A build that raises is kept by nobody:
every waiter sees the exception, and the next caller tries anew. A build that is interrupted (KeyboardInterrupt, SystemExit) stops its
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

from longattn.patterncache.flight import Flight, check_no_circle, survive_forks
from longattn.patterncache.freeze import ENTRY_BYTES, freeze, size_of
from longattn.patterncache.hit_curve import HitCurve
from longattn.patterncache.index import check_int
from longattn.patterncache.policy import POLICIES, Entry
from longattn.patterncache.profile import BuildProfile

logger = logging.getLogger("longattn.patterncache")

T = TypeVar("T")

FREE_THREADED = not getattr(sys, "_is_gil_enabled", lambda: True)()
"""Whether this interpreter runs without a GIL."""


class PatternCache:
    """A bounded map from keys to built values: plans, arrays, numbers, tuples of those. Arrays are handed out read-only.

    Keys are hashable, and their `__hash__` and `__eq__` do not use the cache. A copy, pickled ones included, is an empty cache of the
    same settings; a forked child has the parent's entries.

    Args:
        max_size: entries kept at most; 0 builds every time and keeps nothing. Default 1000.
        policy: "s3fifo", which a scan does not flush, or "lru", which evicts exactly the least recently used. Default "s3fifo".
        max_bytes: bytes kept at most: each value's `nbytes` as it is when built, and `ENTRY_BYTES` an entry. A value beyond that by
            itself is not kept; 0 keeps nothing. Default None: no limit.
        enable_profiling: statistics get a `profile` entry. Default False.

    Raises:
        TypeError, ValueError: a limit is not an integer >= 0, the policy is unknown, or enable_profiling not a bool.
    """

    def __init__(
        self,
        max_size: int = 1000,
        policy: str = "s3fifo",
        max_bytes: int | None = None,
        enable_profiling: bool = False,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(map(repr, POLICIES))}, got {policy!r}")
        self.policy = policy
        self._lock = threading.Lock()
        self._flights: dict[Hashable, Flight] = {}
        self._waiting: dict[int, Flight] = {}
        self.configure(max_size, max_bytes, enable_profiling)
        survive_forks(self)

    def configure(self, max_size: int, max_bytes: int | None = None, enable_profiling: bool = False) -> None:
        """Start anew with other limits: as after `clear`, and as the constructor checks them."""
        size = check_int("max_size", max_size, minimum=0)
        limit = None if max_bytes is None else check_int("max_bytes", max_bytes, minimum=0)
        if not isinstance(enable_profiling, bool):
            raise TypeError(f"enable_profiling must be a bool, got {enable_profiling!r}")
        with self._lock:
            self.max_size, self.max_bytes, self.enable_profiling = size, limit, enable_profiling
            # Rebound, not emptied: whoever reads the old ones without the lock reads something whole.
            self._entries: dict[Hashable, Entry] = {}
            self._flights = {}
            self._order = POLICIES[self.policy](size, limit)
            self._profile = BuildProfile() if enable_profiling else None
            # The clock ticks at each hit and each insertion; hits are its ticks less the insertions.
            self._clock = self._inserted = self._misses = self._evictions = self._bytes = 0

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
            nbytes = size_of(value) + ENTRY_BYTES
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
        evicted: list[Entry] = []
        with self._lock:
            if self._flights.get(key) is not flight:
                return
            if self._profile is not None:
                self._profile.note_build(key, nbytes, seconds)
            if not self.max_size or (self.max_bytes is not None and nbytes > self.max_bytes):
                return
            recalled = self._order.recall(key)
            while not self._fits(nbytes):
                evicted.append(self._evict())
            self._inserted += 1
            self._clock += 1
            entry = self._entries[key] = Entry(key, value, nbytes, self._clock)
            self._bytes += nbytes
            self._order.insert(entry, recalled)
        # Logged, and let go, outside the lock: handlers and finalizers are other people's code.
        for entry in evicted:
            logger.debug("evict %s", entry.key)

    def _fits(self, nbytes: int) -> bool:
        in_bytes = self.max_bytes is None or self._bytes + nbytes <= self.max_bytes
        return in_bytes and len(self._entries) < self.max_size

    def _evict(self) -> Entry:
        entry = self._order.evict()
        del self._entries[entry.key]
        self._bytes -= entry.nbytes
        self._evictions += 1
        if self._profile is not None:
            self._profile.note_hits(entry)
        return entry

    def clear(self) -> None:
        """Forget every entry; statistics start at zero. Builds under way go to those who asked for them, and are not kept."""
        self.configure(self.max_size, self.max_bytes, self.enable_profiling)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def _cache(self) -> Mapping[Hashable, Any]:
        """{key: value} as it is now, read-only."""
        with self._lock:
            return MappingProxyType({key: entry.value for key, entry in self._entries.items()})

    def get_stats(self) -> dict[str, Any]:
        """`hits misses hit_rate evictions size max_size bytes max_bytes`, since the cache was made, cleared or reset.

        With profiling also `profile`: {str(key): {count, bytes, time}}, asked for and served so often, bytes when last built, seconds
        spent building; for the keys built last.
        """
        with self._lock:
            hits, misses = self._clock - self._inserted, self._misses
            stats = {
                "hits": hits,
                "misses": misses,
                "hit_rate": hits / (hits + misses) if hits + misses else 0.0,
                "evictions": self._evictions,
                "size": len(self._entries),
                "max_size": self.max_size,
                "bytes": self._bytes,
                "max_bytes": self.max_bytes,
            }
            return (
                stats if self._profile is None else stats | {"profile": self._profile.as_dict(self._entries.values())}
            )

    def hit_curve(self) -> HitCurve:
        """How many hits there would have been with more room, from the evicted keys that came back."""
        with self._lock:
            hits, ghosts = self._clock - self._inserted, self._order.ghosts
            exact = self.policy == "lru" and self.max_bytes is None
            return HitCurve.of_returns(self.max_size, ghosts.capacity, hits, hits + self._misses, ghosts.returns, exact)

    def suggest_size(self, gain: float = 0.01) -> int:
        """A `max_size` for what was asked so far: the least whose hit rate is within `gain` of the best of `hit_curve`.

        Where nothing was evicted it is the number of entries: all that was ever asked for.

        Raises:
            TypeError, ValueError: gain is not a number from 0 to 1.
        """
        curve = self.hit_curve()
        best = curve.least_within(gain)
        return best if self._evictions or not self.max_size else len(self)

    def check_valid(self) -> None:
        """Assert the invariants, for tests: bounded; bytes equal a recount; nothing is pending that is also kept; no entry is lost."""
        with self._lock:
            assert len(self._entries) <= self.max_size
            assert self._bytes == sum(entry.nbytes for entry in self._entries.values())
            assert self.max_bytes is None or self._bytes <= self.max_bytes
            assert not (self._flights.keys() & self._entries.keys())
            assert min(self._clock - self._inserted, self._misses, self._evictions) >= 0
            assert self._inserted == self._evictions + len(self._entries)
            assert sorted(map(id, self._order)) == sorted(map(id, self._entries.values()))
            assert len(self._order.ghosts) <= self._order.ghosts.capacity

    def _after_fork_in_child(self) -> None:
        self._lock = threading.Lock()
        # The builds of other threads will not end here. Our own will, but nobody waits for it, and a waiter may have held its lock.
        mine = threading.get_ident()
        self._flights = {key: flight for key, flight in self._flights.items() if flight.owner == mine}
        for flight in self._flights.values():
            flight.done = threading.Event()
        self._waiting = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return PatternCache, (self.max_size, self.policy, self.max_bytes, self.enable_profiling)
