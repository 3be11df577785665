"""`Ring`: queries stay, keys and values travel. Each rank holds one shard of the sequence, laid out as `layouts` says.

With a process group, each process is a rank (`ring_group`). Without one, `Ring(size=n)` plays all ranks in this process, one after the
other, each going through the keys in the order in which they would come round.

Ring attention: Liu et al. 2023, arXiv:2310.01889.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from longattn.attention.layouts import LAYOUTS, LayoutName, check_layout, take
from longattn.attention.schedule import GradientSum, Run, Schedule, Shard, Step, Work, query_spans
from longattn.attention.validate import check_size


@dataclass(frozen=True, init=False)
class Ring(Schedule, name="ring"):
    """A ring of `size` ranks, played in this process. Gives what `Local` gives: out, lse and gradients, at any length and size.

    Shards differ by at most one row; where there are more ranks than rows, some hold none. Where Nq != Nk, queries and keys are
    each cut by the same layout.

    Args:
        group: process groups are not supported by this version; None.
        size: number of ranks, >= 1.
        layout: "contiguous" (default), "zigzag" or "striped".

    Raises:
        TypeError, ValueError: a bad argument, by name.

    Example:
        >>> x = torch.randn(1, 10, 2, 16)
        >>> pattern_attention(x, x, x, Dilated((4, 8), (1, 2)), schedule=Ring(size=4)).shape
        torch.Size([1, 10, 2, 16])
    """

    size: int
    layout: LayoutName

    def __init__(self, group: None = None, size: int | None = None, layout: LayoutName = "contiguous") -> None:
        if group is not None:
            raise ValueError(
                f"group must be None: this version plays the ring in one process, as Ring(size=n), "
                f"and supports no process groups, got {type(group).__name__}"
            )
        check_layout(layout)
        object.__setattr__(self, "size", check_size("size", size))
        object.__setattr__(self, "layout", layout)

    def start(self, work: Work) -> Run:
        """A run with the shards of all ranks."""
        return _PlayedRun(self, work)

    def to_spec(self) -> dict[str, Any]:
        """Size and layout."""
        return {"size": self.size, "layout": self.layout}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """The ring of that size and layout."""
        return cls(None, **spec)


class _PlayedRun(Run):
    """All ranks in this process: shards are views wherever a layout has views."""

    def __init__(self, ring: Ring, work: Work) -> None:
        self.work, self.one_step = work, ring.size == 1
        self.seed, self.mask, self.bias = work.asked.seed, work.mask, work.bias
        nq, nk = work.queries[0].shape[1], work.k.shape[1]
        self.queries, self.keys = (LAYOUTS[ring.layout](n, ring.size) for n in (nq, nk))
        self.spans = query_spans(work.asked, nq, nk)
        cut = [self.keys.cut(x) for x in (work.k, work.v)]
        padding = [None] * ring.size if work.padding is None else self.keys.cut(work.padding)
        self.sums = [tuple(GradientSum(x) for x in pair) for pair in zip(*cut, strict=True)]
        self.steps = [
            Step(k, v, hidden, rows, partial(self._give, rank), rows)
            for rank, (k, v, hidden, rows) in enumerate(zip(*cut, padding, self.keys.rows(), strict=True))
        ]

    def _give(self, rank: int, dk: Tensor, dv: Tensor) -> None:
        for total, gradient in zip(self.sums[rank], (dk, dv), strict=True):
            total.add(gradient)

    def shards(self) -> Iterator[Shard]:
        size, (total, first, count) = len(self.steps), self.work.asked.heads
        shares = zip(*(self.queries.cut(x) for x in self.work.queries), strict=True)
        for rank, (queries, rows) in enumerate(zip(shares, self.queries.rows(), strict=True)):
            arriving = (self.steps[(rank - distance) % size] for distance in range(size))
            yield Shard(queries, take(self.spans, rows), arriving, rows, (total, first, count))

    def join(self, parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return tuple(self.queries.join(shares) for shares in zip(*parts, strict=True))

    def key_gradients(self) -> tuple[Tensor, Tensor]:
        dk, dv = ([sums[n].total() for sums in self.sums] for n in range(2))
        return _joined(self.keys, dk), _joined(self.keys, dv)


def _joined(layout: Any, shares: list[Tensor]) -> Tensor:
    # Shards to which one step gave are not wider than k: one dtype for all.
    wide = shares[0].dtype
    for share in shares:
        wide = torch.promote_types(wide, share.dtype)
    return layout.join([share.to(wide) for share in shares])
