"""Row "gather": grouped gather in plain torch operations, for any device, any mask, any head_dim.

For a strip of query rows at a time: gather q, k, v, scores in float32 (float64 for float64), softmax, merge. Backward is the closed
form: P = exp(s - lse), dS = P * (dO v - delta + dlse), delta = rowsum(dO * O). Readable first; it is the row that always fits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longattn.kernels.dispatch.call import Call
from longattn.kernels.dispatch.capability import FLOAT32_WITHIN, Capability
from longattn.kernels.eager.grouping import dropped, group_rows, scores_and_slope, tile_state, ungroup_rows
from longattn.kernels.eager.masks import add_distance_gradients, sum_to, tile_picks
from longattn.kernels.eager.second_order import second_gradients
from longattn.kernels.eager.tile_walk import finish, new_gradients, new_state, walk
from longattn.kernels.eager.tiles import Tile
from longattn.kernels.far_rows import exact_backward, exact_forward
from longattn.kernels.state import FLOATS, state_dtype

CAPABILITY = Capability(
    devices=(),
    # MPS has no float64.
    dtypes={"": FLOATS, "mps": (torch.float16, torch.bfloat16, torch.float32)},
    tolerance=FLOAT32_WITHIN,
    # Elsewhere index_add_ adds with float atomics, in no fixed order.
    deterministic=("cpu",),
    bias_grad=True,
    softcap=True,
    by_distance=True,
    by_distance_grad=True,
    dropout=True,
)

_CELLS = 1 << 21
"""Scores that may be in memory at a time: 8 MiB in float32."""


second_backward = second_gradients


@exact_forward
def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out (batch, Nq, heads, head_dim) in out_dtype, lse (batch, Nq, heads)."""
    out, lse = new_state(call, triangles=False)
    for tile in walk(call, triangles=False, cells=_CELLS):
        q, k, v = _operands(call, tile)
        tile.merge(out, lse, *tile_state(q, k, v, tile, call))
    return finish(call, out), lse


@exact_backward
def backward(
    call: Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv) in the dtypes of q, k, v and, with bias_grad, dbias in the shape and dtype of bias; summed in float32 (float64)."""
    dtype = state_dtype(call.q.dtype)
    dq, dk, dv = new_gradients(call)
    dbias = (
        torch.zeros(call.bias.shape, dtype=dtype, device=call.q.device) if bias_grad and call.bias is not None else None
    )
    others = tuple(x for x in (grad_out, out, lse, grad_lse) if x is not None)
    for tile in walk(call, triangles=False, cells=_CELLS, others=others):
        q, k, v = _operands(call, tile)
        grad = group_rows(tile.queries(grad_out).to(dtype), tile)
        if call.part is None:
            delta = (grad * group_rows(tile.queries(out).to(dtype), tile)).sum(-1, keepdim=True)
            if grad_lse is not None:
                delta = delta - group_rows(tile.queries(grad_lse).to(dtype).unsqueeze(-1), tile)
        else:
            delta = group_rows(tile.queries(call.part.minus_delta).unsqueeze(-1), tile).neg()
        pivot = group_rows(tile.queries(lse).unsqueeze(-1), tile)
        scores, slope = scores_and_slope(q, k, tile, call)
        weights = (scores - pivot.masked_fill(pivot == -torch.inf, 0)).exp_()
        grad_scores = dropped(grad @ v.transpose(-1, -2), tile).sub_(delta).mul_(weights)
        add_distance_gradients(call, tile, ungroup_rows(grad_scores, tile))
        if dbias is not None:
            at = tile_picks(dbias, tile)
            dbias.index_put_(at, sum_to(ungroup_rows(grad_scores, tile), at), accumulate=True)
        grad_scores.mul_(call.scale)
        if slope is not None:
            grad_scores.mul_(slope)
        tile.add_queries(dq, ungroup_rows(grad_scores @ k, tile))
        tile.add_keys(dk, grad_scores.transpose(-1, -2) @ q)
        tile.add_keys(dv, dropped(weights, tile).transpose(-1, -2) @ grad)
    final = None if dbias is None or call.bias is None else dbias.to(call.bias.dtype)
    dq, dk, dv = (x.to(dtype) for x, dtype in zip((dq, dk, dv), call.gradient_dtypes, strict=True))
    return dq, dk, dv, final


def _operands(call: Call, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    dtype = state_dtype(call.q.dtype)
    return group_rows(tile.queries(call.q).to(dtype), tile), tile.keys(call.k).to(dtype), tile.keys(call.v).to(dtype)
