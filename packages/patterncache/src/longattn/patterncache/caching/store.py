"""`Store`: the entries of a cache, bounded in count and bytes. It knows no threads: the cache calls it under its lock."""

from __future__ import annotations

from collections.abc import Hashable

from longattn.patterncache.caching.freeze import ENTRY_BYTES, grows, size_of, wide_size_of
from longattn.patterncache.caching.held_bytes import held_bytes
from longattn.patterncache.caching.hit_curve import HitCurve
from longattn.patterncache.caching.policy import POLICIES, Entry

GAIN = 0.01
"""A growing store is large enough where its hit rate is within this of the best that its hit curve knows."""


class Store:
    """Entries by key, and who leaves when room is needed.

    The life of an entry: (1) `take` makes room and lets it in; (2) it is found in `entries`, and a hit changes only the entry itself;
    (3) a later `take`, or `resize`, evicts it.

    Attributes:
        entries: {key: entry}; read without a lock by hits.
        max_size, max_bytes, grow_to: the limits. With `grow_to`, once as many entries left as there is room for, `max_size` becomes what
            the hit curve since the last change asks for.
        inserted, evictions, nbytes: since it was made.
    """

    def __init__(self, policy: str, max_size: int, max_bytes: int | None, grow_to: int | None) -> None:
        self.entries: dict[Hashable, Entry] = {}
        self.max_size, self.max_bytes, self.grow_to = max_size, max_bytes, grow_to
        self.inserted = self.evictions = self.nbytes = 0
        self._wide_bytes = self._data_bytes = 0
        self._order = POLICIES[policy](max_size, max_bytes)
        self._exact = policy == "lru" and max_bytes is None
        # Of the hit curve: what had been when the size last changed, and the evictions up to which it has been looked at.
        self._hits_before = self._requests_before = self._looked_at = 0

    def take(self, entry: Entry, hits: int, requests: int) -> list[Entry]:
        """Let an entry in, where there is room for it at all, and return those that left. `hits` and `requests` are the cache's so far."""
        if not self.max_size or (self.max_bytes is not None and entry.nbytes > self.max_bytes):
            return []
        evicted = self.measure() if self.max_bytes is not None else []
        before = self._order.recall(entry.key)
        if self._is_due():
            self._looked_at = self.evictions
            self._set_size(
                max(self.max_size, min(self.grow_to or 0, self.curve(hits, requests).least_within(GAIN))),
                hits,
                requests,
            )
        while not self._fits(entry.nbytes):
            evicted.append(self._evict())
        self.inserted += 1
        self.entries[entry.key] = entry
        self.nbytes += entry.nbytes
        self._wide_bytes += wide_size_of(entry.value)
        self._data_bytes += size_of(entry.value)
        self._order.insert(entry, before)
        return evicted

    def measure(self, *, every: bool = False) -> list[Entry]:
        """Count what plans hold by now, and return what left because that is above the limit.

        A plan gathers what it is used for (cut branches, masks, lowered forms) after it was taken in. One that was hit is measured again
        when its hits have doubled; with `every`, whenever it was hit.
        """
        grown = False
        for entry in self.entries.values():
            hits = entry.hits
            if entry.measured < hits if every else 2 * entry.measured < hits - 1 or entry.measured < 0:
                entry.measured = hits
                if grows(entry.value):
                    before, entry.nbytes = entry.nbytes, held_bytes(entry.value) + ENTRY_BYTES
                    self.nbytes += entry.nbytes - before
                    grown = True
        if grown:
            self._order.recount()
        evicted: list[Entry] = []
        while not self._fits(0, more=0):
            evicted.append(self._evict())
        return evicted

    def resize(self, max_size: int, hits: int, requests: int) -> list[Entry]:
        """Hold so many from now on, and return those that left."""
        evicted: list[Entry] = []
        while len(self.entries) > max_size:
            evicted.append(self._evict())
        self._set_size(max_size, hits, requests)
        return evicted

    def _set_size(self, max_size: int, hits: int, requests: int) -> None:
        if max_size != self.max_size:
            self.max_size, self._exact = max_size, False
            self._order.resize(max_size)
            self._hits_before, self._requests_before, self._looked_at = hits, requests, self.evictions

    def _is_due(self) -> bool:
        """Whether it is time to look at the hit curve: earlier it has seen too little."""
        grows = self.grow_to is not None and self.max_size < self.grow_to
        return grows and self.evictions - self._looked_at >= self.max_size

    def _fits(self, nbytes: int, more: int = 1) -> bool:
        in_bytes = self.max_bytes is None or self.nbytes + nbytes <= self.max_bytes
        return in_bytes and len(self.entries) + more <= self.max_size

    def _evict(self) -> Entry:
        entry = self._order.evict()
        del self.entries[entry.key]
        self.nbytes -= entry.nbytes
        self._wide_bytes -= wide_size_of(entry.value)
        self._data_bytes -= size_of(entry.value)
        self.evictions += 1
        return entry

    def curve(self, hits: int, requests: int) -> HitCurve:
        """The hit curve since the size last changed; `hits` and `requests` are the cache's since it was made."""
        ghosts = self._order.ghosts
        since = hits - self._hits_before, requests - self._requests_before
        return HitCurve.of_returns(self.max_size, ghosts.capacity, *since, ghosts.returns, self._exact)

    @property
    def compression(self) -> float:
        """Bytes of the values as if unpacked, over their bytes; 1.0 where there are none."""
        return self._wide_bytes / self._data_bytes if self._data_bytes else 1.0

    def check_valid(self) -> None:
        """Assert the invariants: bounded; bytes equal a recount; no entry is lost."""
        entries = self.entries.values()
        assert len(entries) <= self.max_size
        assert self.nbytes == sum(entry.nbytes for entry in entries)
        assert self._wide_bytes == sum(wide_size_of(entry.value) for entry in entries)
        assert self.max_bytes is None or self.nbytes <= self.max_bytes
        assert self.inserted == self.evictions + len(self.entries)
        assert sorted(map(id, self._order)) == sorted(map(id, entries))
        assert len(self._order.ghosts) <= self._order.ghosts.capacity
