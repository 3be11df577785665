"""`HeldKeys`: which slots of a stream's buffers hold which positions, for each kv head. Numbers on the host, no tensors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from longattn.attention.streaming.expiry import Positions


class KeyPlacement(NamedTuple):
    """Where keys of a call go: key `token[n]` of kv head `head[n]` to slot `slot[n]`."""

    head: Positions
    slot: Positions
    token: Positions


class HeldKeys:
    """One stream's table of slots.

    Invariants: a slot holds a position below `position`, or -1; no position stands in two slots of a head; what is held is what a query at
    `position - max_rewind` or later sees.

    Attributes:
        slots: (kv_heads, capacity) int64, the position in each slot, -1: free. last: the last query that sees it, by `ExpiryTable`.
        position: keys written so far. restorable: the least position that a rewind may go back to.
    """

    def __init__(self, kv_heads: int, capacity: int, max_rewind: int) -> None:
        self.slots = np.full((kv_heads, capacity), -1, np.int64)
        self.last = np.full((kv_heads, capacity), -1, np.int64)
        self.max_rewind = max_rewind
        self.position = self.restorable = 0

    def clone(self) -> HeldKeys:
        """A copy that shares nothing."""
        copy = HeldKeys(0, 0, self.max_rewind)
        copy.slots, copy.last = self.slots.copy(), self.last.copy()
        copy.position, copy.restorable = self.position, self.restorable
        return copy

    def occupied(self, page_size: int) -> npt.NDArray[np.bool_]:
        """(kv_heads, capacity / page_size): the pages in which a slot is in use."""
        return np.any((self.slots >= 0).reshape(len(self.slots), -1, page_size), axis=-1)

    def restore(self, other: HeldKeys) -> None:
        """Be what another table is; it is taken over."""
        width = self.slots.shape[1]
        self.__dict__.update(other.__dict__)
        self.grow(width)

    @property
    def used(self) -> int:
        """Slots up to the last one in use."""
        return 1 + int((self.slots >= 0).nonzero()[1].max(initial=-1))

    def held(self) -> list[list[int]]:
        """The positions that are held, for each kv head, in order."""
        return [sorted(row[row >= 0].tolist()) for row in self.slots]

    def grow(self, capacity: int) -> None:
        """More slots, free ones."""
        more = ((0, 0), (0, capacity - self.slots.shape[1]))
        if more[1][1]:
            self.slots, self.last = (np.pad(table, more, constant_values=-1) for table in (self.slots, self.last))

    def needed(self, last: Positions) -> int:
        """Slots that a head needs once the next keys, with these last queries (kv_heads, n), are placed."""
        return int(((self.slots >= 0).sum(axis=1) + self._stays(last).sum(axis=1)).max(initial=0))

    def placement(self, last: Positions) -> KeyPlacement:
        """Where the next keys would go: those that some query to come sees, to the first free slots of their head, which must be enough."""
        stays = self._stays(last)
        heads: list[Positions] = []
        places: list[Positions] = []
        tokens: list[Positions] = []
        for head, row in enumerate(self.slots):
            token = stays[head].nonzero()[0]
            heads.append(np.full(len(token), head, np.int64))
            places.append((row < 0).nonzero()[0][: len(token)])
            tokens.append(token)
        return KeyPlacement(*(np.concatenate(parts) for parts in (heads, places, tokens)))

    def place(self, placement: KeyPlacement, last: Positions) -> None:
        """Take the next keys in where `placement` says."""
        head, slot, token = placement
        self.slots[head, slot], self.last[head, slot] = self.position + token, last[head, token]
        self.position += last.shape[1]

    def evict(self, position: int) -> None:
        """Free the slots of keys that no query from `position` on sees, nor one that a rewind from there could bring back."""
        self.restorable = max(self.restorable, position - self.max_rewind)
        self.slots[self.last < self.restorable] = -1
        self.last[self.slots < 0] = -1

    def rewind(self, position: int) -> None:
        """Back to `position` keys, not below `restorable`."""
        self.slots[self.slots >= position] = -1
        self.last[self.slots < 0] = -1
        self.position = position

    def _stays(self, last: Positions) -> np.ndarray:
        """Which of the next keys are seen by their own query or a later one that is wanted: (kv_heads, n) bool."""
        after = self.position + last.shape[1]
        return last >= max(self.restorable, after - max(1, self.max_rewind))
