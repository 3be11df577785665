"""`StreamingState`: the keys and values that a `StreamingAttention` holds, as a value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from longattn.attention.streaming.expiry import Positions
from longattn.attention.streaming.held_keys import HeldKeys, KeyPlacement
from longattn.attention.streaming.page_pool import PagePool
from longattn.attention.streaming.page_table import PageTable
from longattn.attention.streaming.serialization import from_dict, to_dict
from longattn.attention.validate import check_copies, check_integers, check_size, check_type, load_checked
from longattn.patterncache.spans import shortened


class StreamingState:
    """Keys and values of streams, one a row of the batch, in pages of a pool, whose buffers are of type CACHE of the global pool.

    1. `StreamingAttention` makes one, and calls with it advance it in place. A refused call leaves it as it was.
    2. A state holds the pages in which some slot is in use, and gives them back when it no longer exists. What it holds does not grow with the
       number of tokens, unless queries see keys without end.
    3. Rows stand at one position, or, after `split`, `admit` or a `rewind` by row, each at its own.
    4. States of one pool share pages after `clone`, `fork`, `reorder` and `admit`; who writes into a shared page copies it first.

    Attributes:
        pool: where its pages are. tables: what each row holds: one table for all rows, or one for each.
    """

    def __init__(self, pool: PagePool, kv_heads: int, batch_size: int, max_rewind: int) -> None:
        self.pool, self.kv_heads, self.batch_size, self.max_rewind = pool, kv_heads, batch_size, max_rewind
        self.widths, self.dtype, self.device, self.storage = pool.widths, pool.dtype, pool.device, pool.storage
        self.tables = [HeldKeys(kv_heads, 0, max_rewind)]
        self.page_table = PageTable(pool, batch_size, kv_heads)

    @property
    def uniform(self) -> bool:
        """Whether one table serves all rows."""
        return len(self.tables) == 1

    @property
    def capacity(self) -> int:
        """Slots of a head for which there is room in the tables; a page is taken when one of its slots is written."""
        return self.tables[0].slots.shape[1]

    @property
    def positions(self) -> list[int]:
        """Keys written so far, for each row of the batch."""
        return [table.position for table in self.tables] * (self.batch_size if self.uniform else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages that it holds, scales included; a page that several rows share counts once."""
        return self.page_table.nbytes

    def __repr__(self) -> str:
        at = self.positions[0] if len(set(self.positions)) == 1 else self.positions
        return (
            f"StreamingState(positions={at}, batch_size={self.batch_size}, dtype={self.dtype}, device='{self.device}')"
        )

    def positions_held(self, row: int = 0) -> list[list[int]]:
        """The positions whose keys a row of the batch holds, for each kv head, in order."""
        return self.tables[0 if self.uniform else self._row(row)].held()

    def split(self) -> StreamingState:
        """Give each row a table of its own, so that rows may go on alone. In place; returns the state."""
        if self.uniform and self.batch_size != 1:
            self.tables = [self.tables[0].clone() for _ in range(self.batch_size)]
        return self

    def settle(self) -> StreamingState:
        """One table for all rows, where those of all rows agree. In place; returns the state."""
        first, *others = self.tables
        if all(o.position == first.position and np.array_equal(o.slots, first.slots) for o in others):
            first.restorable = max(table.restorable for table in self.tables)
            self.tables = [first]
        return self

    def clear(self, row: int) -> StreamingState:
        """End the stream of a row: it is at position 0 again, and holds nothing. In place; returns the state."""
        row = self._row(row)
        self.split().tables[row] = HeldKeys(self.kv_heads, self.capacity, self.max_rewind)
        self.page_table.drop(row)
        return self

    @torch.no_grad()
    def admit(self, row: int, other: StreamingState, source: int = 0) -> StreamingState:
        """Put row `source` of another state in the place of a row of this one: of the same pool, by sharing pages. In place; returns the state.

        Raises:
            TypeError, ValueError: no state, one of other sizes, dtypes or devices, or no row of the batch. MemoryError: too few free pages in the pool.
        """
        check_type("other", other, StreamingState, "a StreamingState")
        for name in ("widths", "kv_heads", "max_rewind", "dtype", "device", "storage"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(
                    f"other must be a state with the {name} of this one, {getattr(self, name)}, got {getattr(other, name)}"
                )
        if self.pool.page_size != other.pool.page_size:
            raise ValueError(
                f"other must be a state with pages of {self.pool.page_size} slots, as this one, got {other.pool.page_size}"
            )
        row, source = self._row(row), other._row(source, "source")
        table = other.tables[0 if other.uniform else source].clone()
        self._reserve(table.used)
        table.slots, table.last = (x[:, : self.capacity] for x in (table.slots, table.last))
        table.grow(self.capacity)
        self.page_table.admit(row, other.page_table, source)
        self.split().tables[row] = table
        return self

    def reorder(self, index: Tensor | Sequence[int]) -> StreamingState:
        """Row b becomes what row index[b] was: beam search. In place, and the batch may change its size; returns the state.

        Raises:
            TypeError, ValueError: index is not a list of rows of the batch.
        """
        rows = [self._row(row, "index") for row in check_integers("index", index)]
        if not self.uniform and rows:
            self.tables = [self.tables[row].clone() for row in rows]
        self.batch_size = len(rows)
        self.page_table = self.page_table.select(rows)
        return self

    def clone(self) -> StreamingState:
        """A state of its own that goes on from here; it shares pages until one of the two writes into them."""
        copy = StreamingState(self.pool, self.kv_heads, self.batch_size, self.max_rewind)
        copy.tables = [table.clone() for table in self.tables]
        copy.page_table = self.page_table.select(range(self.batch_size))
        return copy

    def fork(self, copies: int) -> StreamingState:
        """A state of its own with each row of the batch `copies` times, neighbours alike.

        Raises:
            TypeError, ValueError: copies is not an integer >= 1, or too large.
        """
        check_copies(copies)
        return self.clone().reorder([row for row in range(self.batch_size) for _ in range(copies)])

    def rewind(self, tokens: int | Sequence[int]) -> StreamingState:
        """Forget the last tokens of all rows, or so many of each. In place; returns the state.

        Raises:
            TypeError, ValueError: no such number, more than were written, or than `max_rewind` lets come back.
        """
        if isinstance(tokens, int) and not isinstance(tokens, bool):
            amounts = [tokens] * len(self.tables)
        else:
            amounts = check_integers("tokens", tokens)
            if len(amounts) != self.batch_size:
                raise ValueError(
                    f"tokens must be one number or {self.batch_size}, one for each row, got {len(amounts)}"
                )
            if len(set(amounts)) > 1:
                self.split()
            amounts = amounts[: len(self.tables)]
        for table, amount in zip(self.tables, amounts, strict=True):
            most = table.position - table.restorable
            if not 0 <= amount <= most:
                raise ValueError(
                    f"tokens must be from 0 to {most}, those that can come back (max_rewind={self.max_rewind}), got {shortened(amount)}"
                )
        for table, amount in zip(self.tables, amounts, strict=True):
            table.rewind(table.position - amount)
        self.trim(None)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors, numbers and lists: what torch.load takes with weights_only=True."""
        return to_dict(self)

    def save(self, file: str | IO[bytes]) -> None:
        """Write the state to a file."""
        torch.save(self.state_dict(), file)

    @classmethod
    def load(cls, file: str | IO[bytes], map_location: torch.device | str | None = None) -> StreamingState:
        """A state that `save` wrote, on its device or on `map_location`. Raises as torch.load and `from_state_dict` do."""
        return cls.from_state_dict(load_checked(file, map_location))

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any]) -> StreamingState:
        """The state that `state_dict` described, in memory of its own.

        Raises:
            ValueError: a field is missing, unknown, of another type, out of range, or a tensor of another shape, dtype or device.
        """
        return from_dict(cls, saved)

    def __reduce__(self) -> tuple[Any, ...]:
        return StreamingState.from_state_dict, (self.state_dict(),)

    def __copy__(self) -> StreamingState:
        return self.clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamingState:
        return self.clone()

    def chosen(self, rows: list[int] | None) -> list[HeldKeys]:
        """The tables of some rows, in order; of all where None."""
        return self.tables if rows is None else [self.tables[row] for row in rows]

    def rows_of(self, rows: list[int] | None) -> Sequence[int]:
        """Rows by number; None: all."""
        return range(self.batch_size) if rows is None else rows

    @torch.no_grad()
    def write(self, rows: list[int] | None, k: Tensor, v: Tensor, last: Sequence[Positions]) -> None:
        """Take the next keys of rows (None: of all) in: k, v (rows, n, kv_heads, head_dim), with their last queries, one for each table.

        Raises:
            MemoryError: too few free pages in the pool. Nothing has changed.
        """
        tables, numbers = self.chosen(rows), self.rows_of(rows)
        self._reserve(max(table.needed(each) for table, each in zip(tables, last, strict=True)))
        placements = [table.placement(each) for table, each in zip(tables, last, strict=True)]
        self.page_table.write(numbers, placements)
        for index, (table, each, placement) in enumerate(zip(tables, last, placements, strict=True)):
            table.place(placement, each)
            part = slice(None) if self.uniform else slice(index, index + 1)
            slots = self.page_table.slots(numbers[part], placement.head, placement.slot)
            at, token, head = (torch.as_tensor(x, device=self.device) for x in (slots, placement.token, placement.head))
            for buffer, new in ((self.pool.keys, k), (self.pool.values, v)):
                buffer.put(at, new[part][:, token, head])

    def trim(self, rows: list[int] | None) -> None:
        """Give back the pages of rows (None: of all) in which no slot is in use."""
        occupied = [table.occupied(self.pool.page_size) for table in self.chosen(rows)]
        self.page_table.trim(self.rows_of(rows), np.stack(occupied))

    def read(self, rows: list[int] | None, used: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first slots of rows, (rows, used, kv_heads, head_dim), copied together."""
        slots = self.slots_to(used, rows)
        keys, values = (x.read(slots).transpose(1, 2) for x in (self.pool.keys, self.pool.values))
        return keys, values

    def slots_to(self, used: int, rows: list[int] | None = None) -> Tensor:
        """(rows, kv_heads, used): where the first slots of each head lie. Those of pages that are not there are the pool's first."""
        head, slot = np.indices((self.kv_heads, used))
        numbers = self.rows_of(rows)
        slots = self.page_table.slots(numbers, head.reshape(-1), slot.reshape(-1))
        return torch.as_tensor(slots.reshape(len(numbers), *head.shape).clip(0), device=self.device)

    @torch.no_grad()
    def fill_slots(self, used: int, keys: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        """Put what was saved, (batch, kv_heads, used, width), into the first slots of a new state, whose tables say which are in use."""
        self._reserve(used)
        head, slot = (x.reshape(-1) for x in np.indices((self.kv_heads, used)))
        self.page_table.write(range(self.batch_size), [KeyPlacement(head, slot, slot)])
        slots = self.slots_to(used)
        for buffer, saved in ((self.pool.keys, keys), (self.pool.values, values)):
            for name, part in buffer.parts.items():
                part.flatten(0, 1)[slots] = saved[name]
        self.trim(None)

    def _reserve(self, slots: int) -> None:
        """Room in the tables for so many slots of each head at least."""
        size, capacity = self.pool.page_size, self.capacity
        if slots > capacity:
            capacity = -(-max(slots, min(2 * capacity, slots + slots // 8)) // size) * size
        for table in self.tables:
            table.grow(-(-capacity // size) * size)
        self.page_table.grow(self.capacity)

    def _row(self, row: int, name: str = "row") -> int:
        if check_size(name, row, least=0) >= self.batch_size:
            raise ValueError(
                f"{name} must be from 0 to {self.batch_size - 1}, a row of the batch, got {shortened(row)}"
            )
        return row
