"""`gather_rows`: one rank's rows of a sequence become all of them, on every rank, with gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longattn.attention.schedules.callers import caller_fields
from longattn.attention.schedules.group_calls import GroupCalls
from longattn.attention.schedules.headers import Fields
from longattn.attention.schedules.layouts import Layout, rows_by_rank
from longattn.attention.schedules.transport import Swapped, swap
from longattn.kernels.interface import TorchAllocator


def gather_rows(calls: GroupCalls, x: Tensor, layout: Layout, timeout: float | None) -> Tensor:
    """(batch, rows of all, ...) of x (batch, rows of this rank, ...). The gradient is the sum of what all ranks have for a row."""
    return _Gathered.apply(x, calls, layout, timeout)  # type: ignore[return-value]


def row_fields(calls: GroupCalls, phase: str, x: Tensor, rows: list[int]) -> Fields:
    """What the ranks must have alike that gather rows of x (batch, rows, ...)."""
    caller = caller_fields(calls) if phase == "gather" else {}
    shape = str(tuple(x.shape[2:]))
    return Fields(
        phase=phase,
        step="rows",
        batch=str(x.shape[0]),
        dtype=str(x.dtype),
        head_dim=shape,
        k_lengths=str(rows),
        **caller,
    )


class _Gathered(torch.autograd.Function):
    """All-gather; backward is its transpose, summed in the order of ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, calls: GroupCalls, layout: Layout, timeout: float | None) -> Tensor:  # type: ignore[override]
        ctx.calls, ctx.layout, ctx.shape, ctx.timeout = calls, layout, x.shape, timeout
        sizes = rows_by_rank(layout)
        shapes = [(x.shape[0], size, *x.shape[2:]) for size in sizes]
        with calls.underway(timeout):
            ctx.call = calls.next_call()
            fields = row_fields(calls, "gather", x, sizes)
            (parts,) = swap(calls, fields, ctx.call, [Swapped([x] * len(sizes), shapes)], TorchAllocator())
        whole = layout.join(parts)
        # A group of one hands back the tensor itself.
        return whole.view_as(whole) if whole is x else whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        parts = ctx.layout.cut(gradient)
        sizes = rows_by_rank(ctx.layout)
        with ctx.calls.underway(ctx.timeout):
            fields = row_fields(ctx.calls, "gather backward", gradient, sizes)
            swapped = [Swapped(parts, [tuple(ctx.shape)] * len(parts))]
            (received,) = swap(ctx.calls, fields, ctx.call, swapped, TorchAllocator())
        return torch.stack(received).sum(0), None, None, None
