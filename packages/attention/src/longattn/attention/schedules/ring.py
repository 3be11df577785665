"""`Ring`: queries stay, keys and values travel. Each rank holds one shard of the sequence, laid out as `layouts` says.

With a process group, each process is a rank (`ring_process`). Without one, `Ring(size=n)` computes all ranks in this process, one after
the other, each with its keys in the order in which they would arrive.

Ring attention: Liu et al. 2023, arXiv:2310.01889.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from longattn.attention.schedules.extents import Extents
from longattn.attention.schedules.group import Members, OverGroup
from longattn.attention.schedules.layouts import LAYOUTS, MOST_RANKS, LayoutName, Spans, check_layout, take
from longattn.attention.schedules.passes import GradientSum, KeyStep, QueryShard, ScheduleRun, ScheduleWork, query_spans
from longattn.attention.schedules.ring_process import GroupRun
from longattn.attention.validate import check_size
from longattn.patterncache import Span
from longattn.patterncache.spans import shortened


@dataclass(frozen=True, init=False)
class Ring(OverGroup, name="ring"):
    """A ring of ranks. Gives what `Local` gives on the whole sequence: out, lse and gradients, at any length and size.

    With a group, q, k and v are this rank's shards, and so are the outputs; masks have this rank's rows and the whole sequence's columns.
    Without one, `size` ranks are played in this process on whole tensors. By default shards differ by one row at most; where there
    are more ranks than rows, some hold none. Where Nq != Nk, queries and keys are each cut by the same layout.

    Args:
        group: a ProcessGroup, or a DeviceMesh of one dimension such as mesh["ring"]. Default None: in this process.
        size: number of ranks, 1 to 1024 in this process; with a group it is the group's.
        layout: "contiguous" (default), "zigzag" or "striped", as in `layouts`.
        lengths: with a group: the whole sequence's length, or, contiguous, that of every rank's shard. Default None: the ranks
            exchange their lengths at every call, and contiguous shards may have any.
        timeout: with a group: seconds to wait for a message of another rank before a `GroupError`. Default None: the group's.

    Raises:
        TypeError, ValueError: a bad argument, by name.

    Example:
        >>> x = torch.randn(1, 10, 2, 16)
        >>> pattern_attention(x, x, x, Dilated((4, 8), (1, 2)), schedule=Ring(size=4)).shape
        torch.Size([1, 10, 2, 16])
    """

    size: int
    layout: LayoutName
    members: Members | None = field(repr=False)  # type: ignore[assignment]

    def __init__(
        self,
        group: ProcessGroup | DeviceMesh | None = None,
        size: int | None = None,
        layout: LayoutName = "contiguous",
        lengths: int | Sequence[int] | None = None,
        timeout: float | None = None,
    ) -> None:
        members = None
        check_layout(layout)
        if group is not None:
            members = Members.of(group, layout, lengths, timeout)
            if size not in (None, members.place.size):
                raise ValueError(f"size must be None or the group's, {members.place.size}, got {shortened(size)}")
            size = members.place.size
        elif lengths is not None:
            raise ValueError(f"lengths must be None without a group, got {shortened(lengths)}")
        elif timeout is not None:
            raise ValueError(f"timeout must be None without a group, got {shortened(timeout)}")
        elif size is None:
            raise TypeError(
                "size must be an integer >= 1, got None, and neither is there a group: torch.distributed.group.WORLD is None until "
                "init_process_group() was called"
            )
        elif check_size("size", size) > MOST_RANKS:
            raise ValueError(
                f"size must be at most {MOST_RANKS} ranks in this process, which makes the steps of each, got {size}"
            )
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "layout", layout)
        object.__setattr__(self, "members", members)

    @property
    def distributed(self) -> bool:
        """Whether q, k and v are one rank's shards."""
        return self.members is not None

    @property
    def whole(self) -> bool:
        """A ring of one in this process."""
        return self.members is None and self.size == 1

    def underway(self) -> AbstractContextManager[None]:
        """One pass over the group."""
        return nullcontext() if self.members is None else super().underway()

    def reset(self, timeout: float | None = None) -> None:
        """Take calls again after a `GroupError`, once every rank has called this. In one process there is nothing to do."""
        if self.members is not None:
            super().reset(timeout)

    def start(self, work: ScheduleWork) -> ScheduleRun:
        """A run of this rank, or of all ranks."""
        return _InProcessRun(self, work) if self.members is None else GroupRun(self.members, work)

    def to_spec(self) -> dict[str, Any]:
        """Size and layout, or what says the group."""
        return {"size": self.size, "layout": self.layout} | ({} if self.members is None else self.members.to_spec())

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """The ring of that group, or of that size."""
        return cls(**spec)

    def held(self, length: int) -> Spans:
        """This rank's rows; all of them where all ranks are played here."""
        return (Span(0, length),) if self.members is None else super().held(length)

    @property
    def lengths_known(self) -> bool:
        """Whether lengths are known without an exchange of metadata."""
        return self.members is None or self.members.lengths_known

    def exchange_metadata(self, nq: int, nk: int, flags: int, seed: Tensor | None) -> Tensor | None:
        """With a group, the metadata of all ranks: lengths, and rank 0's seed."""
        return None if self.members is None else super().exchange_metadata(nq, nk, flags, seed)

    def extents(self, nq: int, nk: int, metadata: Tensor | None) -> Extents:
        """This rank's rows; all of them where all ranks are played here."""
        return Extents.of_whole(nq, nk) if self.members is None else super().extents(nq, nk, metadata)

    def gather_keys(self, x: Tensor, nq: int, nk: int, metadata: Tensor | None) -> Tensor:
        """From every rank; as it is where all ranks are played here."""
        return x if self.members is None else super().gather_keys(x, nq, nk, metadata)


class _InProcessRun(ScheduleRun):
    """All ranks in this process: shards are views wherever a layout has views."""

    by_rows = True

    def __init__(self, ring: Ring, work: ScheduleWork) -> None:
        self.work, self.one_step, self.in_parts = work, ring.size == 1, ring.size > 1
        self.seed, self.mask, self.bias = work.tensors.seed, work.tensors.mask, work.tensors.bias
        self.by_distance = work.tensors.by_distance
        nq, nk = work.queries[0].shape[1], work.k.shape[1]
        self.queries, self.keys = (LAYOUTS[ring.layout](n, ring.size) for n in (nq, nk))
        self.spans = query_spans(work.arguments, nq, nk)
        cut = [self.keys.cut(x) for x in (work.k, work.v)]
        padding = [None] * ring.size if work.padding is None else self.keys.cut(work.padding)
        self.sums = [tuple(GradientSum(x) for x in pair) for pair in zip(*cut, strict=True)]
        self.steps = [
            KeyStep(k, v, hidden, rows, partial(self._give, rank), rows)
            for rank, (k, v, hidden, rows) in enumerate(zip(*cut, padding, self.keys.rows(), strict=True))
        ]

    def _give(self, rank: int, dk: Tensor, dv: Tensor) -> None:
        for total, gradient in zip(self.sums[rank], (dk, dv), strict=True):
            total.add(gradient)

    def shards(self) -> Iterator[QueryShard]:
        size, (total, first, count) = len(self.steps), self.work.arguments.heads
        shares = zip(*(self.queries.cut(x) for x in self.work.queries), strict=True)
        for rank, (queries, rows) in enumerate(zip(shares, self.queries.rows(), strict=True)):
            arriving = (self.steps[(rank - distance) % size] for distance in range(size))
            yield QueryShard(queries, take(self.spans, rows), arriving, rows, (total, first, count))

    def join(self, parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return tuple(self.queries.join(shares) for shares in zip(*parts, strict=True))

    def key_gradients(self) -> tuple[Tensor, Tensor]:
        dk, dv = ([sums[n].total() for sums in self.sums] for n in range(2))
        return _joined(self.keys, dk), _joined(self.keys, dv)


def _joined(layout: Any, shares: list[Tensor]) -> Tensor:
    # Shards to which no step gave are not wider than k: one dtype for all.
    wide = shares[0].dtype
    for share in shares:
        wide = torch.promote_types(wide, share.dtype)
    return layout.join([share.to(wide) for share in shares])
