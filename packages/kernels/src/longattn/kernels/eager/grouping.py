"""Scores of a tile in torch operations, for rows that hold them: grouped heads as rows, masks, bias, dropout."""

# torch's own types are partial.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import torch
from torch import Tensor

from longattn.kernels.dispatch.call import Call
from longattn.kernels.eager.tiles import Tile
from longattn.kernels.far_rows import bounded


def group_rows(x: Tensor, tile: Tile) -> Tensor:
    """(tiles, heads, n, ...) to (tiles, kv_heads, heads per kv head * n, ...): heads that share a kv head become rows."""
    return x.unflatten(1, (tile.kv_heads.length, -1)).flatten(2, 3)


def ungroup_rows(x: Tensor, tile: Tile) -> Tensor:
    """The inverse of `group_rows`."""
    return x.unflatten(2, (tile.heads.length // tile.kv_heads.length, tile.q.count)).flatten(1, 2)


def masked_scores(q: Tensor, k: Tensor, tile: Tile, call: Call) -> Tensor:
    """scale * q k^T, capped, + bias, -inf where hidden: (tiles, kv_heads, rows, k count), for grouped q."""
    return _hidden(_capped((q @ k.transpose(-1, -2)).mul_(call.scale), call), tile)


def scores_and_slope(q: Tensor, k: Tensor, tile: Tile, call: Call) -> tuple[Tensor, Tensor | None]:
    """`masked_scores`, and the derivative of the softcap there, 1 - tanh^2; None: there is no softcap."""
    scores = _capped((q @ k.transpose(-1, -2)).mul_(call.scale), call)
    slope = 1 - (scores / call.softcap).square_() if call.softcap else None
    return _hidden(scores, tile), slope


def _capped(scores: Tensor, call: Call) -> Tensor:
    """In place."""
    return scores.div_(call.softcap).tanh_().mul_(call.softcap) if call.softcap else scores


def _hidden(scores: Tensor, tile: Tile) -> Tensor:
    """Biased and masked, in place."""
    whole = (-1, tile.heads.length, tile.q.count, tile.k.count)
    if tile.bias is not None:
        scores += group_rows(bounded(tile.bias).expand(whole), tile)
    if tile.seen is not None:
        scores.masked_fill_(~group_rows(tile.seen.expand(whole), tile), -torch.inf)
    return scores


def tile_state(q: Tensor, k: Tensor, v: Tensor, tile: Tile, call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) of a tile, (tiles, heads, q count, ...), for grouped q."""
    scores = masked_scores(q, k, tile, call)
    # Finite where every key is hidden, so that -inf - -inf does not arise.
    pivot = scores.amax(-1, keepdim=True)
    pivot = pivot.masked_fill(pivot == -torch.inf, 0)
    weights = (scores - pivot).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = (pivot + total.log()).squeeze(-1)
    out = dropped(weights, tile) @ v / total.masked_fill(total == 0, 1)
    return ungroup_rows(out, tile), ungroup_rows(lse, tile)


def dropped(x: Tensor, tile: Tile) -> Tensor:
    """x (tiles, kv_heads, rows, k count) times what dropout keeps of it, in place."""
    return x if tile.keep is None else x.mul_(group_rows(tile.keep, tile))
