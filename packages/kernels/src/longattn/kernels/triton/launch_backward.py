# pyright: reportMissingImports=false
"""Launching the backward kernels: fast (keys own, dq reduce-added) or deterministic (keys own dk and dv, queries own dq)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longattn.kernels.dispatch.call import Call, GradientPart
from longattn.kernels.dispatch.environment import ScratchAllocator
from longattn.kernels.ops.arguments import Cotangents, OpTensors
from longattn.kernels.triton.backward_kernel import keys_kernel, rows_kernel
from longattn.kernels.triton.bound import Launch, apart, bind_launches, can_bind, is_aligned, launch_bound
from longattn.kernels.triton.configurations import Configuration
from longattn.kernels.triton.launching import (
    configuration_of,
    persistent_grid,
    run,
    shared_arguments,
    table_arguments,
    tile_options,
    value_chunk,
)
from longattn.kernels.triton.passes import DeviceTables, key_tables, query_passes, query_tables, tables_on
from longattn.kernels.triton.query_gradient_kernel import queries_kernel
from longattn.patterncache import Plan

_ROWS = 64
"""Rows of a program of `rows_kernel`."""


def backward(
    call: Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, None]:
    """(dq, dk, dv, None) in the dtypes of q, k, v; each is written once, dq of the fast way from a float32 sum."""
    # A cotangent that autograd expanded, as that of a sum, has strides of 0: it would be loaded number by number.
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    memory = _Memory.of(call, _whole(call)).fresh(call.q.device, call.allocator)
    beside = _beside(Cotangents(grad_out, grad_lse, out, lse), call.q.dtype, call.part)
    for launch in _launches(call, beside, memory):
        run(launch.kernel, launch.grid, device=call.q.device, **launch.arguments)
    return _finish(call.gradient_dtypes[0], call.deterministic, memory, call.allocator)


class BoundBackward:
    """(cotangents, tensors, allocator) -> (dq, dk, dv, None), for tensors laid out like those of the backward that it was made from."""

    def __init__(self, call: Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> None:
        call, part = apart(call), call.part
        # Objects of their own, also where one tensor is two of them: places are found by identity.
        own = Cotangents(grad_out.detach(), None if grad_lse is None else grad_lse.detach(), out.detach(), lse.detach())
        beside = _beside(own, call.q.dtype, part)
        self._dtype, self._device, self._deterministic = call.q.dtype, call.q.device, call.deterministic
        self._dq_dtype = call.gradient_dtypes[0]
        self._lse_stride, self._memory = lse.stride(), _Memory.of(call, _whole(call))
        memory = self._memory.fresh(self._device, call.allocator)
        tensors = (call.q, call.k, call.v, *beside, *memory)
        self._launches = bind_launches(_launches(call, beside, memory), tensors, self._device)

    def __call__(
        self,
        cotangents: Cotangents,
        tensors: OpTensors,
        allocator: ScratchAllocator,
        part: GradientPart | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, None] | None:
        """Compute; gradients are contiguous and torch's own memory. None: the plan is gone, or a tensor lies otherwise.

        part: with delta, where the call had one that was bound; dq is a sum of its own.
        """
        q, k, v, seed = tensors.q, tensors.k, tensors.v, tensors.seed
        if cotangents.lse.stride() != self._lse_stride or any(launch.outlived for launch in self._launches):
            return None
        beside = _beside(cotangents, self._dtype, part)
        if not is_aligned(q, k, v, *(x for x in beside if x is not None)):
            return None
        memory = self._memory.fresh(self._device, allocator)
        every, number = (q, k, v, *beside, *memory), 0 if seed is None else int(seed)
        launch_bound(self._launches, every, number, self._device)
        return _finish(self._dq_dtype, self._deterministic, memory, allocator)


def bind_backward(
    call: Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, gradients: tuple[Any, ...]
) -> BoundBackward | None:
    """`backward` of such calls with everything in place but tensors and seed; None where a call has more, or a cotangent is copied first."""
    beside = _beside(Cotangents(grad_out, grad_lse, out, lse), call.q.dtype, call.part)
    if not can_bind(call) or grad_out.stride(-1) != 1 or not is_aligned(*(x for x in beside if x is not None)):
        return None
    return BoundBackward(call, grad_out, grad_lse, out, lse)


class _Beside(NamedTuple):
    """What the kernels read beside q, k and v: `Cotangents`, and grad_out in q's dtype. out is None where grad_lse is -delta already."""

    grad_out: Tensor
    grad_lse: Tensor | None
    out: Tensor | None
    lse: Tensor
    grad: Tensor


def _beside(cotangents: Cotangents, dtype: torch.dtype, part: GradientPart | None) -> _Beside:
    grad_out, grad_lse, out, lse = cotangents
    # Products take operands of one type; a cotangent of a float32 state comes in float32.
    grad = grad_out.to(dtype)
    if part is None:
        return _Beside(grad_out, grad_lse, out, lse, grad)
    return _Beside(grad_out, part.minus_delta, None, lse, grad)


class _Memory(NamedTuple):
    """What a backward writes, as (shape, dtype, whether every number is written).

    Attributes:
        rows: of delta and of the pivots. dq: of the sum, (batch, heads, Nq, d) in float32 where keys add to it; else of dq itself.
    """

    rows: tuple[int, ...]
    dq: tuple[tuple[int, ...], torch.dtype, bool]
    dk: tuple[tuple[int, ...], torch.dtype, bool]
    dv: tuple[tuple[int, ...], torch.dtype, bool]

    @classmethod
    def of(cls, call: Call, whole: tuple[bool, bool]) -> _Memory:
        """whole: whether every row of dq, and of dk and dv, has a job."""
        batch, length, heads, dim = call.q.shape
        if call.deterministic:
            single = len(query_passes(call.plan).launches) == 1
            dq = tuple(call.q.shape), call.gradient_dtypes[0] if single else torch.float32, whole[0]
        else:
            dq = (batch, heads, length, dim), torch.float32, False
        dtypes = call.gradient_dtypes[1:]
        keys = ((tuple(x.shape), dtype, whole[1]) for x, dtype in zip((call.k, call.v), dtypes, strict=True))
        return cls((batch, heads, length), dq, *keys)

    def fresh(self, device: torch.device, allocator: ScratchAllocator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """delta, pivots, dq or its sum, dk, dv."""
        delta, pivot = (allocator.empty(self.rows, torch.float32, device, "temp") for _ in range(2))
        dq, dk, dv = (
            (torch.empty if written else torch.zeros)(shape, dtype=dtype, device=device)
            for shape, dtype, written in (self.dq, self.dk, self.dv)
        )
        return delta, pivot, dq, dk, dv


def _whole(call: Call) -> tuple[bool, bool]:
    """Whether every query row is written, and every key row; keys that nobody sees have no job."""
    return query_passes(call.plan).complete, _every_key_owned(call.plan, call.q.shape[2] // call.k.shape[2])


def _finish(
    dtype: torch.dtype, deterministic: bool, memory: tuple[Tensor, ...], allocator: ScratchAllocator
) -> tuple[Tensor, Tensor, Tensor, None]:
    delta, pivot, dq, dk, dv = memory
    for x in (delta, pivot):
        allocator.release(x, "temp")
    if deterministic:
        return dq.to(dtype), dk, dv, None
    batch, heads, length, dim = dq.shape
    # One pass: float32 in, q's dtype and layout out.
    final = torch.empty((batch, length, heads, dim), dtype=dtype, device=dq.device)
    return final.copy_(dq.transpose(1, 2)), dk, dv, None


def _launches(call: Call, beside: _Beside, memory: tuple[Tensor, ...]) -> Iterator[Launch]:
    """Rows first, then keys, and where they own dq queries."""
    batch, length, heads, _ = call.q.shape
    (grad_out, grad_lse, out, lse, grad), (delta, pivot, dq, dk, dv) = beside, memory
    value_dim, group = call.v.shape[-1], heads // call.k.shape[2]
    rows = {
        "grad_out_ptr": grad_out, "out_ptr": out, "lse_ptr": lse, "grad_lse_ptr": grad_lse, "delta_ptr": delta, "pivot_ptr": pivot,
        "length": length, "heads": heads, "grad_strides": grad_out.stride(), "out_strides": None if out is None else out.stride(), "lse_strides": lse.stride(),
        "grad_lse_strides": None if grad_lse is None else grad_lse.stride(),
        "VALUE_DIM": value_dim, "BLOCK_V": 1 << (value_dim - 1).bit_length(), "ROWS": _ROWS, "num_warps": 4,
    }  # fmt: skip
    yield Launch(rows_kernel, (-(-length // _ROWS) * heads * batch,), rows)
    shared = {
        "q_ptr": call.q, "k_ptr": call.k, "v_ptr": call.v, "grad_ptr": grad, "delta_ptr": delta, "pivot_ptr": pivot,
        "q_strides": call.q.stride(), "k_strides": call.k.stride(), "v_strides": call.v.stride(), "grad_strides": grad.stride(),
        "heads": heads, "length": length, "GROUP": group, "scale": call.scale * math.log2(math.e), "sm_scale": call.scale,
        **shared_arguments(call),
    }  # fmt: skip

    def launch(kernel: Any, tables: DeviceTables, configuration: Configuration, own: str, **arguments: Any) -> Launch:
        other = "BLOCK_M" if own == "BLOCK_N" else "BLOCK_N"
        sizes = {
            own: configuration.owned,
            other: configuration.streamed,
            "VALUE_CHUNK": value_chunk(call, configuration),
        }
        arguments |= shared | sizes | table_arguments(tables, call.q) | tile_options(call, configuration)
        return Launch(kernel, persistent_grid(tables, call.q), arguments, tables)

    tile = configuration_of(call, "backward_keys")
    block = (tile.owned, tile.streamed)
    tables = tables_on(call.plan, ("keys", group, *block), call.q.device, lambda: key_tables(call.plan, group, block))
    yield launch(
        keys_kernel, tables, tile, "BLOCK_N", dq_ptr=None if call.deterministic else dq, dk_ptr=dk, dv_ptr=dv,
        dk_strides=dk.stride(), dv_strides=dv.stride(), REDUCE=not call.deterministic,
    )  # fmt: skip
    if not call.deterministic:
        return
    # dq pass by pass as in the forward, added to what the passes before left.
    tile = configuration_of(call, "backward_queries")
    block = (tile.owned, tile.streamed)
    for number, query_pass in enumerate(query_passes(call.plan).launches):
        key = ("queries", number, *block, 1, 1)
        tables = tables_on(call.plan, key, call.q.device, lambda n=number: query_tables(call.plan, n, block))
        yield launch(
            queries_kernel, tables, tile, "BLOCK_M", dq_ptr=dq, dq_strides=dq.stride(), ADD=not query_pass.fresh
        )


def _every_key_owned(plan: Plan, group: int) -> bool:
    """Whether every key of every kv head is seen by some tile. Kept with the plan."""
    key = f"triton every key, group={group}"
    every: bool | None = plan.derived.get(key)
    if every is None:
        heads, _, keys = plan.rectangle.shape
        owned = np.zeros((heads // group, keys), bool)
        for branch in plan.branches:
            owned[branch.heads.positions()[:, None] // group, branch.k.rows().reshape(1, -1)] = True
        every = plan.derived[key] = bool(owned.all())
    return every
