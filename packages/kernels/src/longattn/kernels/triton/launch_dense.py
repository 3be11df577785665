# pyright: reportMissingImports=false
"""Launching the warp-specialised kernel: which calls it serves, and the two launches of a pass whose dense tiles it takes.

What a mask, a bias, padding, dropout or a score term changes, listed rows, few queries and edges stay with the kernel that masks. It merges
nothing itself but writes a float32 state, which this one takes as its prior, so that every row of out is rounded once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longattn.kernels.dispatch.call import Call
from longattn.kernels.problem import architecture_of
from longattn.kernels.triton import self_check
from longattn.kernels.triton.bound import Launch, is_aligned
from longattn.kernels.triton.configurations import Configuration, dense_tile
from longattn.kernels.triton.dense_kernel import dense_kernel
from longattn.kernels.triton.dense_tables import DenseSplit, split_dense
from longattn.kernels.triton.joblist import JobTables
from longattn.kernels.triton.launching import (
    configuration_of,
    has_terms,
    persistent_grid,
    table_arguments,
    tile_options,
)
from longattn.kernels.triton.passes import query_passes, query_tables, tables_on
from longattn.kernels.triton.row_classes import gathered

_BYTES = 16
"""What rows and strides of a descriptor are multiples of."""


def is_dense(call: Call) -> bool:
    """Whether the kernel serves the call, and was right on its device; it is checked there now, where it was not."""
    beside = (call.mask, call.bias, call.key_padding)
    if call.dropout_p or call.scale <= 0 or has_terms(call) or any(x is not None for x in beside):
        return False
    if _tile(call) is None or call.q.dtype not in (torch.float16, torch.bfloat16) or not call.k.shape[1]:
        return False
    laid_out = is_aligned(call.q, call.k, call.v) and all(_addressable(x) for x in (call.q, call.k, call.v))
    return laid_out and self_check.dense_passed(call.q, call.k)


def _addressable(x: Tensor) -> bool:
    """Whether a descriptor can name its rows: the last axis contiguous, the others whole multiples of 16 bytes."""
    strides, size = x.stride(), x.element_size()
    return (
        strides[-1] == 1
        and strides[1] >= x.shape[-1]
        and not any(s * size % _BYTES for s in (*strides[:-1], x.shape[-1]))
    )


def _tile(call: Call) -> Configuration | None:
    dims = call.q.shape[-1], call.v.shape[-1]
    return dense_tile(architecture_of(call.q.device), *dims, call.q.element_size())


def splits(call: Call) -> tuple[DenseSplit | None, ...]:
    """Of each pass of a plan its two launches, where it pays to give dense tiles one of their own; else None. Kept with the plan."""
    tile, passes = _tile(call), query_passes(call.plan).launches
    if tile is None or gathered(call.plan.branches):
        return (None,) * len(passes)
    owned = min(configuration_of(call, "forward").owned, tile.owned)
    key = f"triton dense {tile.owned} {tile.streamed} {owned}"
    found: tuple[DenseSplit | None, ...] | None = call.plan.derived.get(key)
    if found is None:
        block = tile.owned, tile.streamed
        each = (split_dense(query_tables(call.plan, n, block), tile.streamed, owned) for n in range(len(passes)))
        found = call.plan.derived[key] = tuple(split if split.pays else None for split in each)
    return found


def dense_configuration(call: Call) -> Configuration:
    """The kernel's tile for a call that it serves."""
    tile = _tile(call)
    assert tile is not None
    return tile


def dense_launch(
    call: Call, number: int, jobs: JobTables, out: Tensor, lse: Tensor, prior: tuple[Tensor, Tensor] | None
) -> Launch:
    """The kernel for dense tiles over all jobs of a pass, merged onto a prior."""
    configuration = dense_configuration(call)
    key = ("dense", number, configuration.owned, configuration.streamed)
    tables = tables_on(call.plan, key, call.q.device, lambda: jobs)
    prior_out, prior_lse = (None, None) if prior is None else prior
    taken = {**table_arguments(tables, call.q), **tile_options(call, configuration)}
    arguments = {
        "q_ptr": call.q, "k_ptr": call.k, "v_ptr": call.v, "out_ptr": out, "lse_ptr": lse, "prior_out_ptr": prior_out, "prior_lse_ptr": prior_lse,
        "q_strides": call.q.stride(), "k_strides": call.k.stride(), "v_strides": call.v.stride(), "out_strides": out.stride(), "lse_strides": lse.stride(),
        "prior_out_strides": None if prior_out is None else prior_out.stride(),
        "prior_lse_strides": None if prior_lse is None else prior_lse.stride(),
        "keys": call.k.shape[1], "scale": call.scale * math.log2(math.e), "GROUP": call.q.shape[2] // call.k.shape[2],
        "BLOCK_M": configuration.owned, "BLOCK_N": configuration.streamed,
        **{name: value for name, value in taken.items() if name in dense_kernel.arg_names or name.startswith("num_")},
    }  # fmt: skip
    return Launch(dense_kernel, persistent_grid(tables, call.q), arguments, tables)
