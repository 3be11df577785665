"""`PageTable`: which pages of a pool hold the slots of each row and kv head of a state."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from longattn.attention.streaming.expiry import Positions
from longattn.attention.streaming.held_keys import KeyPlacement
from longattn.attention.streaming.page_pool import PagePool, Pages


class PageTable:
    """Slot s of a kv head lies in its page s // page_size; -1: that page is not there. Pages are given back when the table is no longer referenced."""

    def __init__(self, pool: PagePool, batch_size: int, kv_heads: int) -> None:
        self.pool = pool
        self._held: list[Pages] = [np.full((batch_size, kv_heads, 0), -1, np.int32)]
        weakref.finalize(self, _give_back, pool, self._held).atexit = False

    @property
    def pages(self) -> Pages:
        """(batch, kv_heads, n) int32."""
        return self._held[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the pages that are there, a shared one once."""
        return len(np.unique(self.pages[self.pages >= 0])) * self.pool.page_nbytes

    def grow(self, slots: int) -> None:
        """Room for so many slots of a head, without pages."""
        more = slots // self.pool.page_size - self.pages.shape[2]
        if more > 0:
            self._held[0] = np.pad(self.pages, ((0, 0), (0, 0), (0, more)), constant_values=-1)

    def write(self, rows: Sequence[int], placements: Sequence[KeyPlacement]) -> None:
        """Give each row pages of its own under the slots of its placement (one for all rows, or one for each): new ones, or copies.

        Raises:
            MemoryError: as `PagePool.ensure`; nothing has changed.
        """
        if len(placements) == 1:
            placements = list(placements) * len(rows)
        size, width = self.pool.page_size, self.pages.shape[2]
        at: list[Positions] = []
        for row, placement in zip(rows, placements, strict=True):
            touched = np.unique(placement.head * width + placement.slot // size)
            at.append(row * self.pages.shape[1] * width + touched)
        flat = np.concatenate(at) if at else np.zeros(0, np.int64)
        pages = self.pages.reshape(-1)[flat]
        shared, writers = np.unique(pages[pages >= 0], return_counts=True)
        # The last who holds a page writes into it.
        copies = np.minimum(writers, self.pool.holders(shared) - 1)
        fresh = pages < 0
        if not fresh.any() and not copies.any():
            return
        self.pool.ensure(int(fresh.sum() + copies.sum()))
        table = self.pages.reshape(-1)
        table[flat[fresh]] = self.pool.take(int(fresh.sum()))
        for index in range(len(shared) if copies.any() else 0):
            copied = np.repeat(shared[index : index + 1], copies[index])
            table[flat[pages == shared[index]][: len(copied)]] = self.pool.copy(copied)
            self.pool.release(copied)

    def slots(self, rows: Sequence[int], head: Positions, slot: Positions) -> Positions:
        """(rows, n): where slots of heads lie, numbered through all pages of the pool."""
        size = self.pool.page_size
        pages = self.pages[np.asarray(rows, np.int64)[:, None], head, slot // size].astype(np.int64)
        return pages * size + slot % size

    def trim(self, rows: Sequence[int], occupied: npt.NDArray[np.bool_]) -> None:
        """Give back the pages of rows in which no slot is in use; occupied: (kv_heads, n), or (rows, kv_heads, n)."""
        index = np.asarray(rows, np.int64)
        idle = (self.pages[index] >= 0) & ~occupied
        if idle.any():
            chosen = self.pages[index]
            self.pool.release(chosen[idle])
            chosen[idle] = -1
            self.pages[index] = chosen

    def select(self, rows: Sequence[int]) -> PageTable:
        """A table of these rows, which shares their pages."""
        table = PageTable(self.pool, 0, self.pages.shape[1])
        table._held[0] = self.pages[np.asarray(rows, np.int64)]
        self.pool.share(table.pages[table.pages >= 0])
        return table

    def admit(self, row: int, other: PageTable, source: int) -> None:
        """The pages of row `source` of another table in place of a row's: shared, or copied from another pool. Grown before.

        Raises:
            MemoryError: as `PagePool.ensure`; nothing has changed.
        """
        pages = other.pages[source][:, : self.pages.shape[2]]
        there = pages >= 0
        if other.pool is self.pool:
            taken = pages[there]
            self.pool.share(taken)
        else:
            taken = self.pool.copy(pages[there], other.pool)
        self.drop(row)
        new = self.pages[row, :, : pages.shape[1]]
        new[there] = taken

    def drop(self, row: int) -> None:
        """Give back all pages of a row."""
        pages = self.pages[row]
        self.pool.release(pages[pages >= 0])
        pages[:] = -1

    def shared_pages(self, rows: Sequence[int]) -> int:
        """How many first pages of each head are the same ones, and there, in all these rows."""
        pages = self.pages[np.asarray(rows, np.int64)]
        same = ((pages == pages[:1]) & (pages >= 0)).all((0, 1))
        return len(same) if same.all() else int(same.argmin())


def _give_back(pool: PagePool, held: list[Pages]) -> None:
    pool.release(held[0][held[0] >= 0])
