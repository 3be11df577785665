# pyright: reportMissingImports=false
"""Launching the forward kernel: tile choice, passes, and the split over keys where queries are few."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longattn.kernels.dispatch.call import Call
from longattn.kernels.problem import architecture_of
from longattn.kernels.triton.configurations import Configuration, choose
from longattn.kernels.triton.forward_kernel import forward_kernel
from longattn.kernels.triton.launching import (
    dropout_arguments,
    has_terms,
    mask_arguments,
    persistent_grid,
    programs,
    run,
    table_arguments,
    term_arguments,
    tile_options,
)
from longattn.kernels.triton.merge_kernel import merge_kernel
from longattn.kernels.triton.passes import packable, query_passes, query_tables, tables_on

_DECODE_ROWS = 64
"""Query rows x grouped heads up to which a call is a decode: one tile of queries, keys split over programs."""

_PART_TILES = 2
"""Tiles that a part of a split has at least."""


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out (batch, Nq, heads, head_dim) in out_dtype, lse (batch, Nq, heads) float32."""
    passes = query_passes(call.plan)
    pack = _pack(call)
    parts = _parts(call, pack) if len(passes.launches) == 1 and passes.complete else 1
    if parts > 1:
        return _split(call, pack, parts)
    single = len(passes.launches) == 1
    out, lse = _new_state(call, call.out_dtype if single else torch.float32, not passes.complete)
    for number, launch in enumerate(passes.launches):
        prior = call.prior if launch.fresh else (out, lse)
        _launch(call, number, pack, out, lse, prior)
    if out.dtype == call.out_dtype:
        return out, lse
    final = call.allocator.empty(out.shape, call.out_dtype, out.device, "output").copy_(out)
    call.allocator.release(out, "temp")
    return final, lse


def _new_state(call: Call, dtype: torch.dtype, filled: bool) -> tuple[Tensor, Tensor]:
    """out and lse to write: unwritten, or, where some rows see nothing at all, the prior's or the empty state."""
    role = "output" if dtype == call.out_dtype else "temp"
    out = call.allocator.empty((*call.q.shape[:3], call.v.shape[-1]), dtype, call.q.device, role)
    lse = call.allocator.empty(call.q.shape[:3], torch.float32, call.q.device, "temp")
    if filled and call.prior is not None:
        out.copy_(call.prior[0])
        lse.copy_(call.prior[1])
    elif filled:
        out.zero_()
        lse.fill_(-torch.inf)
    return out, lse


def _pack(call: Call) -> int:
    """How many heads are rows of one tile: all that share a kv head where queries are few, else one."""
    group = call.q.shape[2] // call.k.shape[2]
    few = call.q.shape[1] * group <= _DECODE_ROWS
    return group if few and group > 1 and packable(call.plan, group) else 1


def _parts(call: Call, pack: int) -> int:
    """Into how many parts keys are split: as many as keep the device busy, where queries alone do not."""
    batch, rows, heads, _ = call.q.shape
    if rows * pack > _DECODE_ROWS or not batch * rows:
        return 1
    tile = _configuration(call, pack).streamed
    parts = programs(call.q.device) // (batch * heads // pack)
    return max(1, min(parts, call.k.shape[1] // (_PART_TILES * tile)))


def _split(call: Call, pack: int, parts: int) -> tuple[Tensor, Tensor]:
    """Split over keys: a partial state for each part, then one merge of all, the prior included."""
    shape = (parts, *call.q.shape[:3], call.v.shape[-1])
    partial = call.allocator.empty(shape, torch.float32, call.q.device, "temp")
    partial_lse = call.allocator.empty(shape[:-1], torch.float32, call.q.device, "temp")
    _launch(call, 0, pack, partial[0], partial_lse[0], None, (parts, partial.stride(0), partial_lse.stride(0)))
    out, lse = _new_state(call, call.out_dtype, False)
    merge_states(partial, partial_lse, call.prior, out, lse)
    for x in (partial, partial_lse):
        call.allocator.release(x, "temp")
    return out, lse


def merge_states(
    parts: Tensor, parts_lse: Tensor, prior: tuple[Tensor, Tensor] | None, out: Tensor, lse: Tensor
) -> None:
    """Merge (parts, batch, Nq, heads, d) states, and a prior, into contiguous out (batch, Nq, heads, d) and lse."""
    *shape, dim = out.shape
    rows = math.prod(shape)
    prior_out, prior_lse = (None, None) if prior is None else (x.contiguous() for x in prior)
    arguments = (parts, parts_lse, prior_out, prior_lse, out, lse, rows, parts.stride(0), parts_lse.stride(0))
    sizes = {"PARTS": parts.shape[0], "HEAD_DIM": dim, "BLOCK_D": 1 << (dim - 1).bit_length(), "ROWS": 16}
    run(merge_kernel, (-(-rows // 16),), *arguments, device=out.device, **sizes, num_warps=4)


def _configuration(call: Call, pack: int) -> Configuration:
    few = call.q.shape[1] * pack <= _DECODE_ROWS
    kernel = "decode" if few else "forward"
    head_dim = max(call.q.shape[-1], call.v.shape[-1])
    architecture = architecture_of(call.q.device)
    return choose(kernel, architecture, head_dim, call.q.element_size(), terms=has_terms(call))[0]


def _launch(
    call: Call,
    number: int,
    pack: int,
    out: Tensor,
    lse: Tensor,
    prior: tuple[Tensor, Tensor] | None,
    split: tuple[int, int, int] = (1, 0, 0),
) -> None:
    """One launch of the forward kernel over all jobs of a pass; split: (parts, stride of out's, stride of lse's part)."""
    configuration = _configuration(call, pack)
    owned = max(configuration.owned, 1 << (pack - 1).bit_length())
    key = ("queries", number, owned, configuration.streamed, pack, split[0])
    block = (owned, configuration.streamed)
    tables = tables_on(call.plan, key, call.q.device, lambda: query_tables(call.plan, number, block, pack, split[0]))
    prior_out, prior_lse = (None, None) if prior is None else prior
    strides = {f"{name}_strides": x.stride() for name, x in zip("qkv", (call.q, call.k, call.v), strict=True)}
    run(
        forward_kernel, persistent_grid(tables, call),
        call.q, call.k, call.v, out, lse, prior_out, prior_lse,
        **table_arguments(tables, call), **mask_arguments(call), **dropout_arguments(call), **term_arguments(call), **strides,
        out_strides=out.stride(), lse_strides=lse.stride(), part_strides=split[1:],
        prior_out_strides=None if prior_out is None else prior_out.stride(),
        prior_lse_strides=None if prior_lse is None else prior_lse.stride(),
        scale=abs(call.scale) * math.log2(math.e), FLIP=call.scale < 0,
        GROUP=call.q.shape[2] // call.k.shape[2], PACK=pack, BLOCK_M=owned, BLOCK_N=configuration.streamed,
        LISTED=tables.listed, device=call.q.device, **tile_options(call, configuration),
    )  # fmt: skip
