"""`Ghosts`: the keys that were evicted, remembered for a while without their values."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable

REMEMBERED = 10
"""Evicted keys that are remembered, over the entries that there is room for."""


class Ghosts:
    """The keys that were evicted last, newest last, as hashes: two keys of one hash pass for one, which costs a wrong guess at most.

    Attributes:
        capacity: keys remembered at most: ten times the entries that there is room for.
        returns: how many keys came back, by their place counted from the newest (1 is the newest).
    """

    def __init__(self, max_size: int) -> None:
        self.capacity = REMEMBERED * max_size
        self.returns: Counter[int] = Counter()
        self._marks: dict[int, tuple[int, int]] = {}
        self._order: list[int] = []
        self._next = 0

    def __len__(self) -> int:
        return len(self._order)

    def add(self, key: Hashable, frequency: int = 1) -> None:
        """`key`, asked for so often, has just been evicted."""
        mark = hash(key)
        if mark in self._marks:
            self._forget(mark)
        self._marks[mark] = (self._next, frequency)
        self._order.append(self._next)
        self._next += 1
        if len(self._order) > self.capacity:
            self._forget(next(iter(self._marks)))

    def recall(self, key: Hashable) -> int:
        """How often `key` was asked for, 0 where that is not remembered. It is forgotten by this, and its place is noted."""
        mark = hash(key)
        if mark not in self._marks:
            return 0
        frequency = self._marks[mark][1]
        self.returns[len(self._order) - self._forget(mark)] += 1
        return max(1, frequency)

    def resize(self, max_size: int) -> None:
        """There is room for so many entries from now on; what came back so far is not counted any more."""
        self.capacity = REMEMBERED * max_size
        self.returns = Counter()
        while len(self._order) > self.capacity:
            self._forget(next(iter(self._marks)))

    def halve(self) -> None:
        """Frequencies are half of what they were."""
        self._marks = {mark: (serial, frequency // 2) for mark, (serial, frequency) in self._marks.items()}

    def _forget(self, mark: int) -> int:
        # Serials only grow, so `_order` is sorted, and a dict keeps the same order as long as nothing is written over.
        index = bisect_left(self._order, self._marks.pop(mark)[0])
        del self._order[index]
        return index
