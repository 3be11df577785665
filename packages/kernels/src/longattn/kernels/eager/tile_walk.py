"""From a plan to tiles: the one loop that all torch rows share, and the state it writes.

`walk` cuts a plan into `Tile`s small enough that whatever a row makes for one of them stays a small share of q, k and v. With equal
strides the batch is just more tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from longattn.kernels.dispatch.call import Call
from longattn.kernels.eager.masks import attach_masks
from longattn.kernels.eager.tiles import Tile, head_groups, kept_tensors
from longattn.kernels.lowering.write_order import WriteOrder
from longattn.kernels.state import state_dtype
from longattn.patterncache import Branch, Plan
from longattn.patterncache.indices import Affine, Index
from longattn.patterncache.planning.bands import pieces, strips


def walk(
    call: Call, *, triangles: bool, cells: int, others: tuple[Tensor, ...] = (), at_once: int = 1
) -> Iterator[Tile]:
    """Tiles whose counts add up to the plan's.

    Args:
        call: what to compute.
        triangles: whether the row does causal tiles and keeps no scores. Then only masked work is cut into strips of query rows;
            else everything is.
        cells: how many numbers a tile may need at a time, outputs for a row that does triangles, else scores.
        at_once: heads x tiles that a `Tile` should have at least, where there are so many: what a kernel may spread over threads.
        others: tensors beside q, k, v whose query rows will be read, strided as they please.
    """
    group, tensors = call.q.shape[2] // call.k.shape[2], kept_tensors(call.plan)
    source = source_branches(call.plan, triangles)
    for branch, fresh in zip(source, writes(call.plan, triangles)[0], strict=True):
        strip = _strip_rows(call, branch, triangles, cells)
        for part in (branch,) if strip is None else strips(branch, strip):
            width = max(call.q.shape[-1], call.v.shape[-1]) if triangles and strip is None else part.k.count
            most = max(at_once, cells // (part.q.count * width))
            for heads, kv_heads in head_groups(part.heads, group, most):
                tile = Tile(
                    heads, kv_heads, 0, part.q, part.k, False, None, fresh and call.prior is None, index_tensors=tensors
                )
                yield from _batches(call, part, tile, max(1, most // heads.length), triangles, others)


def blocks(call: Call) -> Iterator[tuple[Branch, Tile]]:
    """Every branch with each of its tiles whole, one at a time and without masks, for rows that cut tiles themselves."""
    group, tensors = call.q.shape[2] // call.k.shape[2], kept_tensors(call.plan)
    for branch in call.plan.branches:
        for heads, kv_heads in head_groups(branch.heads, group, branch.heads.length):
            for batch in range(call.q.shape[0]):
                for first in range(branch.q.tiles):
                    q, k = branch.q.tile_range(first, 1), branch.k.tile_range(first, 1)
                    yield (
                        branch,
                        Tile(heads, kv_heads, batch, q, k, False, None, False, first=first, index_tensors=tensors),
                    )


def _strip_rows(call: Call, branch: Branch, triangles: bool, cells: int) -> int | None:
    """How many query rows a tile may have, or None: all."""
    beside = (call.mask, call.bias, call.by_distance)
    needs_mask = any(x is not None for x in beside) or (branch.band is not None and call.key_padding is not None)
    if triangles and not needs_mask:
        return None
    return max(16, min(512, cells // (branch.heads.length * branch.k.count)))


def source_branches(plan: Plan, triangles: bool) -> tuple[Branch, ...]:
    """What `walk` goes through: the plan's pieces for a row that does causal tiles, else its branches."""
    return pieces(plan) if triangles else plan.branches


def writes(plan: Plan, triangles: bool) -> tuple[tuple[bool, ...], bool]:
    """(fresh, complete). fresh: for each source branch, whether no earlier one wrote its query rows for its heads.

    complete: every row is written, and written before it is merged into, so that the memory may start as it comes. Strips that see
    nothing are left out of a walk, so only rows that see a key count as written. Kept with the plan.
    """
    key = f"writes triangles={triangles}"
    written: tuple[tuple[bool, ...], bool] | None = plan.derived.get(key)
    if written is None:
        source = source_branches(plan, triangles)
        order = WriteOrder(plan, len(source))
        fresh: list[bool] = []
        for branch in source:
            at = (branch.heads.positions()[:, None], branch.q.rows().reshape(1, -1))
            fresh.append(order.write(at, seeing=np.tile(branch.seeing, branch.q.tiles)) == 0)
        written = plan.derived[key] = (tuple(fresh), order.complete)
    return written


def _batches(
    call: Call, branch: Branch, tile: Tile, most: int, triangles: bool, others: tuple[Tensor, ...]
) -> Iterator[Tile]:
    batch, (nq, nk) = call.q.shape[0], (call.q.shape[1], call.k.shape[1])
    q, k = _as_tiles(branch.q, nq), _as_tiles(branch.k, nk)
    beside = (call.mask, call.bias, call.by_distance, call.key_padding)
    plain = all(x is None for x in beside) and not call.dropout_p
    if plain and _foldable(q, nq, (call.q, *others)) and _foldable(k, nk, (call.k, call.v)) and branch.uniform:
        q, k = replace(q, tiles=q.tiles * batch), replace(k, tiles=k.tiles * batch)
        batch = 1
    # torch's kernel scales its causal mask with the scores: -inf * 0 is NaN, and a negative scale turns the mask around.
    causal = triangles and plain and branch.triangle and call.scale > 0
    for b in range(batch):
        for first in range(0, q.tiles, most):
            count = min(most, q.tiles - first)
            part = replace(tile, batch=b, q=q.tile_range(first, count), k=k.tile_range(first, count), causal=causal)
            yield part if causal else attach_masks(call, branch, part, first)


def _as_tiles(index: Index, length: int) -> Index:
    """A single tile steps by a whole sequence, so that further batch elements are further tiles."""
    if isinstance(index, Affine) and index.tiles == 1:
        return replace(index, tile_step=length)
    return index


def _foldable(index: Index, length: int, tensors: tuple[Tensor, ...]) -> bool:
    return (
        isinstance(index, Affine)
        and index.tiles * index.tile_step == length
        and all(x.shape[0] == 1 or x.stride(0) == length * x.stride(1) for x in tensors)
    )


def new_state(call: Call, *, triangles: bool, filled: bool = False) -> tuple[Tensor, Tensor]:
    """(out, lse) to merge tiles into: the prior's copy, or unwritten where every row will be written, or empty.

    filled: start from the empty state even so. out is in out_dtype at once where no row is written twice, else in the state's float32 (float64).
    """
    dtype = state_dtype(call.q.dtype)
    if call.prior is not None:
        # Contiguous, whatever the prior's strides: tiles may run over the batch.
        out, lse = (x.to(dtype, copy=True, memory_format=torch.contiguous_format) for x in call.prior)
        return out, lse
    fresh, complete = writes(call.plan, triangles)
    batch, length, heads, _ = call.q.shape
    out_shape = (batch, length, heads, call.v.shape[-1])
    out_type = call.out_dtype if all(fresh) and not filled else dtype
    out = call.allocator.empty(out_shape, out_type, call.q.device, "output" if out_type == call.out_dtype else "temp")
    lse = call.allocator.empty(out_shape[:-1], dtype, call.q.device, "temp")
    return (out, lse) if complete and not filled else (out.zero_(), lse.fill_(-torch.inf))


def new_gradients(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in float32 (float64), to be added to: zeros, or the sum of dq so far."""
    dtype = state_dtype(call.q.dtype)
    dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (call.k, call.v))
    dq = None if call.part is None else call.part.dq
    return torch.zeros(call.q.shape, dtype=dtype, device=call.q.device) if dq is None else dq, dk, dv


def finish(call: Call, out: Tensor) -> Tensor:
    """`out` of `new_state` in out_dtype; the float32 original goes back to its owner."""
    if out.dtype == call.out_dtype:
        return out
    final = call.allocator.empty(out.shape, call.out_dtype, call.q.device, "output").copy_(out)
    if call.prior is None:
        call.allocator.release(out, "temp")
    return final
