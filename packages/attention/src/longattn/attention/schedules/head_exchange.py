"""`HeadExchange`: who has which heads, and how tensors and masks go from rows to heads and back."""

from __future__ import annotations

import torch
from torch import Tensor

from longattn.attention.schedules.group import WholeSequence
from longattn.attention.schedules.layouts import Layout, count_rows
from longattn.attention.schedules.layouts import contiguous as evenly
from longattn.attention.schedules.passes import ScheduleWork
from longattn.attention.schedules.transport import Place, swap
from longattn.patterncache import Span


class HeadExchange:
    """Heads in neighbouring shares, which differ by one kv head at most.

    Attributes:
        heads: [of the whole, first, count]: the global query heads of this rank.

    Raises:
        ValueError: fewer kv heads than ranks.
    """

    def __init__(self, place: Place, whole: WholeSequence, work: ScheduleWork, mask_rows: bool) -> None:
        self.place, self.whole, self.allocator = place, whole, work.environment.allocator
        self.mask_rows = mask_rows
        kv_heads, query_heads = work.k.shape[2], work.queries[0].shape[2]
        if kv_heads < place.size:
            raise ValueError(
                f"k must have at least as many heads as there are ranks, {place.size}, for Ulysses, got {kv_heads}"
            )
        group = query_heads // kv_heads
        kv_shares = [rows[0] for rows in evenly(kv_heads, place.size).rows()]
        self.shares = {
            kv_heads: kv_shares,
            query_heads: [Span(s.start * group, s.length * group) for s in kv_shares],
        }
        total, first, _ = work.asked.heads
        share = self.shares[query_heads][whole.me]
        self.query_heads = query_heads
        self.heads = [total, first + share.start, share.length]

    def to_heads(self, x: Tensor, layout: Layout) -> Tensor:
        """(batch, rows of all, heads of this rank, ...) of x (batch, rows of this rank, heads of all, ...)."""
        shares = self.shares[x.shape[2]]
        parts = [x[:, :, s.start : s.start + s.length] for s in shares]
        num_heads = shares[self.whole.me].length
        shapes = [(x.shape[0], n, num_heads, *x.shape[3:]) for n in _sizes(layout)]
        return layout.join(swap(self.place, "to heads", parts, shapes, self.allocator))

    def to_rows(self, x: Tensor, layout: Layout) -> Tensor:
        """The inverse of `to_heads`."""
        parts, me = layout.cut(x), self.whole.me
        shares = next(s for s in self.shares.values() if s[me].length == x.shape[2])
        rows = _sizes(layout)[me]
        shapes = [(x.shape[0], rows, s.length, *x.shape[3:]) for s in shares]
        return torch.cat(swap(self.place, "to rows", parts, shapes, self.allocator), 2)

    def padding_to_heads(self, padding: Tensor) -> Tensor:
        """(batch, keys of all) of each rank's padding."""
        shapes = [(padding.shape[0], n) for n in _sizes(self.whole.keys)]
        parts = [padding] * len(shapes)
        return self.whole.keys.join(swap(self.place, "padding", parts, shapes, self.allocator))

    def mask_to_heads(self, mask: Tensor) -> Tensor:
        """A mask of this rank's rows and all heads, broadcastable, as one of all rows and this rank's heads."""
        by_row = _by_row(mask)
        if by_row.shape[2] > 1 and not self.mask_rows:
            share = self.shares[self.query_heads][self.whole.me]
            return by_row[:, :, share.start : share.start + share.length].transpose(1, 2)
        if not self.mask_rows:
            return mask
        if by_row.shape[2] > 1:
            return self.to_heads(by_row, self.whole.queries).transpose(1, 2)
        shapes = [(by_row.shape[0], n, *by_row.shape[2:]) for n in _sizes(self.whole.queries)]
        rows = swap(self.place, "mask", [by_row] * len(shapes), shapes, self.allocator)
        return self.whole.queries.join(rows).transpose(1, 2)

    def of_heads(self, x: Tensor) -> Tensor:
        """This rank's heads of a tensor (heads of all, ...) that every rank has."""
        share = self.shares[self.query_heads][self.whole.me]
        return x[share.start : share.start + share.length]

    def among_heads(self, gradient: Tensor) -> Tensor:
        """The inverse of `of_heads`, zero for other ranks' heads: their part of the gradient is there."""
        share = self.shares[self.query_heads][self.whole.me]
        whole = gradient.new_zeros((self.query_heads, *gradient.shape[1:]))
        whole[share.start : share.start + share.length] = gradient
        return whole

    def mask_to_rows(self, gradient: Tensor, bias: Tensor) -> Tensor:
        """This rank's part of the gradient of `bias` from that of what `mask_to_heads` made of it."""
        by_row, target = _by_row(gradient), _by_row(bias)
        if not self.mask_rows:
            if target.shape[2] == 1:
                return gradient.reshape(bias.shape)
            all_heads = torch.zeros(target.shape, dtype=gradient.dtype, device=gradient.device)
            share = self.shares[self.query_heads][self.whole.me]
            all_heads[:, :, share.start : share.start + share.length] = by_row
            return all_heads.transpose(1, 2).reshape(bias.shape)
        if target.shape[2] > 1:
            return self.to_rows(by_row, self.whole.queries).transpose(1, 2).reshape(bias.shape)
        # All ranks' heads saw the same rows.
        parts = self.whole.queries.cut(by_row)
        shapes = [(*target.shape,)] * len(parts)
        total = torch.stack(swap(self.place, "mask", parts, shapes, self.allocator)).sum(0)
        return total.transpose(1, 2).reshape(bias.shape)


def _sizes(layout: Layout) -> list[int]:
    return [count_rows(rows) for rows in layout.rows()]


def _by_row(mask: Tensor) -> Tensor:
    """(batch, queries, heads, keys), each possibly 1, of a broadcastable mask."""
    return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape)).transpose(1, 2)
