"""The derivative of a backward: what all rows in torch operations share, tile by tile.

A backward is dS = P * (keep * dO v^T - delta), P = exp(s - lse), delta = rowsum(dO * O) - dlse, then dq = scale dS k, dk = scale dS^T q,
dv = (keep * P)^T dO and dbias = dS. Its scalar product with what comes from above, A of dq, B of dk, C of dv and E of dbias, is a sum over
pairs. With W = scale (A k^T + q B^T) + E, its gradients are T = P * (W * (keep * dO v^T - delta) + keep * dO C^T) of s, -rowsum(T) of lse,
W * P of dO v^T (times keep) and -rowsum(W * P) of delta; those of q, k, v, bias, dO, dlse and O follow. Gradients of O and lse lead back
into the forward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longattn.kernels.dispatch.call import Call
from longattn.kernels.eager.grouping import dropped, group_rows, masked_scores, ungroup_rows
from longattn.kernels.eager.masks import at_tile, sum_to, tile_picks
from longattn.kernels.eager.tile_walk import walk
from longattn.kernels.eager.tiles import Tile
from longattn.kernels.far_rows import has_far_rows
from longattn.kernels.state import state_dtype

_CELLS = 1 << 19
"""Scores of a tile: some six such matrices are in memory at a time, 12 MiB in float32."""

Parts = list["Tensor | None"]


def second_gradients(call: Call, above: Parts, cotangents: tuple[Tensor, Tensor | None, Tensor, Tensor]) -> Parts:
    """Gradients of grad_out, grad_lse, out, lse, q, k, v, bias and by_distance, from those of dq, dk, dv and dbias; None where there is none.

    Args:
        call: the forward's. above: of dq, dk, dv and dbias, each or None. cotangents: grad_out, grad_lse or None, out, lse.

    Raises:
        NotImplementedError: a row whose every key has a huge bias, whose first derivatives are made elsewhere; score terms.
    """
    grad_out, grad_lse, out, lse = cotangents
    if call.softcap or call.by_distance is not None:
        raise NotImplementedError(
            "second derivatives are not supported with score_terms: give what is added as a floating attention_mask"
        )
    if call.bias is not None and has_far_rows(call, lse):
        raise NotImplementedError(
            "second derivatives are not supported where all that a query sees has a huge bias (see far_rows): hide such keys with -inf"
        )
    wide = state_dtype(call.q.dtype)
    inputs: Parts = [grad_out, grad_lse, out, lse, call.q, call.k, call.v, call.bias]
    totals = [None if x is None else torch.zeros(x.shape, dtype=wide, device=x.device) for x in inputs]
    # As dq, dk and dv are: tiles may run over the batch.
    above = [None if x is None else x.contiguous() for x in above]
    others = tuple(x for x in (grad_out, grad_lse, out, lse, above[0]) if x is not None)
    for tile in walk(call, triangles=False, cells=_CELLS, others=others):
        _add_tile(call, tile, above, inputs, totals)
    gradients = [
        None if total is None or x is None else total.to(x.dtype) for total, x in zip(totals, inputs, strict=True)
    ]
    return [*gradients, None]


def _add_tile(call: Call, tile: Tile, above: Parts, inputs: Parts, totals: Parts) -> None:
    wide, scale = state_dtype(call.q.dtype), call.scale
    grad, grad_lse, out, lse, q = (None if x is None else _rows(x, tile).to(wide) for x in inputs[:5])
    assert grad is not None and out is not None and lse is not None and q is not None
    k, v = (tile.keys(x).to(wide) for x in (call.k, call.v))
    # Finite where nothing was seen: the scores are all -inf.
    weights = (masked_scores(q, k, tile, call) - lse.masked_fill(lse == -torch.inf, 0)).exp_()
    delta = (grad * out).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse
    inner = dropped(grad @ v.transpose(-1, -2), tile).sub_(delta)
    grad_scores = weights * inner
    of_dq = None if above[0] is None else _rows(above[0], tile).to(wide)
    of_dk, of_dv = (None if x is None else tile.keys(x).to(wide) for x in above[1:3])
    of_scores = torch.zeros_like(weights)
    if of_dq is not None:
        of_scores += (of_dq @ k.transpose(-1, -2)).mul_(scale)
    if of_dk is not None:
        of_scores += (q @ of_dk.transpose(-1, -2)).mul_(scale)
    if above[3] is not None and call.bias is not None:
        part = at_tile(above[3].reshape(call.bias.shape), tile).to(wide)
        of_scores += group_rows(part.expand(-1, tile.heads.length, tile.q.count, tile.k.count), tile)
    through = inner.mul_(of_scores)
    if of_dv is not None:
        through += dropped(grad @ of_dv.transpose(-1, -2), tile)
    through *= weights
    of_product = of_scores.mul_(weights)
    of_delta = -of_product.sum(-1, keepdim=True)
    of_product = dropped(of_product, tile)
    of_q, of_k = (through @ k).mul_(scale), (through.transpose(-1, -2) @ q).mul_(scale)
    if of_dk is not None:
        of_q += (grad_scores @ of_dk).mul_(scale)
    if of_dq is not None:
        of_k += (grad_scores.transpose(-1, -2) @ of_dq).mul_(scale)
    of_grad = of_product @ v + of_delta * out
    if of_dv is not None:
        of_grad += dropped(weights, tile) @ of_dv
    of_v = of_product.transpose(-1, -2) @ grad
    parts = (of_grad, -of_delta, of_delta * grad, -through.sum(-1, keepdim=True), of_q)
    for total, part in zip(totals[:5], parts, strict=True):
        if total is not None:
            tile.add_queries(total.unsqueeze(-1) if total.dim() == 3 else total, ungroup_rows(part, tile))
    for total, part in zip(totals[5:7], (of_k, of_v), strict=True):
        assert total is not None
        tile.add_keys(total, part)
    of_bias = totals[7]
    if of_bias is not None:
        at = tile_picks(of_bias, tile)
        of_bias.index_put_(at, sum_to(ungroup_rows(through, tile), at), accumulate=True)


def _rows(x: Tensor, tile: Tile) -> Tensor:
    """Query rows of x (batch, Nq, heads[, d]), grouped: (tiles, kv_heads, rows, d or 1)."""
    rows = tile.queries(x)
    return group_rows(rows.unsqueeze(-1) if x.dim() == 3 else rows, tile)
