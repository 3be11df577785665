"""What `enable_profiling` keeps: sums for each type, and a timeline of buffers' beginnings and ends."""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

from longattn.bufmgr.memory.forking import ForkableLock
from longattn.bufmgr.spec import BufferType

_EVENTS_KEPT = 10_000


class Event(NamedTuple):
    """One allocation, or the end of one: seconds since the profile began, type, bytes, nanoseconds the allocation took
    (0 for an end), the buffer's number, and whether this is its end.
    """

    seconds: float
    type: str
    nbytes: int
    nanoseconds: int
    buffer: int
    ended: bool


class Profile:
    """Counts, bytes and time of each type. timeline: also the last 10,000 events."""

    def __init__(self, *, timeline: bool) -> None:
        self._clock = time.perf_counter  # an end may come at interpreter exit, when module globals are gone
        self._began = self._clock()
        self._rows = {kind: [0, 0, 0] for kind in BufferType}  # count, bytes, nanoseconds
        self._events: deque[Event] | None = deque(maxlen=_EVENTS_KEPT) if timeline else None
        self._lock = ForkableLock()

    def note(self, kind: BufferType, nbytes: int, nanoseconds: int, buffer: int) -> None:
        """Add one allocation."""
        with self._lock:
            row = self._rows[kind]
            row[0] += 1
            row[1] += nbytes
            row[2] += nanoseconds
            if self._events is not None:
                seconds = self._clock() - self._began
                self._events.append(Event(seconds, kind.value, nbytes, nanoseconds, buffer, ended=False))

    def note_end(self, kind: BufferType, nbytes: int, buffer: int) -> None:
        """Add the end of a buffer. Called from finalisers: takes no lock."""
        if self._events is not None:
            self._events.append(Event(self._clock() - self._began, kind.value, nbytes, 0, buffer, ended=True))

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Return count, bytes and time (seconds) of each type."""
        with self._lock:
            return {
                kind.value: {"count": row[0], "bytes": row[1], "time": row[2] * 1e-9}
                for kind, row in self._rows.items()
            }

    def timeline(self) -> list[Event]:
        """Return the events kept, in order of time."""
        with self._lock:
            return sorted(self._events.copy(), key=lambda event: event.seconds) if self._events is not None else []
