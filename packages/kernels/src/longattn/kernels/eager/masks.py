"""What hides, biases or drops the pairs of one tile."""

# torch's own types are partial.
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from longattn.kernels.dispatch.call import Call
from longattn.kernels.eager.tiles import Tile, index_tensor
from longattn.kernels.far_rows import bounded
from longattn.kernels.philox import keep_scale
from longattn.kernels.state import state_dtype
from longattn.kernels.terms import add_gradients, at_distances
from longattn.patterncache import Branch
from longattn.patterncache.indices import Affine


def attach_masks(call: Call, branch: Branch, tile: Tile, first: int) -> Tile:
    """`tile`, whose tiles begin with the branch's `first`, with its masks, bias and dropout."""
    bias = None if call.bias is None else at_tile(call.bias, tile)
    keep = _keep(call, branch, tile) if call.dropout_p else None
    seen = _seen(call, branch, tile, bias, first)
    distance = None
    if call.by_distance is not None:
        distance = _distance(call, branch, tile)
        added = at_distances(_of_heads(call.by_distance, tile), distance).transpose(0, 1)
        bias = added if bias is None else bounded(bias).to(added.dtype) + added
    return replace(tile, seen=seen, bias=bias, keep=keep, distance=distance)


def add_distance_gradients(call: Call, tile: Tile, grads: Tensor) -> None:
    """Add to what the call collects of `by_distance` its gradient from those of a tile's scores (tiles, heads, q count, k count)."""
    if call.by_distance_grad is None or tile.distance is None:
        return
    # A tile whose distances are the same in all its tiles has them once.
    parts = grads.sum(0, keepdim=True) if len(tile.distance) == 1 else grads
    # Heads as a strided view, so that it is added to in place.
    add_gradients(_of_heads(call.by_distance_grad, tile), tile.distance, parts.transpose(0, 1))


def _of_heads(by_distance: Tensor, tile: Tile) -> Tensor:
    return by_distance[tile.heads.start : tile.heads.last + 1 : tile.heads.step]


def _positions(call: Call, branch: Branch, tile: Tile) -> tuple[Tensor, Tensor]:
    """Of query rows (tiles, q count), and of key rows (tiles, k count)."""
    q_rows, k_rows = (index_tensor(i, call.q.device, tile.index_tensors).view(-1, i.count) for i in (tile.q, tile.k))
    return branch.q_at[0] + branch.q_at[1] * q_rows, branch.k_at[0] + branch.k_at[1] * k_rows


def _distance(call: Call, branch: Branch, tile: Tile) -> Tensor:
    q, k = tile.q, tile.k
    # Tiles that are equally far apart: one says all.
    if isinstance(q, Affine) and isinstance(k, Affine) and q.tile_step * branch.q_at[1] == k.tile_step * branch.k_at[1]:
        tile = replace(tile, q=q.tile_range(0, 1), k=k.tile_range(0, 1))
    q_at, k_at = _positions(call, branch, tile)
    return k_at[:, None, :] - q_at[:, :, None]


def _keep(call: Call, branch: Branch, tile: Tile) -> Tensor:
    heads = torch.from_numpy(tile.heads.positions()).to(call.q.device) + call.plan.rectangle.heads.start
    q_at, k_at = _positions(call, branch, tile)
    return keep_scale(
        call.seed,
        call.dropout_p,
        torch.tensor(tile.batch, device=call.q.device),
        heads[None, :, None, None],
        q_at[:, None, :, None],
        k_at[:, None, None, :],
        state_dtype(call.q.dtype),
    )


def _seen(call: Call, branch: Branch, tile: Tile, bias: Tensor | None, first: int) -> Tensor | None:
    """The tile's mask: band, attention mask, hidden by bias and key padding together; None where everything is seen."""
    device = call.q.device
    seen: Tensor | None = None if bias is None else bias != -torch.inf
    visible = branch.visible
    if visible is not None:
        shown = visible if len(visible) == 1 else visible[first : first + tile.q.tiles]
        band = torch.tensor(shown, device=device)[:, None]
        seen = band if seen is None else seen & band
    if call.key_padding is not None:
        rows = index_tensor(tile.k, device, tile.index_tensors).view(tile.k.tiles, tile.k.count)
        shown = ~call.key_padding[tile.batch][rows][:, None, None]
        seen = shown if seen is None else seen & shown
    if call.mask is not None:
        shown = at_tile(call.mask, tile)
        seen = shown if seen is None else seen & shown
    return seen


def tile_picks(mask: Tensor, tile: Tile) -> tuple[Tensor, ...]:
    """Index tensors of the tile's part of a tensor broadcastable to (batch, heads, Nq, Nk); an axis of length 1 is picked at 0."""
    picks = (
        torch.tensor([[[[tile.batch]]]], device="cpu"),
        torch.from_numpy(tile.heads.positions())[None, :, None, None],
        index_tensor(tile.q, mask.device, tile.index_tensors).view(-1, 1, tile.q.count, 1),
        index_tensor(tile.k, mask.device, tile.index_tensors).view(-1, 1, 1, tile.k.count),
    )
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=mask.device)
    return tuple(p.to(mask.device) if n > 1 else zero for p, n in zip(picks, mask.shape, strict=True))


def sum_to(x: Tensor, at: tuple[Tensor, ...]) -> Tensor:
    """Sum x over the axes that the index tensors `at` broadcast."""
    shape = torch.broadcast_shapes(*(p.shape for p in at))
    return x.sum([axis for axis, n in enumerate(shape) if n == 1], keepdim=True) if 1 in shape else x


def at_tile(mask: Tensor, tile: Tile) -> Tensor:
    """(tiles or 1, heads or 1, q count or 1, k count or 1) of a tensor broadcastable to (batch, heads, Nq, Nk)."""
    return mask[tile_picks(mask, tile)]
