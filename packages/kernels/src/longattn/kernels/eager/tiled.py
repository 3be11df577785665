"""Rows "tiled" and "tiled_k_major": attention as kernels do it, in torch operations one can read.

The equation is the online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022, algorithm 1). A branch is cut into
tiles of `TILE` query rows by `TILE` key rows; the plan says of each whether it is DENSE, a TRIANGLE (the band's edge, masked) or a SKIP,
which is neither read nor computed. Q-major: a q tile stays, k and v stream past it. K-major: a k, v tile stays, q streams past it and
partial states merge, which is split-K. Working memory is a few tiles, whatever the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longattn.kernels.dispatch.call import Call
from longattn.kernels.eager import gather
from longattn.kernels.eager.grouping import (
    dropped,
    group_rows,
    masked_scores,
    scores_and_slope,
    tile_state,
    ungroup_rows,
)
from longattn.kernels.eager.masks import add_distance_gradients, attach_masks
from longattn.kernels.eager.second_order import second_gradients
from longattn.kernels.eager.tile_walk import blocks, finish, new_gradients, new_state
from longattn.kernels.eager.tiles import Tile
from longattn.kernels.far_rows import exact_backward, exact_forward
from longattn.kernels.state import minus_delta_of, state_dtype
from longattn.patterncache import Branch
from longattn.patterncache.planning.bands import narrow_tile

TILE = 256
"""Rows of q, and of k, in a tile: large enough that a torch call is mostly arithmetic."""

Range = tuple[int, int]
Grads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class TiledRow:
    """One of the two orders. Results do not depend on it, beyond rounding."""

    q_major: bool
    CAPABILITY = replace(gather.CAPABILITY, bias_grad=False)
    second_backward = staticmethod(second_gradients)

    @exact_forward
    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """out (batch, Nq, heads, head_dim) in out_dtype, lse (batch, Nq, heads)."""
        out, lse = new_state(call, triangles=False, filled=True)
        for branch, block in blocks(call):
            if self.q_major:
                for rows in _ranges(block.q.count):
                    _stream_keys(call, branch, block, rows, out, lse)
            else:
                for rows in _ranges(block.k.count):
                    _stream_queries(call, branch, block, rows, out, lse)
        return finish(call, out), lse

    @exact_backward
    def backward(
        self, call: Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """(dq, dk, dv, None) in the dtypes of q, k, v; summed in float32 (float64)."""
        dq, dk, dv = new_gradients(call)
        # One number a row, read by every tile of that row.
        delta = -(minus_delta_of(grad_out, grad_lse, out) if call.part is None else call.part.minus_delta)
        pivot = lse.masked_fill(lse == -torch.inf, 0)
        for branch, block in blocks(call):
            for tile in self._tiles(call, branch, block):
                grads = _gradients(call, tile, grad_out, delta, pivot)
                tile.add_queries(dq, grads[0])
                tile.add_keys(dk, grads[1])
                tile.add_keys(dv, grads[2])
        dq, dk, dv = (x.to(dtype) for x, dtype in zip((dq, dk, dv), call.gradient_dtypes, strict=True))
        return dq, dk, dv, None

    def _tiles(self, call: Call, branch: Branch, block: Tile) -> Iterator[Tile]:
        if self.q_major:
            for q in _ranges(block.q.count):
                yield from (t for k in _ranges(block.k.count) if (t := _cut(call, branch, block, q, k)) is not None)
        else:
            for k in _ranges(block.k.count):
                yield from (t for q in _ranges(block.q.count) if (t := _cut(call, branch, block, q, k)) is not None)


Q_MAJOR = TiledRow(q_major=True)
K_MAJOR = TiledRow(q_major=False)


def _ranges(count: int) -> list[Range]:
    return [(first, min(TILE, count - first)) for first in range(0, count, TILE)]


def _cut(call: Call, branch: Branch, block: Tile, q: Range, k: Range) -> Tile | None:
    """The tile of these rows with its mask, or None where it is a SKIP. A DENSE tile has no mask."""
    part = narrow_tile(branch, q, k)
    if part is None:
        return None
    return attach_masks(call, part, replace(block, q=block.q.narrow(*q), k=block.k.narrow(*k)), block.first)


def _stream_keys(call: Call, branch: Branch, block: Tile, rows: Range, out: Tensor, lse: Tensor) -> None:
    """Q-major: one q tile, all its keys, one merge at the end."""
    dtype = state_dtype(call.q.dtype)
    own = replace(block, q=block.q.narrow(*rows), fresh=False)
    q = group_rows(own.queries(call.q).to(dtype), own)  # q tile: memory -> cache, stays for all its keys
    m = torch.full(q.shape[:-1], -torch.inf, dtype=dtype, device=q.device)  # running max: stays
    l = torch.zeros_like(m)  # running sum: stays
    acc = q.new_zeros((*q.shape[:-1], call.v.shape[-1]))  # output: stays, rescaled when m moves
    for keys in _ranges(block.k.count):
        tile = _cut(call, branch, block, rows, keys)
        if tile is None:
            continue
        k = tile.keys(call.k).to(dtype)  # k tile: memory -> cache, replaced every iteration
        scores = masked_scores(q, k, tile, call)
        m_new = torch.maximum(m, scores.amax(-1))
        # Finite where nothing was seen yet, so that -inf - -inf does not arise.
        pivot = m_new.masked_fill(m_new == -torch.inf, 0)
        p = (scores - pivot.unsqueeze(-1)).exp_()
        rescale = (m - pivot).exp_()
        l = l * rescale + p.sum(-1)
        v = tile.keys(call.v).to(dtype)  # v tile: memory -> cache, replaced every iteration
        acc = acc * rescale.unsqueeze(-1) + dropped(p, tile) @ v
        m = m_new
    acc = acc / l.masked_fill(l == 0, 1).unsqueeze(-1)
    own.merge(out, lse, ungroup_rows(acc, own), ungroup_rows(m + l.log(), own))  # cache -> memory, once a branch


def _stream_queries(call: Call, branch: Branch, block: Tile, keys: Range, out: Tensor, lse: Tensor) -> None:
    """K-major: one k, v tile, all its queries, a merge for each."""
    dtype = state_dtype(call.q.dtype)
    own = replace(block, k=block.k.narrow(*keys))
    # k, v tile: memory -> cache, stays for all its queries
    k, v = own.keys(call.k).to(dtype), own.keys(call.v).to(dtype)
    for rows in _ranges(block.q.count):
        tile = _cut(call, branch, block, rows, keys)
        if tile is None:
            continue
        q = group_rows(tile.queries(call.q).to(dtype), tile)  # q tile: memory -> cache, replaced every iteration
        # out, lse rows: memory -> cache -> memory, every iteration
        replace(tile, fresh=False).merge(out, lse, *tile_state(q, k, v, tile, call))


def _gradients(call: Call, tile: Tile, grad_out: Tensor, delta: Tensor, pivot: Tensor) -> Grads:
    """dS = P * (dO v - delta), with P = exp(s - lse) made anew from q and k."""
    dtype = state_dtype(call.q.dtype)
    q, grad = (group_rows(tile.queries(x).to(dtype), tile) for x in (call.q, grad_out))
    rows = [group_rows(tile.queries(x).unsqueeze(-1), tile) for x in (delta, pivot)]
    k, v = tile.keys(call.k).to(dtype), tile.keys(call.v).to(dtype)
    scores, slope = scores_and_slope(q, k, tile, call)
    p = (scores - rows[1]).exp_()
    ds = (dropped(grad @ v.transpose(-1, -2), tile) - rows[0]).mul_(p)
    add_distance_gradients(call, tile, ungroup_rows(ds, tile))
    ds = ds.mul_(call.scale) if slope is None else ds.mul_(slope).mul_(call.scale)
    dv = dropped(p, tile).transpose(-1, -2) @ grad
    return ungroup_rows(ds @ k, tile), ds.transpose(-1, -2) @ q, dv
