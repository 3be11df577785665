"""`Tile`: some equal tiles of a branch as views of the (batch, seq, heads, ...) tensors.

Rows that are affine are read and written through strided views, listed ones through index tensors.
"""

# torch's own types are partial.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longattn.kernels.state import merge_into
from longattn.patterncache import Plan, Span
from longattn.patterncache.indices import Affine, Index, Listed

IndexTensors = dict[Any, Tensor]
_INDEX_TENSORS = "index tensors"


@dataclass(frozen=True)
class Tile:
    """Some equal tiles of one branch, for one group of heads.

    Attributes:
        heads, kv_heads: rows of the head axes; heads are a whole multiple of kv_heads, neighbours sharing one.
        batch: the first batch element; q and k count rows from its start.
        q, k: rows.
        causal: row a sees exactly keys 0 .. a, and `seen` is None.
        seen: (tiles or 1, heads or 1, q count or 1, k count) bool, or None: all (or causal).
        bias: (tiles or 1, heads or 1, q count or 1, k count or 1), what is added to scores, by a tensor or by terms; or None.
        distance: (tiles or 1, q count, k count) int64, position of the key minus that of the query, where terms read it, or None.
        first: which of the branch's tiles is the first here.
        keep: (tiles, heads, q count, k count), what dropout multiplies each weight with, or None.
        fresh: no earlier tile wrote these query rows of these heads.
        index_tensors: of listed rows, that stay with the plan, or None: they are made anew.
    """

    heads: Span
    kv_heads: Span
    batch: int
    q: Index
    k: Index
    causal: bool
    seen: Tensor | None
    fresh: bool
    bias: Tensor | None = None
    keep: Tensor | None = None
    first: int = 0
    index_tensors: IndexTensors | None = None
    distance: Tensor | None = None

    def queries(self, x: Tensor) -> Tensor:
        """Query rows of x (batch, Nq, heads, ...) as (tiles, heads, q count, ...)."""
        return take(x, self.batch, self.heads, self.q, self.index_tensors)

    def keys(self, x: Tensor) -> Tensor:
        """Key rows of x (batch, Nk, kv_heads, ...) as (tiles, kv_heads, k count, ...)."""
        return take(x, self.batch, self.kv_heads, self.k, self.index_tensors)

    def merge(self, out: Tensor, lse: Tensor, tile_out: Tensor, tile_lse: Tensor) -> None:
        """Merge a tile's result (tiles, heads, q count, ...) into out and lse, in place, on its rows only."""
        for whole, part in ((out, tile_out), (lse, tile_lse)):
            if self.fresh and isinstance(self.q, Listed):
                put(whole, self.batch, self.heads, self.q, part.to(whole.dtype), self.index_tensors)
            elif self.fresh:
                self.queries(whole).copy_(part)
        if self.fresh:
            return
        out_rows, lse_rows = self.queries(out), self.queries(lse)
        merge_into(out_rows, lse_rows, tile_out.to(out.dtype), tile_lse.to(lse.dtype))
        if isinstance(self.q, Listed):  # the rows were copies
            put(out, self.batch, self.heads, self.q, out_rows, self.index_tensors)
            put(lse, self.batch, self.heads, self.q, lse_rows, self.index_tensors)

    def add_queries(self, total: Tensor, part: Tensor) -> None:
        """Add (tiles, heads, q count, d) to the query rows of `total`, in place."""
        add(total, self.batch, self.heads, self.q, part, self.index_tensors)

    def add_keys(self, total: Tensor, part: Tensor) -> None:
        """Add (tiles, kv_heads, k count, d) to the key rows of `total`, in place; a row may stand in several tiles."""
        add(total, self.batch, self.kv_heads, self.k, part, self.index_tensors)


def take(x: Tensor, batch: int, heads: Span, index: Index, tensors: IndexTensors | None = None) -> Tensor:
    """Rows of x (batch, seq, heads, ...) as (tiles, heads, count, ...): a view where affine, a copy where listed."""
    if isinstance(index, Affine):
        size = (index.tiles, heads.length, index.count, *x.shape[3:])
        stride = (index.tile_step * x.stride(1), heads.step * x.stride(2), index.step * x.stride(1), *x.stride()[3:])
        begin = batch * x.stride(0) + index.start * x.stride(1) + heads.start * x.stride(2)
        return x.as_strided(size, stride, x.storage_offset() + begin)
    rows = index_tensor(index, x.device, tensors)
    rows_of_heads = x[batch][:, heads.start : heads.last + 1 : heads.step].index_select(0, rows)
    return rows_of_heads.unflatten(0, (index.tiles, index.count)).transpose(1, 2)


def put(x: Tensor, batch: int, heads: Span, index: Listed, value: Tensor, tensors: IndexTensors | None = None) -> None:
    """Write (tiles, heads, count, ...) to listed rows of x (batch, seq, heads, ...), each of which stands in one tile."""
    rows = index_tensor(index, x.device, tensors)
    x[batch][:, heads.start : heads.last + 1 : heads.step].index_copy_(0, rows, value.transpose(1, 2).flatten(0, 1))


def add(x: Tensor, batch: int, heads: Span, index: Index, value: Tensor, tensors: IndexTensors | None = None) -> None:
    """Add (tiles, heads, count, d) to rows of x (batch, seq, heads, d), in place."""
    if isinstance(index, Affine) and index.distinct:
        take(x, batch, heads, index, tensors).add_(value)
        return
    rows = index_tensor(index, x.device, tensors)
    part = value.transpose(1, 2).flatten(0, 1).to(x.dtype)
    x[batch][:, heads.start : heads.last + 1 : heads.step].index_add_(0, rows, part)


def index_tensor(index: Index, device: torch.device, tensors: IndexTensors | None = None) -> Tensor:
    """The rows of all tiles, one after the other, as an int64 tensor; from `tensors` where it is there, and left there."""
    if tensors is None:
        return torch.from_numpy(index.rows().reshape(-1)).to(device)
    # Parts of a plan's lists are made anew at every call, so what they say is the key, not which object says it.
    content = index if isinstance(index, Affine) else (index.starts.tobytes(), index.run, index.step)
    tensor = tensors.get((content, device))
    if tensor is None:
        tensor = tensors[content, device] = index_tensor(index, device)
    return tensor


def keep_tensors(plan: Plan) -> None:
    """From now on index tensors of this plan stay with it, on the devices that they are made for, until it leaves its cache."""
    plan.derived.setdefault(_INDEX_TENSORS, {})


def kept_tensors(plan: Plan) -> IndexTensors | None:
    """The index tensors that stay with a plan, None where none do."""
    return plan.derived.get(_INDEX_TENSORS)


def head_groups(heads: Span, group: int, most: int) -> Iterator[tuple[Span, Span]]:
    """Split query heads into (heads, kv_heads) pairs, both strided, where `group` neighbouring query heads share a kv head.

    No pair has more than `most` query heads, unless a kv head by itself does.
    """
    for query_heads, kv_heads in _kv_groups(heads, group):
        shared = query_heads.length // kv_heads.length
        step = max(1, most // shared)
        for first in range(0, kv_heads.length, step):
            count = min(step, kv_heads.length - first)
            yield query_heads.take(first * shared, count * shared), kv_heads.take(first, count)


def _kv_groups(heads: Span, group: int) -> Iterator[tuple[Span, Span]]:
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
