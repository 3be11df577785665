"""`HeadExchange`: who has which heads, and how tensors and masks go from rows to heads and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longattn.attention.schedules.group import WholeSequence
from longattn.attention.schedules.layouts import Layout, rows_by_rank
from longattn.attention.schedules.layouts import contiguous as evenly
from longattn.attention.schedules.passes import ScheduleWork
from longattn.attention.schedules.transport import Swapped, swap
from longattn.patterncache import Span


class HeadExchange:
    """Heads in neighbouring shares, which differ by one kv head at most.

    Attributes:
        heads: [of the whole, first, count]: the global query heads of this rank.

    Raises:
        ValueError: fewer kv heads than ranks.
    """

    def __init__(self, whole: WholeSequence, work: ScheduleWork) -> None:
        self.whole, self.work = whole, work
        self.mask_rows = whole.rows
        kv_heads, query_heads, ranks = work.k.shape[2], work.queries[0].shape[2], whole.calls.size
        if kv_heads < ranks:
            raise ValueError(
                f"k must have at least as many heads as there are ranks, {ranks}, for Ulysses, got {kv_heads}"
            )
        group = query_heads // kv_heads
        kv_shares = [rows[0] for rows in evenly(kv_heads, ranks).rows()]
        self.shares = {
            kv_heads: kv_shares,
            query_heads: [Span(s.start * group, s.length * group) for s in kv_shares],
        }
        total, first, _ = work.arguments.heads
        share = self.shares[query_heads][whole.me]
        self.query_heads = query_heads
        self.heads = [total, first + share.start, share.length]

    def operands_to_heads(self, work: ScheduleWork) -> tuple[list[Tensor], Tensor | None]:
        """([*`work.queries`, k, v], padding or None): all rows of this rank's heads. One exchange for all of them."""
        queries = [(x, self.whole.queries) for x in work.queries]
        keys = [(x, self.whole.keys) for x in (work.k, work.v)]
        swapped = [self._by_heads(x, layout) for x, layout in (*queries, *keys)]
        layouts = [layout for _, layout in (*queries, *keys)]
        if work.padding is not None:
            shapes = [(work.padding.shape[0], n) for n in rows_by_rank(self.whole.keys)]
            swapped.append(Swapped([work.padding] * len(shapes), shapes))
            layouts.append(self.whole.keys)
        received = self._swap("to heads", swapped)
        joined = [layout.join(x) for layout, x in zip(layouts, received, strict=True)]
        padding = None if work.padding is None else joined.pop()
        return joined, padding

    def _swap(self, step: str, tensors: list[Swapped]) -> list[list[Tensor]]:
        whole, allocator = self.whole, self.work.environment.allocator
        return swap(whole.calls, whole.fields(self.work, step), whole.call, tensors, allocator)

    def _by_heads(self, x: Tensor, layout: Layout) -> Swapped:
        """x (batch, rows of this rank, heads of all, ...), for (batch, rows of all, heads of this rank, ...)."""
        shares = self.shares[x.shape[2]]
        parts = [x[:, :, s.start : s.start + s.length] for s in shares]
        num_heads = shares[self.whole.me].length
        return Swapped(parts, [(x.shape[0], n, num_heads, *x.shape[3:]) for n in rows_by_rank(layout)])

    def to_rows(self, step: str, tensors: Sequence[Tensor], layout: Layout) -> list[Tensor]:
        """The inverse of `operands_to_heads`, for some tensors of one layout. One exchange for all of them."""
        me, swapped = self.whole.me, list[Swapped]()
        rows = rows_by_rank(layout)[me]
        for x in tensors:
            shares = next(s for s in self.shares.values() if s[me].length == x.shape[2])
            swapped.append(Swapped(layout.cut(x), [(x.shape[0], rows, s.length, *x.shape[3:]) for s in shares]))
        return [torch.cat(received, 2) for received in self._swap(step, swapped)]

    def mask_to_heads(self, mask: Tensor) -> Tensor:
        """A mask of this rank's rows and all heads, broadcastable, as one of all rows and this rank's heads."""
        by_row = _by_row(mask)
        if by_row.shape[2] > 1 and not self.mask_rows:
            share = self.shares[self.query_heads][self.whole.me]
            return by_row[:, :, share.start : share.start + share.length].transpose(1, 2)
        if not self.mask_rows:
            return mask
        if by_row.shape[2] > 1:
            (received,) = self._swap("mask to heads", [self._by_heads(by_row, self.whole.queries)])
            return self.whole.queries.join(received).transpose(1, 2)
        shapes = [(by_row.shape[0], n, *by_row.shape[2:]) for n in rows_by_rank(self.whole.queries)]
        (rows,) = self._swap("mask to heads", [Swapped([by_row] * len(shapes), shapes)])
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
            (rows,) = self.to_rows("mask gradient to rows", [by_row], self.whole.queries)
            return rows.transpose(1, 2).reshape(bias.shape)
        # All ranks' heads saw the same rows.
        parts = self.whole.queries.cut(by_row)
        shapes = [(*target.shape,)] * len(parts)
        (received,) = self._swap("mask gradient to rows", [Swapped(parts, shapes)])
        total = torch.stack(received).sum(0)
        return total.transpose(1, 2).reshape(bias.shape)


def _by_row(mask: Tensor) -> Tensor:
    """(batch, queries, heads, keys), each possibly 1, of a broadcastable mask."""
    return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape)).transpose(1, 2)
