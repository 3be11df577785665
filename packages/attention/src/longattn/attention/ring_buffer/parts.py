"""`Part`: keys and values at neighbouring positions; a call attends to one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from longattn.attention.ring_buffer.rings import Rings
from longattn.patterncache import Band


class Part(NamedTuple):
    """Some of the keys that a call attends to.

    Attributes:
        k, v: (batch, n, kv_heads, head_dim).
        start: position of the first.
        column: which of the attended keys the first is, in position order.
        band: which distances, query position - key position, are seen.
        sink: whether these are sinks.
    """

    k: Tensor
    v: Tensor
    start: int
    column: int
    band: Band
    sink: bool

    @property
    def length(self) -> int:
        """How many keys."""
        return self.k.shape[1]


def earlier_keys(rings: Rings, causal: bool) -> list[tuple[int, int]]:
    """[start, stop) of the positions before the call that one of its queries sees: sinks, then the window. Uniform rings only."""
    position, g = rings.cursors[0].position, rings.geometry
    oldest = max(g.sinks, position - g.buffer_size + (1 if causal else 0))
    return [(0, min(g.sinks, position)), (oldest, max(oldest, position))]


def attended_before(rings: Rings, causal: bool) -> int:
    """How many keys from before the call its queries attend to."""
    return sum(stop - start for start, stop in earlier_keys(rings, causal))


def gather_parts(rings: Rings, k: Tensor, v: Tensor, causal: bool, grad: bool) -> list[Part]:
    """The keys of a call in position order: views of those that the rings hold, then its own.

    Args:
        rings: uniform, before the call's tokens are appended.
        k, v: (batch, n, kv_heads, head_dim), the call's own.
        grad: whether autograd will save the parts; then they are copies, or tensors of the backward ring, and the window is one part.
    """
    position, sinks = rings.cursors[0].position, rings.geometry.sinks
    band = Band(0, rings.geometry.buffer_size - 1) if causal else Band()
    pieces: list[tuple[Tensor, Tensor, int]] = []
    for start, stop in earlier_keys(rings, causal):
        pieces += _keys_with_gradients(rings, start, stop) if grad else _stored_keys(rings, start, stop)
    border = min(max(0, sinks - position), k.shape[1])
    if border:
        pieces.append((k[:, :border], v[:, :border], position))
    pieces.append((k[:, border:], v[:, border:], position + border))
    if grad:
        pieces = _concatenated([p for p in pieces if p[2] < sinks]) + _concatenated(
            [p for p in pieces if p[2] >= sinks]
        )
    parts: list[Part] = []
    column = 0
    for keys, values, start in pieces:
        if keys.shape[1]:
            sink = start < sinks
            parts.append(Part(keys, values, start, column, Band(0, None) if sink and causal else band, sink))
            column += keys.shape[1]
    return parts


def _stored_keys(rings: Rings, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    main = rings.kv.main
    for run in main.runs(start, stop):
        keys, values = (x.transpose(1, 2) for x in main.read(run))
        yield keys, values, run.position


def _keys_with_gradients(rings: Rings, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    gradient_start = rings.backward.start
    border = stop if gradient_start is None else min(max(gradient_start, start), stop)
    for keys, values, position in _stored_keys(rings, start, border):
        # The ring is written in place before a backward reads it. Joined keys are copied by joining; sinks may be a part of their own.
        is_sink = position < rings.geometry.sinks
        yield (keys.clone(), values.clone(), position) if is_sink else (keys, values, position)
    for segment in rings.backward.between(border, stop):
        yield segment.k, segment.v, segment.start


def _concatenated(pieces: list[tuple[Tensor, Tensor, int]]) -> list[tuple[Tensor, Tensor, int]]:
    if len(pieces) < 2:
        return pieces
    keys, values, starts = zip(*pieces, strict=True)
    return [(torch.cat(keys, 1), torch.cat(values, 1), starts[0])]
