"""Which entry leaves: `LRU` and `S3FIFO`, and `Ghosts`, the keys that left.

A hit takes no lock and calls no policy: it writes two numbers into the `Entry`, and the policy reads them when room is needed. A
policy's methods are called under the cache's lock.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Hashable, Iterator
from typing import Any, Protocol

MOST_FREQUENT = 3
"""S3-FIFO counts hits up to this: two bits, as in the paper."""


class Entry:
    """One kept value. A hit sets `used` to the cache's clock and adds one to `hits`; nothing else changes."""

    __slots__ = ("counted", "hits", "key", "nbytes", "used", "value")

    def __init__(self, key: Hashable, value: Any, nbytes: int, used: int) -> None:
        self.key = key
        self.value = value
        self.nbytes = nbytes
        self.used = used
        self.hits = 0
        # Hits that the policy has already acted upon.
        self.counted = 0


class Ghosts:
    """The keys that were evicted last, newest last, as hashes: two keys of one hash pass for one, which costs a wrong guess at most.

    Attributes:
        returns: how many keys came back, by their place counted from the newest (1 is the newest).
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.returns: Counter[int] = Counter()
        self._serial: dict[int, int] = {}
        self._order: list[int] = []
        self._next = 0

    def __len__(self) -> int:
        return len(self._order)

    def add(self, key: Hashable) -> None:
        """`key` has just been evicted."""
        mark = hash(key)
        if mark in self._serial:
            self._forget(mark)
        self._serial[mark] = self._next
        self._order.append(self._next)
        self._next += 1
        if len(self._order) > self.capacity:
            self._forget(next(iter(self._serial)))

    def recall(self, key: Hashable) -> bool:
        """Whether `key` is remembered. It is forgotten by this, and its place is noted."""
        mark = hash(key)
        if mark not in self._serial:
            return False
        self.returns[len(self._order) - self._forget(mark)] += 1
        return True

    def _forget(self, mark: int) -> int:
        # Serials only grow, so `_order` is sorted, and a dict keeps the same order as long as nothing is written over.
        index = bisect_left(self._order, self._serial.pop(mark))
        del self._order[index]
        return index


class Policy(Protocol):
    """Who leaves when room is needed."""

    ghosts: Ghosts

    def recall(self, key: Hashable) -> bool:
        """Whether `key` was evicted not long ago. Asked before room is made for it, since what leaves then counts as later."""
        ...

    def insert(self, entry: Entry, recalled: bool) -> None:
        """Take an entry in. There is room."""
        ...

    def evict(self) -> Entry:
        """Give up one entry. There is at least one."""
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

    def recall(self, key: Hashable) -> bool:
        """Whether `key` was evicted not long ago; it only matters to the hit curve."""
        return self.ghosts.recall(key)

    def insert(self, entry: Entry, recalled: bool) -> None:
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

    def __iter__(self) -> Iterator[Entry]:
        return (entry for _, _, entry in self._heap)


class S3FIFO:
    """Three queues (Yang et al., SOSP 2023): what is asked for once passes through a small queue and does not disturb the rest.

    The life of an entry: (1) it enters the small queue, a tenth of the room, or the main queue if it was evicted not long ago;
    (2) at the end of the small queue it moves to the main one if it was hit twice, else it leaves and its key is remembered; (3) at
    the end of the main queue it goes round again once for each hit, up to three, and then leaves.
    """

    def __init__(self, max_size: int, max_bytes: int | None) -> None:
        self.ghosts = Ghosts(max_size)
        self._small: deque[Entry] = deque()
        self._main: deque[Entry] = deque()
        self._small_bytes = 0
        self._small_size = max(1, max_size // 10)
        self._small_limit = None if max_bytes is None else max_bytes // 10

    def recall(self, key: Hashable) -> bool:
        """Whether `key` left the small queue not long ago."""
        return self.ghosts.recall(key)

    def insert(self, entry: Entry, recalled: bool) -> None:
        """Take an entry in."""
        if recalled:
            self._main.append(entry)
            return
        self._small.append(entry)
        self._small_bytes += entry.nbytes

    def evict(self) -> Entry:
        """The oldest that was not asked for again."""
        # Hits go on meanwhile; the count ends a race that they could win for ever.
        chances = (MOST_FREQUENT + 1) * (len(self._small) + len(self._main))
        while True:
            chances -= 1
            if self._small and (not self._main or self._small_is_full()):
                entry = self._small.popleft()
                self._small_bytes -= entry.nbytes
                if entry.hits <= 1 or chances < 0:
                    self.ghosts.add(entry.key)
                    return entry
                entry.counted = entry.hits
            else:
                entry = self._main.popleft()
                hits = entry.hits
                frequency = min(MOST_FREQUENT, hits - entry.counted)
                if frequency == 0 or chances < 0:
                    return entry
                entry.counted = hits - frequency + 1
            self._main.append(entry)

    def _small_is_full(self) -> bool:
        by_bytes = self._small_limit is not None and self._small_bytes >= self._small_limit
        return by_bytes or len(self._small) >= self._small_size

    def __iter__(self) -> Iterator[Entry]:
        yield from self._small
        yield from self._main


POLICIES: dict[str, type[LRU] | type[S3FIFO]] = {"s3fifo": S3FIFO, "lru": LRU}
