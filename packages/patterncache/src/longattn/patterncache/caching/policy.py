"""Which entry leaves: `LRU` and `S3FIFO`.

A hit takes no lock and calls no policy: it writes two numbers into the `Entry`, and the policy reads them when room is needed. A
policy's methods are called under the cache's lock.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Iterator
from typing import Any, Protocol

from longattn.patterncache.caching.ghosts import Ghosts

MOST_TURNS = 3
"""S3-FIFO goes round again once for each hit, up to this: two bits, as in the paper."""

AGEING = 300
"""Insertions, over the entries that there is room for, after which frequencies are halved."""


class Entry:
    """One kept value. A hit sets `used` to the cache's clock and adds one to `hits`; nothing else changes but measured bytes."""

    __slots__ = ("before", "counted", "hits", "key", "measured", "nbytes", "used", "value")

    def __init__(self, key: Hashable, value: Any, nbytes: int, used: int) -> None:
        self.key = key
        self.value = value
        self.nbytes = nbytes
        self.used = used
        self.hits = 0
        # Hits when the bytes were last measured; -1: they are an estimate.
        self.measured = -1
        # Hits that the policy has already acted upon.
        self.counted = 0
        # How often it was asked for before it came in, as far as is remembered; less what has aged since.
        self.before = 0


class Policy(Protocol):
    """Who leaves when room is needed."""

    ghosts: Ghosts

    def recall(self, key: Hashable) -> int:
        """How often `key` was asked for before. Asked before room is made for it, since what leaves then counts as later."""
        ...

    def insert(self, entry: Entry, before: int) -> None:
        """Take an entry in, asked for so often before. There is room."""
        ...

    def evict(self) -> Entry:
        """Give up one entry. There is at least one."""
        ...

    def resize(self, max_size: int) -> None:
        """There is room for so many from now on; no more are there."""
        ...

    def recount(self) -> None:
        """Bytes of entries have changed."""
        ...

    def __iter__(self) -> Iterator[Entry]:
        """All entries, in no order."""
        ...


class LRU:
    """The least recently used leaves, exactly.

    A heap holds when each entry was used last, as far as is known. What comes out on top may have been used since; then it goes back
    with its true time. What is known is never later than what is true, so the first that is up to date is the least recent.
    """

    def __init__(self, max_size: int, max_bytes: int | None) -> None:
        self.ghosts = Ghosts(max_size)
        self._heap: list[tuple[int, int, Entry]] = []
        self._serial = 0

    def recall(self, key: Hashable) -> int:
        """Whether `key` was evicted not long ago; it only matters to the hit curve."""
        return self.ghosts.recall(key)

    def insert(self, entry: Entry, before: int) -> None:
        """Take an entry in."""
        self._push(entry)

    def _push(self, entry: Entry) -> None:
        self._serial += 1  # so that two entries are never compared
        heapq.heappush(self._heap, (entry.used, self._serial, entry))

    def evict(self) -> Entry:
        """The least recently used."""
        while True:
            known, _, entry = heapq.heappop(self._heap)
            if known == entry.used:
                self.ghosts.add(entry.key)
                return entry
            self._push(entry)

    def recount(self) -> None:
        """Bytes do not matter to it."""

    def resize(self, max_size: int) -> None:
        """Only what is remembered changes."""
        self.ghosts.resize(max_size)

    def __iter__(self) -> Iterator[Entry]:
        return (entry for _, _, entry in self._heap)


class S3FIFO:
    """Three queues (Yang et al., SOSP 2023), and admission by frequency between them (as in TinyLFU, Einziger et al. 2017).

    The life of an entry: (1) it enters the small queue, a fiftieth of the room; (2) at its end it moves to the main queue if there is
    room and it was asked for twice, or in place of main's oldest if it was asked for more often than that; else it leaves; (3) at the
    end of the main queue it goes round again once for each hit, up to three; (4) once gone, its key and how often it was asked for are
    remembered for a while, and count if it comes back. Frequencies are halved now and then.

    A queue of the last few keeps bursts; frequency keeps a scan, or a loop, from flushing what is asked for all the time.
    """

    def __init__(self, max_size: int, max_bytes: int | None) -> None:
        self.ghosts = Ghosts(max_size)
        self._small: deque[Entry] = deque()
        self._main: deque[Entry] = deque()
        self._small_bytes = self._main_bytes = self._inserted = 0
        self._max_bytes = max_bytes
        self._small_limit = None if max_bytes is None else max_bytes // 50
        self._set_size(max_size)

    def _set_size(self, max_size: int) -> None:
        self._max_size = max_size
        # Two at least: the layers of a model may take turns with two patterns.
        self._small_size = max(1, min(2, max_size // 2), max_size // 50)

    def resize(self, max_size: int) -> None:
        """The small queue stays a fiftieth of the room."""
        self._set_size(max_size)
        self.ghosts.resize(max_size)

    def recount(self) -> None:
        """Bytes of entries have changed."""
        self._small_bytes, self._main_bytes = (
            sum(entry.nbytes for entry in some) for some in (self._small, self._main)
        )

    def recall(self, key: Hashable) -> int:
        """How often `key` was asked for before it left, 0 where that is not remembered."""
        return self.ghosts.recall(key)

    def insert(self, entry: Entry, before: int) -> None:
        """Take an entry in."""
        entry.before = before
        self._small.append(entry)
        self._small_bytes += entry.nbytes
        self._inserted += 1
        if self._inserted >= AGEING * self._max_size:
            self._inserted = 0
            self.ghosts.halve()
            for other in self:
                other.before -= (_frequency(other) + 1) // 2

    def evict(self) -> Entry:
        """The oldest that was not asked for again."""
        entry = self._leaving()
        self.ghosts.add(entry.key, _frequency(entry))
        return entry

    def _leaving(self) -> Entry:
        while self._small and (not self._main or self._small_is_full()):
            entry = self._small.popleft()
            self._small_bytes -= entry.nbytes
            if self._main_has_room():
                if _frequency(entry) < 2:
                    return entry
                self._promote(entry)
                continue
            oldest = self._oldest()
            if _frequency(entry) <= _frequency(oldest):
                return entry
            self._drop_oldest()
            self._promote(entry)
            return oldest
        oldest = self._oldest()
        self._drop_oldest()
        return oldest

    def _drop_oldest(self) -> None:
        self._main_bytes -= self._main.popleft().nbytes

    def _promote(self, entry: Entry) -> None:
        entry.counted = entry.hits
        self._main.append(entry)
        self._main_bytes += entry.nbytes

    def _oldest(self) -> Entry:
        """The head of the main queue, after entries with hits to spend have moved to its tail."""
        # Other threads may hit entries during the loop; the bound ends it all the same.
        for _ in range((MOST_TURNS + 1) * len(self._main)):
            entry = self._main[0]
            hits = entry.hits
            turns = min(MOST_TURNS, hits - entry.counted)
            if turns == 0:
                break
            entry.counted = hits - turns + 1
            self._main.rotate(-1)
        return self._main[0]

    def _small_is_full(self) -> bool:
        by_bytes = self._small_limit is not None and self._small_bytes >= self._small_limit
        return by_bytes or len(self._small) >= self._small_size

    def _main_has_room(self) -> bool:
        if not self._main:
            return True
        in_bytes = self._max_bytes is None or self._main_bytes + self._max_bytes // 50 < self._max_bytes
        return in_bytes and len(self._main) < self._max_size - self._small_size

    def __iter__(self) -> Iterator[Entry]:
        yield from self._small
        yield from self._main


def _frequency(entry: Entry) -> int:
    """How often an entry was asked for, as far as is remembered."""
    return entry.before + 1 + entry.hits


POLICIES: dict[str, type[LRU] | type[S3FIFO]] = {"s3fifo": S3FIFO, "lru": LRU}
