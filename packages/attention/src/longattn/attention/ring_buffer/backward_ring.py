"""`BackwardRing`: keys and values that still carry gradients."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GradientSegment:
    """The keys and values of one call, (batch, n, kv_heads, head_dim), in their graph; `start` is the first one's position."""

    start: int
    k: Tensor
    v: Tensor

    @property
    def stop(self) -> int:
        """The position after the last."""
        return self.start + self.k.shape[1]

    def part(self, start: int, stop: int) -> GradientSegment:
        """The positions start .. stop of it, as views."""
        first = max(start, self.start)
        length = max(0, min(stop, self.stop) - first)
        if length == self.k.shape[1]:
            return self
        return GradientSegment(
            first, self.k.narrow(1, first - self.start, length), self.v.narrow(1, first - self.start, length)
        )


class BackwardRing:
    """The last tokens of calls that wanted gradients: `capacity` tokens and `calls` calls at most, one after the other.

    Out of place, because autograd needs the tensors that it saved: writing to one in place is an error. Tokens of this ring are in the
    forward ring too, without their graph.
    """

    def __init__(self, capacity: int, calls: int) -> None:
        self.capacity, self.calls = capacity, calls
        self.segments: deque[GradientSegment] = deque()

    @property
    def start(self) -> int | None:
        """The position from which gradients flow; None: nowhere."""
        return self.segments[0].start if self.segments else None

    def append(self, segment: GradientSegment) -> None:
        """Add the next call. Tokens beyond the capacity leave; a call that does not follow the last one starts anew."""
        if self.segments and self.segments[-1].stop != segment.start:
            self.segments.clear()
        self.segments.append(segment)
        while len(self.segments) > self.calls:
            self.segments.popleft()
        self._keep(segment.stop - self.capacity, segment.stop)

    def rewind(self, position: int) -> None:
        """Forget the tokens from `position`."""
        self._keep(0, position)

    def between(self, start: int, stop: int) -> list[GradientSegment]:
        """The segments of the positions start .. stop that are held, oldest first."""
        segments = (
            segment.part(start, stop) for segment in self.segments if segment.start < stop and segment.stop > start
        )
        return [segment for segment in segments if segment.k.shape[1]]

    def taken(self, index: Tensor) -> BackwardRing:
        """The rows `index` of the batch, in the same graph."""
        selected = BackwardRing(self.capacity, self.calls)
        selected.segments.extend(GradientSegment(s.start, s.k[index], s.v[index]) for s in self.segments)
        return selected

    def clone(self) -> BackwardRing:
        """A ring of its own over the same graph."""
        copy = BackwardRing(self.capacity, self.calls)
        copy.segments.extend(self.segments)
        return copy

    def _keep(self, start: int, stop: int) -> None:
        # Part of a segment stays in its graph, whatever mode the caller is in.
        with torch.enable_grad():
            segments = self.between(start, stop)
        self.segments.clear()
        self.segments.extend(segments)
