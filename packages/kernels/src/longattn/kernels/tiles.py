"""From a plan to tensor views: the one loop that all torch rows share.

`walk` cuts a plan into `Tile`s small enough that whatever a row makes for one of them stays a small share of q, k and v. A tile reads
and writes the (batch, seq, heads, ...) tensors through strided views where its rows are affine, and through index tensors where they
are listed. With equal strides the batch is just more tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from longattn.kernels.state import merge_into, state_dtype
from longattn.patterncache import Branch, Plan, Span
from longattn.patterncache.band import pieces, strips
from longattn.patterncache.index import Affine, Index, Listed


@dataclass(frozen=True)
class Call:
    """One rectangle to compute, checked, on real tensors.

    Attributes:
        q: (batch, Nq, heads, head_dim). k, v: (batch, Nk, kv_heads, head_dim), padded rows zeroed.
        plan: who sees whom, in rows of these tensors.
        scale: of the scores.
        mask: bool, True = may see, 4-D and broadcastable to (batch, heads, Nq, Nk), or None.
        key_padding: (batch, Nk) bool, True = padding, or None.
        prior: (out, lse) to merge onto, read only, or None.
        out_dtype: dtype of the returned out.
        deterministic: equal inputs must give equal bits.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    plan: Plan
    scale: float
    mask: Tensor | None
    key_padding: Tensor | None
    prior: tuple[Tensor, Tensor] | None
    out_dtype: torch.dtype
    deterministic: bool


@dataclass(frozen=True)
class Tile:
    """Some equal tiles of one branch, for one group of heads.

    Attributes:
        heads, kv_heads: rows of the head axes; heads are a whole multiple of kv_heads, neighbours sharing one.
        batch: the first batch element; q and k count rows from its start.
        q, k: rows.
        causal: row a sees exactly keys 0 .. a, and `seen` is None.
        seen: (tiles or 1, heads or 1, q count or 1, k count) bool, or None: all (or causal).
        fresh: no earlier tile wrote these query rows of these heads.
    """

    heads: Span
    kv_heads: Span
    batch: int
    q: Index
    k: Index
    causal: bool
    seen: Tensor | None
    fresh: bool

    def queries(self, x: Tensor) -> Tensor:
        """Query rows of x (batch, Nq, heads, ...) as (tiles, heads, q count, ...)."""
        return take(x, self.batch, self.heads, self.q)

    def keys(self, x: Tensor) -> Tensor:
        """Key rows of x (batch, Nk, kv_heads, ...) as (tiles, kv_heads, k count, ...)."""
        return take(x, self.batch, self.kv_heads, self.k)

    def merge(self, out: Tensor, lse: Tensor, tile_out: Tensor, tile_lse: Tensor) -> None:
        """Merge a tile's result (tiles, heads, q count, ...) into out and lse, in place, on its rows only."""
        for whole, part in ((out, tile_out), (lse, tile_lse)):
            if self.fresh and isinstance(self.q, Listed):
                put(whole, self.batch, self.heads, self.q, part.to(whole.dtype))
            elif self.fresh:
                self.queries(whole).copy_(part)
        if self.fresh:
            return
        out_rows, lse_rows = self.queries(out), self.queries(lse)
        merge_into(out_rows, lse_rows, tile_out.to(out.dtype), tile_lse.to(lse.dtype))
        if isinstance(self.q, Listed):  # the rows were copies
            put(out, self.batch, self.heads, self.q, out_rows)
            put(lse, self.batch, self.heads, self.q, lse_rows)

    def add_queries(self, total: Tensor, part: Tensor) -> None:
        """Add (tiles, heads, q count, d) to the query rows of `total`, in place."""
        add(total, self.batch, self.heads, self.q, part)

    def add_keys(self, total: Tensor, part: Tensor) -> None:
        """Add (tiles, kv_heads, k count, d) to the key rows of `total`, in place; a row may stand in several tiles."""
        add(total, self.batch, self.kv_heads, self.k, part)


def take(x: Tensor, batch: int, heads: Span, index: Index) -> Tensor:
    """Rows of x (batch, seq, heads, ...) as (tiles, heads, count, ...): a view where affine, a copy where listed."""
    if isinstance(index, Affine):
        size = (index.tiles, heads.length, index.count, *x.shape[3:])
        stride = (index.tile_step * x.stride(1), heads.step * x.stride(2), index.step * x.stride(1), *x.stride()[3:])
        begin = batch * x.stride(0) + index.start * x.stride(1) + heads.start * x.stride(2)
        return x.as_strided(size, stride, x.storage_offset() + begin)
    rows = _index_tensor(index, x.device)
    found = x[batch][:, heads.start : heads.last + 1 : heads.step].index_select(0, rows)
    return found.unflatten(0, (index.tiles, index.count)).transpose(1, 2)


def put(x: Tensor, batch: int, heads: Span, index: Listed, value: Tensor) -> None:
    """Write (tiles, heads, count, ...) to listed rows of x (batch, seq, heads, ...), each of which stands in one tile."""
    rows = _index_tensor(index, x.device)
    x[batch][:, heads.start : heads.last + 1 : heads.step].index_copy_(0, rows, value.transpose(1, 2).flatten(0, 1))


def add(x: Tensor, batch: int, heads: Span, index: Index, value: Tensor) -> None:
    """Add (tiles, heads, count, d) to rows of x (batch, seq, heads, d), in place."""
    if isinstance(index, Affine) and index.distinct:
        take(x, batch, heads, index).add_(value)
        return
    rows = _index_tensor(index, x.device)
    part = value.transpose(1, 2).flatten(0, 1).to(x.dtype)
    x[batch][:, heads.start : heads.last + 1 : heads.step].index_add_(0, rows, part)


def _index_tensor(index: Index, device: torch.device) -> Tensor:
    return torch.from_numpy(index.rows().reshape(-1)).to(device)


def head_groups(heads: Span, group: int) -> Iterator[tuple[Span, Span]]:
    """Split query heads into (heads, kv_heads) pairs, both strided, where `group` neighbouring query heads share a kv head."""
    if group == 1:
        yield heads, heads
    elif heads.step == 1 and heads.start % group == 0 and heads.length % group == 0:
        yield heads, Span(heads.start // group, heads.length // group)
    elif heads.step % group == 0:
        yield heads, Span(heads.start // group, heads.length, heads.step // group)
    else:
        positions = heads.positions()
        for kv in np.unique(positions // group):
            members = np.flatnonzero(positions // group == kv)
            yield heads.take(int(members[0]), len(members)), Span(int(kv), 1)


def walk(call: Call, *, triangles: bool, cells: int, others: tuple[Tensor, ...] = ()) -> Iterator[Tile]:
    """Tiles whose counts add up to the plan's.

    Args:
        call: what to compute.
        triangles: whether the row does causal tiles and keeps no scores. Then only masked work is cut into strips of query rows;
            else everything is.
        cells: how many numbers a tile may need at a time, outputs for a row that does triangles, else scores.
        others: tensors beside q, k, v whose query rows will be read, strided as they please.
    """
    group = call.q.shape[2] // call.k.shape[2]
    source = source_branches(call.plan, triangles)
    for branch, fresh in zip(source, writes(call.plan, triangles)[0], strict=True):
        strip = _strip_rows(call, branch, triangles, cells)
        for part in (branch,) if strip is None else strips(branch, strip):
            for heads, kv_heads in head_groups(part.heads, group):
                tile = Tile(heads, kv_heads, 0, part.q, part.k, False, None, fresh and call.prior is None)
                width = call.q.shape[-1] if triangles and strip is None else part.k.count
                most = max(1, cells // (heads.length * part.q.count * width))
                yield from _batches(call, part, tile, most, triangles, others)


def _strip_rows(call: Call, branch: Branch, triangles: bool, cells: int) -> int | None:
    """How many query rows a tile may have, or None: all."""
    needs_mask = call.mask is not None or (branch.band is not None and call.key_padding is not None)
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
    found: tuple[tuple[bool, ...], bool] | None = plan.derived.get(key)
    if found is None:
        written = np.zeros(plan.rectangle.shape[:2], bool)
        fresh, complete = [], True
        for branch in source_branches(plan, triangles):
            at = (branch.heads.positions()[:, None], branch.q.rows().reshape(1, -1))
            fresh.append(not written[at].any())
            complete &= fresh[-1] or bool(written[at].all())
            written[at] |= np.tile(branch.seeing, branch.q.tiles)
        found = plan.derived[key] = (tuple(fresh), complete and bool(written.all()))
    return found


def _batches(
    call: Call, branch: Branch, tile: Tile, most: int, triangles: bool, others: tuple[Tensor, ...]
) -> Iterator[Tile]:
    batch, (nq, nk) = call.q.shape[0], (call.q.shape[1], call.k.shape[1])
    q, k = _as_tiles(branch.q, nq), _as_tiles(branch.k, nk)
    plain = call.mask is None and call.key_padding is None
    if plain and _foldable(q, nq, (call.q, *others)) and _foldable(k, nk, (call.k, call.v)) and branch.uniform:
        q, k = replace(q, tiles=q.tiles * batch), replace(k, tiles=k.tiles * batch)
        batch = 1
    causal = triangles and plain and branch.triangle
    for b in range(batch):
        for first in range(0, q.tiles, most):
            count = min(most, q.tiles - first)
            part = replace(tile, batch=b, q=q.tile_range(first, count), k=k.tile_range(first, count), causal=causal)
            yield part if causal else replace(part, seen=_seen(call, branch, part, first, count))


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


def _seen(call: Call, branch: Branch, tile: Tile, first: int, count: int) -> Tensor | None:
    """The tile's mask: band, attention mask and key padding together; None where everything is seen."""
    device = call.q.device
    seen: Tensor | None = None
    visible = branch.visible
    if visible is not None:
        shown = visible if len(visible) == 1 else visible[first : first + count]
        seen = torch.tensor(shown, device=device)[:, None]
    if call.key_padding is not None:
        rows = torch.from_numpy(tile.k.rows()).to(device)
        kept = ~call.key_padding[tile.batch][rows][:, None, None]
        seen = kept if seen is None else seen & kept
    if call.mask is not None:
        kept = _mask_tile(call.mask, tile)
        seen = kept if seen is None else seen & kept
    return seen


def _mask_tile(mask: Tensor, tile: Tile) -> Tensor:
    """(tiles or 1, heads or 1, q count or 1, k count or 1) of a mask broadcastable to (batch, heads, Nq, Nk)."""
    picks = (
        torch.tensor([[[[tile.batch]]]]),
        torch.from_numpy(tile.heads.positions())[None, :, None, None],
        torch.from_numpy(tile.q.rows())[:, None, :, None],
        torch.from_numpy(tile.k.rows())[:, None, None, :],
    )
    # An axis of length 1 is broadcast, not indexed.
    at = tuple(p.to(mask.device) if n > 1 else 0 for p, n in zip(picks, mask.shape, strict=True))
    picked = mask[at]
    return picked if isinstance(picked, Tensor) and picked.dim() == 4 else picked.reshape(1, 1, 1, 1)


def new_state(call: Call, *, triangles: bool) -> tuple[Tensor, Tensor]:
    """(out, lse) to merge tiles into: the prior's copy, or unwritten where every row will be written, or empty.

    out is in out_dtype at once where no row is written twice, else in the state's float32 (float64).
    """
    dtype = state_dtype(call.q.dtype)
    if call.prior is not None:
        # Contiguous, whatever the prior's strides: tiles may run over the batch.
        out, lse = (x.to(dtype, copy=True, memory_format=torch.contiguous_format) for x in call.prior)
        return out, lse
    fresh, complete = writes(call.plan, triangles)
    batch, length, heads, _ = call.q.shape
    out_shape = (batch, length, heads, call.v.shape[-1])
    out_type = call.out_dtype if all(fresh) else dtype
    if complete:
        return call.q.new_empty(out_shape, dtype=out_type), call.q.new_empty(out_shape[:-1], dtype=dtype)
    return call.q.new_zeros(out_shape, dtype=out_type), call.q.new_full(out_shape[:-1], -torch.inf, dtype=dtype)
