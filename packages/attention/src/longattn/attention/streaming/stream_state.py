"""`StreamingState`: the keys and values that a `StreamingAttention` holds, as a value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from longattn.attention.streaming.expiry import Positions
from longattn.attention.streaming.held_keys import HeldKeys, KeyPlacement
from longattn.attention.streaming.slot_buffer import LARGEST, SlotBuffer, Storage
from longattn.attention.validate import integers, load_checked
from longattn.kernels.interface import FLOATS, dtype_name

FORMAT = 1
_GRAIN = 64
"""Slots: capacities are multiples of it."""


class StreamingState:
    """Keys and values of streams, one a row of the batch, in buffers of type CACHE of the global pool.

    1. `StreamingAttention` makes one, and calls with it advance it in place. A refused call leaves it as it was.
    2. Buffers grow to what the pattern needs at once, and not with the number of tokens, unless queries see keys without end.
    3. Rows stand at one position, or, after `split`, `admit` or a `rewind` by row, each at its own.

    Attributes:
        tables: what each row holds: one table for all rows, or one for each.
    """

    def __init__(
        self,
        widths: tuple[int, int],
        kv_heads: int,
        batch_size: int,
        max_rewind: int,
        dtype: torch.dtype,
        device: torch.device,
        storage: Storage | None = None,
    ) -> None:
        self.widths, self.kv_heads, self.batch_size = widths, kv_heads, batch_size
        self.max_rewind, self.dtype, self.device, self.storage = max_rewind, dtype, device, storage
        self.tables = [HeldKeys(kv_heads, 0, max_rewind)]
        self.keys, self.values = (
            SlotBuffer((batch_size, kv_heads, 0, width), dtype, device, storage) for width in widths
        )

    @property
    def uniform(self) -> bool:
        """Whether one table serves all rows."""
        return len(self.tables) == 1

    @property
    def capacity(self) -> int:
        """Slots of a head."""
        return self.keys.numbers.shape[2]

    @property
    def positions(self) -> list[int]:
        """Keys written so far, for each row of the batch."""
        return [table.position for table in self.tables] * (self.batch_size if self.uniform else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, scales included."""
        return self.keys.nbytes + self.values.nbytes

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
        self.split().tables[self._row(row)] = HeldKeys(self.kv_heads, self.capacity, self.max_rewind)
        return self

    @torch.no_grad()
    def admit(self, row: int, other: StreamingState, source: int = 0) -> StreamingState:
        """Put row `source` of another state in the place of a row of this one. In place; returns the state.

        Raises:
            ValueError: states of other sizes, dtypes or devices.
        """
        for name in ("widths", "kv_heads", "max_rewind", "dtype", "device", "storage"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(
                    f"other must be a state with the {name} of this one, {getattr(self, name)}, got {getattr(other, name)}"
                )
        table = other.tables[0 if other.uniform else other._row(source)].clone()
        self._reserve(table.used)
        table.slots, table.last = (x[:, : min(self.capacity, x.shape[1])] for x in (table.slots, table.last))
        table.grow(self.capacity)
        row = self._row(row)
        self.split().tables[row] = table
        used = table.used
        here, there = (row, slice(None), slice(used)), (other._row(source), slice(None), slice(used))
        self.keys.copy_from(other.keys, here, there)
        self.values.copy_from(other.values, here, there)
        return self

    @torch.no_grad()
    def reorder(self, index: Tensor | Sequence[int]) -> StreamingState:
        """Row b becomes what row index[b] was: beam search. In place, and the batch may change its size; returns the state.

        Raises:
            ValueError: index does not name rows of the batch.
        """
        listed = integers(index) if isinstance(index, Tensor) else list(index)
        rows = [self._row(row) for row in listed]
        select = torch.tensor(rows, dtype=torch.int64, device=self.device)
        if not self.uniform and rows:
            self.tables = [self.tables[row].clone() for row in rows]
        self.batch_size = len(rows)
        self._replace(self.batch_size, self.capacity, (), select)
        return self

    def clone(self) -> StreamingState:
        """A copy that shares nothing."""
        copy = StreamingState.__new__(StreamingState)
        copy.__dict__.update(self.__dict__)
        copy.tables = [table.clone() for table in self.tables]
        copy._replace(self.batch_size, self.capacity, (), ())
        return copy

    def fork(self, copies: int) -> StreamingState:
        """A state of its own with each row of the batch `copies` times, neighbours alike."""
        return self.clone().reorder([row for row in range(self.batch_size) for _ in range(copies)])

    def rewind(self, tokens: int | Sequence[int]) -> StreamingState:
        """Forget the last tokens of all rows, or so many of each. In place; returns the state.

        Raises:
            ValueError: more than were written, or than `max_rewind` lets come back.
        """
        if isinstance(tokens, int):
            amounts = [tokens] * len(self.tables)
        else:
            amounts = list(tokens)
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
                    f"tokens must be from 0 to {most}, those that can come back (max_rewind={self.max_rewind}), got {amount}"
                )
        for table, amount in zip(self.tables, amounts, strict=True):
            table.rewind(table.position - amount)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors, numbers and lists: what torch.load takes with weights_only=True."""
        used = max(table.used for table in self.tables)
        return {
            "format": FORMAT,
            "widths": list(self.widths),
            "kv_heads": self.kv_heads,
            "batch_size": self.batch_size,
            "max_rewind": self.max_rewind,
            "dtype": dtype_name(self.dtype),
            "tables": [
                {
                    "position": table.position,
                    "restorable": table.restorable,
                    "slots": torch.tensor(table.slots[:, :used]),
                    "last": torch.tensor(table.last[:, :used]),
                }
                for table in self.tables
            ],
            "storage": self.storage,
            "keys": {name: part[:, :, :used].clone() for name, part in self.keys.parts.items()},
            "values": {name: part[:, :, :used].clone() for name, part in self.values.parts.items()},
        }

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
            ValueError: a field is missing, or does not fit the others.
        """
        names = {
            "format",
            "widths",
            "kv_heads",
            "batch_size",
            "max_rewind",
            "dtype",
            "storage",
            "tables",
            "keys",
            "values",
        }
        if not isinstance(saved, dict) or set(saved) != names or saved["format"] != FORMAT:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"saved must be a mapping of format {FORMAT} with {sorted(names)}, got {sorted(saved)}")
        batch, heads, storage = saved["batch_size"], saved["kv_heads"], saved["storage"]
        dtypes = {dtype_name(dtype): dtype for dtype in FLOATS}
        if storage not in (None, *LARGEST) or saved["dtype"] not in dtypes:
            raise ValueError(
                f"saved must have a storage among None, {', '.join(LARGEST)} and a dtype among {', '.join(dtypes)}, "
                f"got {storage!r} and {saved['dtype']!r}"
            )
        tables: Any = saved["tables"]
        if not isinstance(tables, list) or len(tables) not in (1, batch):  # pyright: ignore[reportUnknownArgumentType]
            raise ValueError(f"saved['tables'] must be a list of 1 or {batch} tables, got another")
        numbers = saved["keys"]["numbers"]
        used = numbers.shape[2] if isinstance(numbers, Tensor) and numbers.dim() == 4 else 0
        widths: Any = tuple(saved["widths"])
        state = cls(widths, heads, batch, saved["max_rewind"], dtypes[saved["dtype"]], numbers.device, storage)
        listed = cast("list[dict[str, Any]]", tables)
        state.tables = [_table(entries, heads, used, saved["max_rewind"]) for entries in listed]
        state._reserve(used)
        for name, buffer in (("keys", state.keys), ("values", state.values)):
            for part, target in buffer.parts.items():
                shape, given = (batch, heads, used, target.shape[3]), saved[name].get(part)
                if not isinstance(given, Tensor) or given.shape != shape or given.dtype != target.dtype:
                    raise ValueError(
                        f"saved[{name!r}][{part!r}] must be a {dtype_name(target.dtype)} tensor {shape}, got another"
                    )
                target[:, :, :used] = given
        return state

    def __reduce__(self) -> tuple[Any, ...]:
        return StreamingState.from_state_dict, (self.state_dict(),)

    def __copy__(self) -> StreamingState:
        return self.clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamingState:
        return self.clone()

    def chosen(self, rows: list[int] | None) -> list[HeldKeys]:
        """The tables of some rows, in order; of all where None."""
        return self.tables if rows is None else [self.tables[row] for row in rows]

    @torch.no_grad()
    def write(self, rows: list[int] | None, k: Tensor, v: Tensor, last: Sequence[Positions]) -> None:
        """Take the next keys of rows (None: of all) in: k, v (rows, n, kv_heads, head_dim), with their last queries, one for each table."""
        tables = self.chosen(rows)
        self._reserve(max(table.needed(each) for table, each in zip(tables, last, strict=True)))
        for index, (table, each) in enumerate(zip(tables, last, strict=True)):
            self._put(
                slice(None) if self.uniform else [index, index if rows is None else rows[index]],
                table.place(each),
                k,
                v,
            )

    def _put(self, row: Any, placement: KeyPlacement, k: Tensor, v: Tensor) -> None:
        """Copy keys and values of the call's row into their slots: of all rows at once, or row[0] of the call into row[1]."""
        head, slot, token = (torch.as_tensor(x, device=self.device) for x in placement)
        for buffer, new in ((self.keys, k), (self.values, v)):
            if isinstance(row, slice):
                buffer.put((row, head, slot), new[:, token, head])
            else:
                buffer.put((row[1], head, slot), new[row[0], token, head])

    def _reserve(self, slots: int) -> None:
        """So many slots for each head at least."""
        if slots > self.capacity:
            capacity = -(-max(slots, min(2 * self.capacity, slots + slots // 8)) // _GRAIN) * _GRAIN
            old = (slice(None), slice(None), slice(self.capacity))
            self._replace(self.batch_size, capacity, old, old)
        for table in self.tables:
            table.grow(self.capacity)

    @torch.no_grad()
    def _replace(self, batch: int, slots: int, here: Any, there: Any) -> None:
        """New buffers, of another size, with what the old ones have at index `there` at index `here`."""
        for name in ("keys", "values"):
            old: SlotBuffer = getattr(self, name)
            new = old.like(batch, slots)
            new.copy_from(old, here, there)
            setattr(self, name, new)

    def _row(self, row: int) -> int:
        if not 0 <= row < self.batch_size:
            raise ValueError(f"row must be from 0 to {self.batch_size - 1}, a row of the batch, got {row}")
        return row


def _table(entries: dict[str, Any], kv_heads: int, used: int, max_rewind: int) -> HeldKeys:
    """The table that `state_dict` described."""
    table = HeldKeys(kv_heads, used, max_rewind)
    table.position, table.restorable = entries["position"], entries["restorable"]
    for name in ("slots", "last"):
        if entries[name].shape != (kv_heads, used):
            raise ValueError(f"saved['tables'] must have {name} {(kv_heads, used)}, got {tuple(entries[name].shape)}")
    table.slots, table.last = entries["slots"].numpy().copy(), entries["last"].numpy().copy()
    if (table.slots >= table.position).any():
        raise ValueError(f"saved['tables'] must hold positions below {table.position}, got {int(table.slots.max())}")
    return table
