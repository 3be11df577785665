"""`Rings`: the three rings of a ring-buffer attention, their cursors, and how calls change them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from longattn.attention.ring_buffer.backward_ring import BackwardRing, GradientSegment
from longattn.attention.ring_buffer.cursor import Cursor
from longattn.attention.ring_buffer.linear_ring import LinearRing, SlotRun
from longattn.attention.ring_buffer.window_ring import WindowRing


@dataclass(frozen=True)
class Geometry:
    """The sizes that a state and its module share. head_dim is of q and k, value_head_dim of v and the output."""

    num_heads: int
    kv_heads: int
    head_dim: int
    buffer_size: int
    sinks: int
    max_rewind: int
    bptt_calls: int
    value_head_dim: int


class Rings:
    """The rings of keys and values, of those that carry gradients, and of outputs; and how far each row of the batch is.

    Invariants: there is one cursor, or one for each row of the batch. Slots of a row that hold nothing are zero where another row's
    slots of that number hold something. Keys and values of padding are zero.

    Args:
        geometry: sizes. batch_size: rows of the batch. dtype, device: of all rings.

    Attributes:
        kv: the forward ring, planes keys and values. hidden: which tokens are padding, or None: none was ever given.
        outputs: the feedback ring, or None: nothing was decoded. backward: the backward ring.
        cursors: one for each row of the batch, or one for all.
    """

    def __init__(self, geometry: Geometry, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.geometry, self.dtype, self.device = geometry, dtype, device
        g = geometry
        widths = (g.head_dim, g.value_head_dim)
        sizes = (g.kv_heads, g.buffer_size, max(widths), dtype, device)
        self.kv = WindowRing.make(2, batch_size, *sizes, g.sinks, g.max_rewind, widths)
        self.hidden: WindowRing | None = None
        self.outputs: LinearRing | None = None
        self.backward = BackwardRing(g.buffer_size, g.bptt_calls)
        self.cursors = [Cursor()]

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return self.kv.main.batch

    @property
    def uniform(self) -> bool:
        """Whether all rows of the batch stand at one position."""
        return len(self.cursors) == 1

    @property
    def held(self) -> int:
        """Slots of the forward ring in use, in the row that uses most: the first so many."""
        slots = self.kv.main.slots
        return min(slots, self.cursors[0].position if len(self.cursors) == 1 else max(c.position for c in self.cursors))

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor, hidden: Tensor | None, grad: bool = False) -> None:
        """Put the next tokens into the forward ring, and into the backward ring where gradients are wanted.

        Args:
            k, v: (batch, n, kv_heads, head_dim), zero where hidden.
            hidden: (batch, n) bool, True = padding; None: none.
        """
        if not grad:
            self.backward.segments.clear()
        elif self.uniform and self.backward.calls:
            self.backward.append(GradientSegment(self.cursors[0].position, k, v))
        rows = [x.detach().transpose(1, 2) for x in (k, v)]
        if hidden is None and self.hidden is not None:
            hidden = torch.zeros(k.shape[:2], dtype=torch.bool, device=k.device)
        n = k.shape[1]
        if not self.uniform:
            # Slots that only some rows hold are zero in the others: 0 * NaN is NaN.
            ahead = max(self.kv.main.held(c.position + n) for c in self.cursors)
            self.kv.main.clear(self.held, ahead)
        targets = ((self.kv, rows), (self.hidden, None if hidden is None else [hidden[:, None, :, None]]))
        for ring, new in targets:
            if ring is None or new is None:
                continue
            if n == 1 and not self.uniform:
                ring.append_each([c.position for c in self.cursors], new)
                continue
            for index, cursor in enumerate(self.cursors):
                rows_of_cursor = slice(None) if self.uniform else slice(index, index + 1)
                ring.of(rows_of_cursor).append(cursor.position, [x[rows_of_cursor] for x in new])
        for cursor in self.cursors:
            cursor.position += n

    def track_hidden(self) -> None:
        """Allocate the ring that records which tokens are padding, if there is none yet."""
        if self.hidden is None:
            g = self.geometry
            sizes = (1, self.batch_size, 1, g.buffer_size, 1, torch.bool, self.device, g.sinks, g.max_rewind)
            self.hidden = WindowRing.make(*sizes)
            for ring in (self.hidden.main, self.hidden.evicted):
                if ring is not None:
                    ring.clear(0, ring.slots)

    @torch.no_grad()
    def hide(self, run: SlotRun, padding: Tensor) -> None:
        """Mark tokens that are held, (batch, count) bool, as padding from now on."""
        self.track_hidden()
        assert self.hidden is not None
        self.hidden.main.read(run)[0][:, 0, :, 0].logical_or_(padding)
        self.kv.main.storage.narrow(3, run.slot, run.length).masked_fill_(padding[:, None, :, None], 0)
        # Keys in its graph may be NaN where they are padding now.
        self.backward.segments.clear()

    @torch.no_grad()
    def feed(self, out: Tensor) -> None:
        """Put the outputs (batch, n, num_heads, head_dim) of the last tokens into the feedback ring; comes after `append`."""
        outputs = self.ready_outputs()
        for index, cursor in enumerate(self.cursors):
            rows = slice(None) if self.uniform else slice(index, index + 1)
            outputs.of(rows).write(cursor.fed, [out[rows].detach().transpose(1, 2)])
            cursor.decode(out.shape[1], self.geometry.buffer_size)

    def ready_outputs(self) -> LinearRing:
        """The feedback ring, made if there is none."""
        if self.outputs is None:
            g = self.geometry
            self.outputs = LinearRing(
                1, self.batch_size, g.num_heads, g.buffer_size, g.value_head_dim, self.dtype, self.device
            )
        return self.outputs

    def row(self, index: int) -> Self:
        """One row of the batch, in the same memory and with the same cursor. Gradients do not flow into earlier calls.

        Only where there is a cursor for each row, and rings that the row may need are there.
        """
        assert not self.uniform
        row = self.alias()
        rows = slice(index, index + 1)
        row.kv, row.cursors = self.kv.of(rows), [self.cursors[index]]
        row.hidden = None if self.hidden is None else self.hidden.of(rows)
        row.outputs = None if self.outputs is None else self.outputs.of(rows)
        row.backward = BackwardRing(self.geometry.buffer_size, 0)
        return row

    def alias(self) -> Self:
        """A second object over the same rings and cursors."""
        second = type(self).__new__(type(self))
        second.__dict__.update(self.__dict__)
        return second

    def settle(self) -> None:
        """Replace the cursors by one, where those of all rows agree."""
        first, *others = self.cursors
        if all((c.position, c.fed, c.decoded) == (first.position, first.fed, first.decoded) for c in others):
            first.restorable = max(c.restorable for c in self.cursors)
            first.fed_restorable = max(c.fed_restorable for c in self.cursors)
            self.cursors = [first]

    def check_valid(self) -> None:
        """Assert the invariants; for tests."""
        assert len(self.cursors) in (1, self.batch_size)
        for index, cursor in enumerate(self.cursors):
            rows = slice(None) if self.uniform else slice(index, index + 1)
            assert cursor.position >= 0 and cursor.fed >= 0
            held = self.kv.main.held(cursor.position)
            assert not any(plane[rows, :, held : self.held].any() for plane in self.kv.main.planes)
            if self.hidden is not None:
                padding = self.hidden.main.planes[0][rows, 0, :held, 0]
                for plane in self.kv.main.planes:
                    assert not plane[rows, :, :held].transpose(1, 2)[padding].any()
        if self.backward.segments:
            assert self.backward.segments[-1].stop == self.cursors[0].position
