"""`LinearRing`: a ring of token rows in one linear allocation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from longattn.bufmgr import get_global_memory_pool
from longattn.kernels.interface import DecodeCache

CACHE_LINE = 64
"""Bytes. Rows of floating numbers begin at a multiple of it, so that no two rows share a line."""


class SlotRun(NamedTuple):
    """`length` neighbouring slots from `slot`, which hold the positions from `position`."""

    slot: int
    position: int
    length: int


class LinearRing:
    """Rows of (batch, heads, head_dim) for tokens, by position: the first `prefix` stay, the others go around.

    1. Position p < prefix lies in slot p for ever; a later one in slot prefix + (p - prefix) % capacity, where it replaces the token
       `capacity` before it.
    2. `write` puts tokens into their slots, in place. Nothing is moved, and nothing else is written.
    3. `runs` says where positions lie: at most the prefix and two runs. Where all slots are held and order does not matter, they are one.

    Args:
        planes: tensors that share the slots, such as keys and values.
        batch, heads, head_dim: of a row.
        capacity: slots that go around, >= 0. prefix: slots that stay. Default 0.
        dtype, device: of the storage. bool is stored without alignment.
        storage: an existing one, (planes, batch, heads, prefix + capacity, row). Default: a lease of type CACHE, with any content.
        widths: numbers of a row of each plane, at most head_dim: a narrower plane leaves the rest of its rows unused. Default: head_dim.
    """

    def __init__(
        self,
        planes: int,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        prefix: int = 0,
        storage: Tensor | None = None,
        widths: tuple[int, ...] | None = None,
    ) -> None:
        self.capacity, self.prefix, self.head_dim = capacity, prefix, head_dim
        self.widths = (head_dim,) * planes if widths is None else widths
        self.slots = prefix + capacity
        row = head_dim
        if dtype.is_floating_point:
            line = max(1, CACHE_LINE // dtype.itemsize)
            row = -(-head_dim // line) * line
        if storage is None:
            shape = (planes, batch, heads, self.slots, row)
            # A state outlives the mode it was made in; an inference tensor could not be written elsewhere.
            with torch.inference_mode(False):
                storage = get_global_memory_pool().empty(shape, dtype, device, "cache")
        self.storage = storage
        self.planes = tuple(storage[plane, ..., :width] for plane, width in enumerate(self.widths))
        """One (batch, heads, slots, head_dim) view for each plane."""

    @cached_property
    def tokens(self) -> tuple[Tensor, ...]:
        """One (batch, slots, heads, head_dim) view for each plane."""
        with torch.inference_mode(False), torch.no_grad():
            return tuple(plane.transpose(1, 2) for plane in self.planes)

    @cached_property
    def cache(self) -> DecodeCache:
        """Keys and values, the first two planes, as decode reads them."""
        with torch.inference_mode(False), torch.no_grad():
            keys, values = (plane.flatten(0, 1) for plane in self.planes[:2])
        return DecodeCache(keys, values)

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self.storage.shape[1]

    def slot(self, position: int) -> int:
        """Where a position lies."""
        return position if position < self.prefix else self.prefix + (position - self.prefix) % self.capacity

    def held(self, position: int) -> int:
        """Slots in use when `position` tokens were written: the first so many."""
        return min(position, self.slots)

    def runs(self, start: int, stop: int) -> Iterator[SlotRun]:
        """Where the positions start .. stop lie, in their order. They are `slots` at most."""
        if start < min(stop, self.prefix):
            count = min(stop, self.prefix) - start
            yield SlotRun(start, start, count)
            start += count
        while start < stop:
            slot = self.slot(start)
            count = min(stop - start, self.slots - slot)
            yield SlotRun(slot, start, count)
            start += count

    def write(self, start: int, rows: Sequence[Tensor]) -> None:
        """Put rows, one (batch, heads, n, head_dim) for each plane, at the positions start .. start + n. Needs no_grad.

        Of more than the ring can hold, the last stay.
        """
        stop = start + rows[0].shape[2]
        oldest = max(start, self.prefix, stop - self.capacity)
        for first, last in ((start, min(stop, self.prefix)), (oldest, stop)):
            for run in self.runs(first, last):
                for plane, new in zip(self.planes, rows, strict=True):
                    plane.narrow(2, run.slot, run.length).copy_(new.narrow(2, run.position - start, run.length))

    def read(self, run: SlotRun) -> list[Tensor]:
        """The views (batch, heads, count, head_dim) of a run, one for each plane."""
        return [plane.narrow(2, run.slot, run.length) for plane in self.planes]

    def clear(self, first: int, last: int) -> None:
        """Zero the slots first .. last. Needs no_grad."""
        self.storage[:, :, :, first:last].zero_()

    def of(self, rows: slice) -> LinearRing:
        """Some rows of the batch, in the same memory."""
        part = self.storage[:, rows]
        planes, batch, heads = part.shape[:3]
        sizes = (planes, batch, heads, self.capacity, self.head_dim)
        return (
            self if rows == slice(None) else LinearRing(*sizes, part.dtype, part.device, self.prefix, part, self.widths)
        )

    def taken(self, index: Tensor) -> LinearRing:
        """The rows `index` of the batch, copied."""
        old = self.storage
        sizes = (old.shape[0], len(index), old.shape[2], self.capacity, self.head_dim)
        copy = LinearRing(*sizes, old.dtype, old.device, self.prefix, widths=self.widths)
        torch.index_select(old, 1, index, out=copy.storage)
        return copy
