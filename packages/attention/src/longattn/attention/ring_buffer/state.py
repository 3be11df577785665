"""`RingBufferState`: the memory of a ring-buffer attention, as a value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any, cast

import torch
from torch import Tensor

from longattn.attention.ring_buffer import serialization
from longattn.attention.ring_buffer.cursor import Cursor
from longattn.attention.ring_buffer.rings import Geometry, Rings
from longattn.attention.validate import check_copies, check_device, check_integers, load_checked
from longattn.patterncache.spans import shortened

File = str | IO[bytes]


class RingBufferState(Rings):
    """The memory of a ring-buffer attention: three rings of constant size, and how far each row of the batch is.

    1. A module makes it at position 0, or `load` brings one back. It belongs to the module that first uses it.
    2. Calls with it advance it in place. A call that is refused leaves it as it was. Memory does not grow with the number of calls.
    3. `rewind` steps back; `reorder` picks rows of the batch; both in place, and both return the state.
    4. `clone`, `fork`, `cat`, `to`, pickle and `save` make copies that share nothing. Gradients reach earlier calls through `clone`
       and `reorder` only. A copy from pickle or `load` belongs to the module that first uses it.

    Rows of the batch may stand at different positions, after a `rewind` by row or a `cat`.

    Attributes:
        owner: the name of the module it belongs to, or None.
    """

    def __init__(self, geometry: Geometry, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(geometry, batch_size, dtype, device)
        self.owner: str | None = None

    @property
    def positions(self) -> list[int]:
        """Tokens written so far, for each row of the batch."""
        return [c.position for c in self.cursors] * (self.batch_size if self.uniform else 1)

    @property
    def position(self) -> int | list[int]:
        """Tokens written so far: one number where all rows of the batch agree, else one for each."""
        return self.cursors[0].position if self.uniform else self.positions

    @property
    def write_pointers(self) -> list[int]:
        """The slot of the next token, for each row of the batch; the first slots are those of the sinks."""
        return [self.kv.main.slot(p) for p in self.positions]

    @property
    def read_pointers(self) -> list[int]:
        """The slot of the oldest token past the sinks, for each row of the batch."""
        return [self.kv.main.slot(self.kv.needs(p)) for p in self.positions]

    @property
    def nbytes(self) -> int:
        """Bytes of all rings but the backward one."""
        rings = [self.kv.main, self.kv.evicted, self.outputs]
        rings += [] if self.hidden is None else [self.hidden.main, self.hidden.evicted]
        return sum(ring.storage.nbytes for ring in rings if ring is not None)

    def __repr__(self) -> str:
        return f"RingBufferState(position={self.position}, batch_size={self.batch_size}, dtype={self.dtype}, device='{self.device}')"

    @property
    def feedback_held(self) -> int:
        """How many of the last outputs `feedback` can return, in the row of the batch that has fewest."""
        capacity = self.geometry.buffer_size
        return min(max(0, c.fed - max(c.fed_restorable, c.fed - capacity)) for c in self.cursors)

    def feedback(self, n: int = 1) -> Tensor:
        """The last n decoded outputs (batch, n, num_heads, value_head_dim), oldest first.

        Raises:
            ValueError: the feedback ring does not hold so many.
        """
        available, g = self.feedback_held, self.geometry
        if isinstance(n, bool) or not isinstance(cast(object, n), int) or not 0 <= n <= available:
            raise ValueError(
                f"n must be an integer from 0 to {available}, the outputs that the feedback ring holds, got {shortened(n)}"
            )
        if self.outputs is None:
            return torch.empty(self.batch_size, 0, g.num_heads, g.value_head_dim, dtype=self.dtype, device=self.device)
        rows: list[Tensor] = []
        for index, cursor in enumerate(self.cursors):
            ring = self.outputs if self.uniform else self.outputs.of(slice(index, index + 1))
            runs = [ring.read(run)[0] for run in ring.runs(cursor.fed - n, cursor.fed)]
            rows.append(torch.cat(runs or [ring.planes[0][:, :, :0]], 2))
        return torch.cat(rows).transpose(1, 2)

    @torch.no_grad()
    def rewind(self, tokens: int | Sequence[int] | Tensor) -> RingBufferState:
        """Forget the last tokens, as if they had never come: speculative decoding. In place; returns the state.

        Outputs decoded for them leave the feedback ring. Padding that calls gave to older tokens stays.

        Args:
            tokens: how many, for all rows of the batch or for each.

        Raises:
            TypeError, ValueError: no such number, more than were written, or more than `max_rewind` lets come back.
        """
        amounts = self._amounts(tokens)
        for index, n in enumerate(amounts):
            self._check_rewind(self.cursors[0 if self.uniform else index], n)
        if len(set(amounts)) == 1 and self.uniform:
            amounts = amounts[:1]
        elif self.uniform:
            self.cursors = [self.cursors[0].clone() for _ in amounts]
        for index, (cursor, n) in enumerate(zip(self.cursors, amounts, strict=True)):
            rows = slice(None) if self.uniform else slice(index, index + 1)
            for ring in (self.kv, self.hidden):
                if ring is not None:
                    ring.of(rows).rewind(cursor.position, cursor.position - n)
            cursor.rewind(n, self.geometry.buffer_size, self.geometry.max_rewind)
        self.settle()
        if self.uniform:
            self.backward.rewind(self.cursors[0].position)
        else:
            self.backward.segments.clear()
        return self

    def reorder(self, index: Tensor | Sequence[int]) -> RingBufferState:
        """Row b becomes what row index[b] was: beam search. In place, and the batch may change its size; returns the state.

        Raises:
            TypeError, ValueError: index is not a list of rows of the batch.
        """
        rows = check_integers("index", index)
        if any(not 0 <= row < self.batch_size for row in rows):
            raise ValueError(f"index must name rows from 0 to {self.batch_size - 1}, got {rows}")
        size = self.batch_size
        row_index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        with torch.no_grad():
            self.kv = self.kv.map(lambda ring: ring.taken(row_index))
            self.hidden = None if self.hidden is None else self.hidden.map(lambda ring: ring.taken(row_index))
            self.outputs = None if self.outputs is None else self.outputs.taken(row_index)
        unchanged = rows == list(range(size))
        self.backward = self.backward.clone() if unchanged else self.backward.taken(row_index)
        if not self.uniform:
            self.cursors = [self.cursors[row].clone() for row in rows] or self.cursors[:1]
            self.settle()
        return self

    def fork(self, copies: int = 1) -> RingBufferState:
        """A state of its own with each row of the batch `copies` times, neighbours alike: the beams of each prompt.

        Raises:
            TypeError, ValueError: copies is not an integer >= 1, or too large.
        """
        check_copies(copies)
        copy = self.alias()
        copy.cursors = [cursor.clone() for cursor in self.cursors]
        return copy.reorder([row for row in range(self.batch_size) for _ in range(copies)])

    def clone(self) -> RingBufferState:
        """A copy that shares nothing but the graph of earlier calls."""
        return self.fork()

    def detach(self) -> RingBufferState:
        """Let no gradient flow into calls before now. In place; returns the state."""
        self.backward.segments.clear()
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> RingBufferState:
        """A copy on another device, or in another floating dtype; the state itself where nothing changes.

        Raises:
            ValueError: the dtype is not a floating one that attention takes.
        """
        target_device = self.device if device is None else torch.empty(0, device=check_device(device)).device
        target_dtype = self.dtype if dtype is None else dtype
        if (target_device, target_dtype) == (self.device, self.dtype):
            return self
        moved = serialization.from_dict(RingBufferState, serialization.to_dict(self), target_device, target_dtype)
        moved.owner = self.owner
        return moved

    @staticmethod
    def cat(states: Sequence[RingBufferState]) -> RingBufferState:
        """The rows of several states as one batch, each row at its own position: continuous batching. A copy.

        States that were loaded, and belong to no module yet, join those of any.

        Raises:
            TypeError, ValueError: no states, or states of different modules, dtypes or devices.
        """
        return serialization.cat(states)

    def state_dict(self) -> dict[str, Any]:
        """Everything but gradients, as tensors, numbers and lists: what torch.load takes with weights_only=True."""
        return serialization.to_dict(self)

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any]) -> RingBufferState:
        """A state from `state_dict`. It belongs to the module that first uses it.

        Raises:
            ValueError: a field is missing, unknown, or not of the type, range or shape that the others say. `saved` may come from
                anywhere.
        """
        return serialization.from_dict(cls, saved)

    def save(self, file: File) -> None:
        """Write the state to a file, without gradients."""
        torch.save(self.state_dict(), file)

    @classmethod
    def load(cls, file: File, map_location: torch.device | str | None = None) -> RingBufferState:
        """A state that `save` wrote, on its device or on `map_location`. Raises as torch.load and `from_state_dict` do."""
        return cls.from_state_dict(load_checked(file, map_location))

    def __reduce__(self) -> tuple[Any, ...]:
        return serialization.from_dict, (RingBufferState, self.state_dict())

    def __copy__(self) -> RingBufferState:
        return self.clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> RingBufferState:
        return self.clone()

    def _amounts(self, tokens: object) -> list[int]:
        if isinstance(tokens, int) and not isinstance(tokens, bool):
            return [tokens] * self.batch_size
        amounts = check_integers("tokens", tokens)
        if len(amounts) == 1:
            amounts *= self.batch_size
        if len(amounts) != self.batch_size:
            raise ValueError(
                f"tokens must be one number or {self.batch_size}, one for each row of the batch, got {len(amounts)}"
            )
        return amounts

    def _check_rewind(self, cursor: Cursor, n: int) -> None:
        if not 0 <= n <= cursor.position:
            raise ValueError(
                f"tokens must be from 0 to {cursor.position}, the tokens written so far, got {shortened(n)}"
            )
        g = self.geometry
        restorable = max(cursor.restorable, cursor.position - g.buffer_size - g.max_rewind)
        earlier, moved_on = cursor.position - n, cursor.position - g.buffer_size
        if self.kv.needs(earlier) < min(restorable, moved_on, earlier):
            limit = cursor.position - g.buffer_size - restorable
            raise ValueError(
                f"tokens must be at most {limit} here, because tokens that older ones left the window for cannot all come back "
                f"(max_rewind={g.max_rewind}), got {shortened(n)}"
            )
