"""The derivative of a backward: what all rows in torch operations share, tile by tile.

A backward is a sum over pairs of dS = P * (dO v - delta), P = exp(s - lse), delta = rowsum(dO * O) - dlse, into dq = scale dS k,
dk = scale dS^T q, dv = P^T dO and dbias = dS. So its scalar product with what comes from above is a sum over tiles; each tile's part is
made again in differentiable operations, and autograd differentiates it in q, k, v, bias, dO, dlse, O and lse, of which the last two lead
back into the forward. One tile's graph is in memory at a time.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from longattn.kernels.dispatch.call import Call
from longattn.kernels.eager.grouping import dropped, group_rows, masked_scores, ungroup_rows
from longattn.kernels.eager.masks import at_tile, tile_picks
from longattn.kernels.eager.tile_walk import walk
from longattn.kernels.eager.tiles import Tile
from longattn.kernels.far_rows import has_far_rows
from longattn.kernels.state import state_dtype

_CELLS = 1 << 18
"""Scores of a tile: its graph holds some ten times as many numbers, 10 MiB in float32."""

Parts = list["Tensor | None"]


def second_gradients(call: Call, above: Parts, cotangents: tuple[Tensor, Tensor | None, Tensor, Tensor]) -> Parts:
    """Gradients of grad_out, grad_lse, out, lse, q, k, v and bias, from those of dq, dk, dv and dbias; None where there is none.

    Args:
        call: the forward's. above: of dq, dk, dv and dbias, each or None. cotangents: grad_out, grad_lse or None, out, lse.

    Raises:
        NotImplementedError: a row whose every key has a huge bias, whose first derivatives are made elsewhere.
    """
    grad_out, grad_lse, out, lse = cotangents
    if call.bias is not None and has_far_rows(call, lse):
        raise NotImplementedError(
            "second derivatives are not supported where all that a query sees has a bias beyond 2^20: hide such keys with -inf"
        )
    wide = state_dtype(call.q.dtype)
    inputs: Parts = [grad_out, grad_lse, out, lse, call.q, call.k, call.v, call.bias]
    totals = [None if x is None else torch.zeros(x.shape, dtype=wide, device=x.device) for x in inputs]
    # As dq, dk and dv are: tiles may run over the batch.
    above = [None if x is None else x.contiguous() for x in above]
    others = tuple(x for x in (grad_out, grad_lse, out, lse, above[0]) if x is not None)
    for tile in walk(call, triangles=False, cells=_CELLS, others=others):
        _add_tile(call, tile, above, inputs, totals)
    return [None if total is None or x is None else total.to(x.dtype) for total, x in zip(totals, inputs, strict=True)]


def _add_tile(call: Call, tile: Tile, above: Parts, inputs: Parts, totals: Parts) -> None:
    wide = state_dtype(call.q.dtype)
    grad_out, grad_lse, out, lse = inputs[:4]
    queries = [None if x is None else _rows(x, tile).to(wide) for x in (grad_out, grad_lse, out, lse, call.q)]
    keys = [tile.keys(x).to(wide) for x in (call.k, call.v)]
    bias = None if tile.bias is None else tile.bias.to(wide)
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in (*queries, *keys, bias)]
    from_above = [
        None if x is None else f(x).to(wide)
        for x, f in zip(above[:3], (lambda x: _rows(x, tile), tile.keys, tile.keys), strict=True)
    ]
    if above[3] is not None:
        assert call.bias is not None
        from_above.append(at_tile(above[3].reshape(call.bias.shape), tile).to(wide))
    with torch.enable_grad():
        product = _product(call, tile, leaves, from_above)
    wanted = [x for x in leaves if x is not None]
    found = iter(
        torch.autograd.grad(product, wanted, allow_unused=True) if product.requires_grad else [None] * len(wanted)
    )
    for at, leaf in enumerate(leaves):
        part, total = None if leaf is None else next(found), totals[at]
        if part is None or total is None:
            continue
        if at < 5:
            part = ungroup_rows(part, tile)
            tile.add_queries(total.unsqueeze(-1) if total.dim() == 3 else total, part)
        elif at < 7:
            tile.add_keys(total, part)
        else:
            total.index_put_(tile_picks(total, tile), part, accumulate=True)


def _rows(x: Tensor, tile: Tile) -> Tensor:
    """Query rows of x (batch, Nq, heads[, d]), grouped: (tiles, kv_heads, rows, d or 1)."""
    rows = tile.queries(x)
    return group_rows(rows.unsqueeze(-1) if x.dim() == 3 else rows, tile)


def _product(call: Call, tile: Tile, leaves: Parts, above: Parts) -> Tensor:
    """The scalar product of a tile's part of the backward with what comes from above."""
    grad, grad_lse, out, lse, q, k, v, bias = leaves
    assert (
        grad is not None and out is not None and lse is not None and q is not None and k is not None and v is not None
    )
    scores = masked_scores(q, k, replace(tile, bias=bias), call.scale)
    # Finite where nothing was seen: the scores are all -inf.
    weights = (scores - torch.where(lse == -torch.inf, 0.0, lse)).exp()
    delta = (grad * out).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse
    grad_scores = (dropped(grad @ v.transpose(-1, -2), tile) - delta) * weights
    total = grad_scores.new_zeros(())
    if above[0] is not None:
        total = total + (above[0] * (grad_scores @ k)).sum() * call.scale
    if above[1] is not None:
        total = total + (above[1] * (grad_scores.transpose(-1, -2) @ q)).sum() * call.scale
    if above[2] is not None:
        total = total + (above[2] * (dropped(weights.clone(), tile).transpose(-1, -2) @ grad)).sum()
    if len(above) > 3 and above[3] is not None:
        shape = (-1, tile.heads.length, tile.q.count, tile.k.count)
        total = total + (group_rows(above[3].expand(shape), tile) * grad_scores).sum()
    return total
