"""`WindowRing`: a ring whose last evicted rows can come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longattn.attention.ring_buffer.linear_ring import LinearRing


class WindowRing:
    """The prefix and the last `capacity` tokens, and beside them the tokens that were evicted last.

    1. `append` puts tokens at the next positions. What they replace moves to the evicted ring, which forgets its own oldest.
    2. `rewind` steps back: dropped tokens are forgotten, those that they had evicted come back. So the window is what it was.

    Args:
        main: the ring that is attended to. evicted: what can come back, or None: nothing.
    """

    def __init__(self, main: LinearRing, evicted: LinearRing | None) -> None:
        self.main, self.evicted = main, evicted

    @classmethod
    def make(
        cls,
        planes: int,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        prefix: int,
        max_rewind: int,
        widths: tuple[int, ...] | None = None,
    ) -> WindowRing:
        """Both rings, with any content."""
        main = LinearRing(planes, batch, heads, capacity, head_dim, dtype, device, prefix, widths=widths)
        if not max_rewind:
            return cls(main, None)
        return cls(main, LinearRing(planes, batch, heads, max_rewind, head_dim, dtype, device, widths=widths))

    def append(self, position: int, rows: Sequence[Tensor]) -> None:
        """Rows, one (batch, heads, n, head_dim) for each plane, at position .. position + n. Needs no_grad."""
        stop = position + rows[0].shape[2]
        if self.evicted is not None:
            last = stop - self.main.capacity
            first = max(self.main.prefix, position - self.main.capacity, last - self.evicted.capacity)
            for run in self.main.runs(first, min(last, position)):
                self.evicted.write(run.position, self.main.read(run))
            # Those of a long call that do not stay never were in the ring.
            begin = max(first, position)
            if begin < last:
                self.evicted.write(begin, [x.narrow(2, begin - position, last - begin) for x in rows])
        self.main.write(position, rows)

    def append_each(self, positions: Sequence[int], rows: Sequence[Tensor]) -> None:
        """One token for each row of the batch, rows (batch, heads, 1, head_dim), each at a position of its own. Needs no_grad."""
        main, evicted = self.main, self.evicted
        device, batch = main.storage.device, list(range(len(positions)))
        slots = [main.slot(p) for p in positions]
        moved = [b for b, p in enumerate(positions) if p - main.capacity >= main.prefix]
        if evicted is not None and moved:
            places = (
                moved,
                [slots[b] for b in moved],
                [(positions[b] - main.capacity) % evicted.capacity for b in moved],
            )
            at, old, new = (torch.tensor(x, device=device) for x in places)
            evicted.storage[:, at, :, new] = main.storage[:, at, :, old]
        at, to = (torch.tensor(x, device=device) for x in (batch, slots))
        for plane, row in zip(main.planes, rows, strict=True):
            plane[at, :, to] = row[:, :, 0]

    def needs(self, earlier: int) -> int:
        """The oldest position past the prefix that the window up to `earlier` holds."""
        return max(self.main.prefix, earlier - self.main.capacity)

    def rewind(self, position: int, earlier: int) -> None:
        """From `position` tokens back to `earlier`. Dropped slots hold zero, or what stood there before. Needs no_grad."""
        prefix = self.main.prefix
        for first, stop in (
            (earlier, min(position, prefix)),
            (max(earlier, prefix, position - self.main.capacity), position),
        ):
            for run in self.main.runs(first, stop):
                self.main.clear(run.slot, run.slot + run.length)
        last = min(earlier, position - self.main.capacity)
        if self.evicted is not None and self.needs(earlier) < last:
            for run in self.evicted.runs(self.needs(earlier), last):
                self.main.write(run.position, self.evicted.read(run))

    def of(self, rows: slice) -> WindowRing:
        """Some rows of the batch, in the same memory."""
        return self if rows == slice(None) else self.map(lambda ring: ring.of(rows))

    def map(self, change: Callable[[LinearRing], LinearRing]) -> WindowRing:
        """Both rings changed alike."""
        return WindowRing(change(self.main), None if self.evicted is None else change(self.evicted))
