"""Counts, bytes and time per buffer type, and on request the last events in order."""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

from longattn.bufmgr.gate import ForkableLock
from longattn.bufmgr.spec import BufferType

_EVENTS_KEPT = 1000


class Event(NamedTuple):
    """One allocation: seconds since the profile began, type, bytes asked for, nanoseconds it took."""

    seconds: float
    type: str
    nbytes: int
    nanoseconds: int


class Profile:
    """What `enable_profiling` keeps. timeline: also the last 1000 allocations."""

    def __init__(self, *, timeline: bool) -> None:
        self._began = time.perf_counter()
        self._rows = {kind: [0, 0, 0] for kind in BufferType}  # count, bytes, nanoseconds
        self._events: deque[Event] | None = deque(maxlen=_EVENTS_KEPT) if timeline else None
        self._lock = ForkableLock()

    def note(self, kind: BufferType, nbytes: int, nanoseconds: int) -> None:
        """Add one allocation."""
        with self._lock:
            row = self._rows[kind]
            row[0] += 1
            row[1] += nbytes
            row[2] += nanoseconds
            if self._events is not None:
                self._events.append(Event(time.perf_counter() - self._began, kind.value, nbytes, nanoseconds))

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Return count, bytes and time (seconds) of each type."""
        with self._lock:
            return {
                kind.value: {"count": row[0], "bytes": row[1], "time": row[2] * 1e-9}
                for kind, row in self._rows.items()
            }

    def timeline(self) -> list[Event]:
        """Return the events kept, the oldest first."""
        with self._lock:
            return list(self._events or ())
