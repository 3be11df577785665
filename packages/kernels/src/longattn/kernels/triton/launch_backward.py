# pyright: reportMissingImports=false
"""Launching the backward kernels: fast (keys own, dq reduce-added) or deterministic (keys own dk and dv, queries own dq)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longattn.kernels.dispatch.call import Call
from longattn.kernels.problem import architecture_of
from longattn.kernels.triton.backward_kernel import keys_kernel, rows_kernel
from longattn.kernels.triton.configurations import Configuration, choose
from longattn.kernels.triton.launching import (
    dropout_arguments,
    has_terms,
    mask_arguments,
    persistent_grid,
    run,
    table_arguments,
    term_arguments,
    tile_options,
    value_chunk,
)
from longattn.kernels.triton.passes import key_tables, query_passes, query_tables, tables_on
from longattn.kernels.triton.query_gradient_kernel import queries_kernel
from longattn.patterncache import Plan

_ROWS = 64
"""Rows of a program of `rows_kernel`."""


def backward(
    call: Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, None]:
    """(dq, dk, dv, None) in the dtypes of q, k, v; each is written once, dq of the fast way from a float32 sum."""
    batch, length, heads, dim = call.q.shape
    value_dim = call.v.shape[-1]
    # A cotangent that autograd expanded, as that of a sum, has strides of 0: it would be loaded number by number.
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    # Products take operands of one type; a cotangent of a float32 state comes in float32.
    grad = grad_out.to(call.q.dtype)
    delta, pivot = (
        call.allocator.empty((batch, heads, length), torch.float32, call.q.device, "temp") for _ in range(2)
    )
    run(
        rows_kernel, (-(-length // _ROWS) * heads * batch,),
        grad_out, out, lse, grad_lse, delta, pivot, length, heads,
        grad_out.stride(), out.stride(), lse.stride(), None if grad_lse is None else grad_lse.stride(),
        device=call.q.device, VALUE_DIM=value_dim, BLOCK_V=1 << (value_dim - 1).bit_length(), ROWS=_ROWS, num_warps=4,
    )  # fmt: skip
    shared = {"grad_ptr": grad, "grad_strides": grad.stride(), "delta_ptr": delta, "pivot_ptr": pivot}
    shared |= {"heads": heads, "length": length, "GROUP": heads // call.k.shape[2]}
    shared |= {"scale": call.scale * math.log2(math.e), "sm_scale": call.scale}
    for name in "qkv":
        x: Tensor = getattr(call, name)
        shared |= {f"{name}_ptr": x, f"{name}_strides": x.stride()}
    shared |= mask_arguments(call) | dropout_arguments(call) | term_arguments(call)
    if call.deterministic:
        dk, dv = _own_keys(call, shared, None)
        dq = _own_queries(call, shared)
    else:
        total = torch.zeros((batch, heads, length, dim), dtype=torch.float32, device=call.q.device)
        dk, dv = _own_keys(call, shared, total)
        # One pass: float32 in, q's dtype and layout out.
        dq = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device).copy_(total.transpose(1, 2))
    for x in (delta, pivot):
        call.allocator.release(x, "temp")
    return dq, dk, dv, None


def _configuration(call: Call, kernel: str) -> Configuration:
    head_dim = max(call.q.shape[-1], call.v.shape[-1])
    architecture = architecture_of(call.q.device)
    return choose(kernel, architecture, head_dim, call.q.element_size(), terms=has_terms(call))[0]


def _own_keys(call: Call, shared: dict[str, Any], dq: Tensor | None) -> tuple[Tensor, Tensor]:
    """dk, dv, and, where dq is given, its sum."""
    group = call.q.shape[2] // call.k.shape[2]
    configuration = _configuration(call, "backward_keys")
    block = (configuration.owned, configuration.streamed)
    tables = tables_on(call.plan, ("keys", group, *block), call.q.device, lambda: key_tables(call.plan, group, block))
    # Keys that nobody sees have no job.
    make = torch.empty if _every_key_owned(call.plan, group) else torch.zeros
    dk, dv = (make(x.shape, dtype=x.dtype, device=x.device) for x in (call.k, call.v))
    run(
        keys_kernel, persistent_grid(tables, call),
        dq_ptr=dq, dk_ptr=dk, dv_ptr=dv, dk_strides=dk.stride(), dv_strides=dv.stride(), REDUCE=dq is not None,
        BLOCK_M=configuration.streamed, BLOCK_N=configuration.owned, LISTED=tables.listed, device=call.q.device,
        VALUE_CHUNK=value_chunk(call, configuration), **shared, **table_arguments(tables, call),
        **tile_options(call, configuration),
    )  # fmt: skip
    return dk, dv


def _own_queries(call: Call, shared: dict[str, Any]) -> Tensor:
    """dq, pass by pass as in the forward; summed in float32 where there are several."""
    passes = query_passes(call.plan)
    single = len(passes.launches) == 1
    make = torch.empty if passes.complete else torch.zeros
    dq = make(call.q.shape, dtype=call.q.dtype if single else torch.float32, device=call.q.device)
    configuration = _configuration(call, "backward_queries")
    block = (configuration.owned, configuration.streamed)
    for number, launch in enumerate(passes.launches):
        key = ("queries", number, *block, 1, 1)
        tables = tables_on(call.plan, key, call.q.device, lambda n=number: query_tables(call.plan, n, block))
        run(
            queries_kernel, persistent_grid(tables, call),
            dq_ptr=dq, dq_strides=dq.stride(), ADD=not launch.fresh,
            BLOCK_M=configuration.owned, BLOCK_N=configuration.streamed, LISTED=tables.listed, device=call.q.device,
            VALUE_CHUNK=value_chunk(call, configuration), **shared, **table_arguments(tables, call),
        **tile_options(call, configuration),
        )  # fmt: skip
    return dq.to(call.q.dtype)


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
