"""`gather_rows`: one rank's rows of a sequence become all of them, on every rank, with gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longattn.attention.schedules.layouts import Layout, count_rows
from longattn.attention.schedules.transport import Place, swap
from longattn.kernels.interface import TorchAllocator


def gather_rows(place: Place, x: Tensor, layout: Layout) -> Tensor:
    """(batch, rows of all, ...) of x (batch, rows of this rank, ...). The gradient is the sum of what all ranks have for a row."""
    return _Gathered.apply(x, place, layout)  # type: ignore[return-value]


class _Gathered(torch.autograd.Function):
    """All-gather; backward is its transpose, summed in the order of ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Place, layout: Layout) -> Tensor:  # type: ignore[override]
        ctx.place, ctx.layout, ctx.shape = place, layout, x.shape
        sizes = [count_rows(rows) for rows in layout.rows()]
        shapes = [(x.shape[0], size, *x.shape[2:]) for size in sizes]
        whole = layout.join(swap(place, "rows", [x] * len(sizes), shapes, TorchAllocator()))
        # A group of one hands back the tensor itself.
        return whole.view_as(whole) if whole is x else whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        parts = ctx.layout.cut(gradient)
        received = swap(ctx.place, "gradients of rows", parts, [tuple(ctx.shape)] * len(parts), TorchAllocator())
        return torch.stack(received).sum(0), None, None
