"""`AllGather`: every rank gets all keys at once, then one rectangle; dk and dv are summed in float32 on the rank that owns the keys.

The simplest engine, for short sequences and dense patterns: k and v of the whole sequence are in memory on every rank, and nothing is
computed while they arrive.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from longattn.attention.schedules.group import Members, OverGroup, WholeSequence, check_masks
from longattn.attention.schedules.layouts import LayoutName, rows_by_rank
from longattn.attention.schedules.passes import GradientSum, KeyStep, QueryShard, ScheduleRun, ScheduleWork
from longattn.attention.schedules.transport import Swapped, swap
from longattn.patterncache import Span


@dataclass(frozen=True, init=False)
class AllGather(OverGroup, name="all_gather"):
    """Gathers all keys and values, then attends once. Gives what `Local` gives on the whole sequence.

    Args:
        group, layout, lengths, timeout: as in `Ring`.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """

    members: Members

    def __init__(
        self,
        group: ProcessGroup | DeviceMesh,
        layout: LayoutName = "contiguous",
        lengths: int | Sequence[int] | None = None,
        timeout: float | None = None,
    ) -> None:
        object.__setattr__(self, "members", Members.of(group, layout, lengths, timeout))

    def start(self, work: ScheduleWork) -> ScheduleRun:
        """A run with all keys, which are here when it returns."""
        return _GatheredRun(self.members, work)

    def to_spec(self) -> dict[str, Any]:
        """What says the group."""
        return self.members.to_spec()

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """The engine over that group."""
        return cls(**spec)


class _GatheredRun(ScheduleRun):
    one_step = True

    def __init__(self, members: Members, work: ScheduleWork) -> None:
        self.work = work
        self.whole = WholeSequence(members, work)
        check_masks(work, self.whole.nq, self.whole.nk)
        self.seed, self.mask, self.bias = self.whole.seed, work.tensors.mask, work.tensors.bias
        self.by_distance = work.tensors.by_distance
        given = [work.k, work.v, *([] if work.padding is None else [work.padding])]
        sizes = rows_by_rank(self.whole.keys)
        gathered = [Swapped([x] * len(sizes), [(x.shape[0], size, *x.shape[2:]) for size in sizes]) for x in given]
        parts = self._swap("keys", gathered)
        self.k, self.v, *padding = (self.whole.keys.join(x) for x in parts)
        self.padding = padding[0] if padding else None
        self.sums = GradientSum(self.k), GradientSum(self.v)

    def _swap(self, step: str, tensors: list[Swapped]) -> list[list[Tensor]]:
        fields, allocator = self.whole.fields(self.work, step), self.work.environment.allocator
        return swap(self.whole.calls, fields, self.whole.call, tensors, allocator)

    def shards(self) -> Iterator[QueryShard]:
        step = KeyStep(self.k, self.v, self.padding, (Span(0, self.whole.nk),), self._give)
        total, first, count = self.work.arguments.heads
        yield QueryShard(self.work.queries, self.whole.spans[self.whole.me], iter((step,)), None, (total, first, count))

    def _give(self, dk: Tensor, dv: Tensor) -> None:
        self.sums[0].add(dk)
        self.sums[1].add(dv)

    def join(self, parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return parts[0]

    def key_gradients(self) -> tuple[Tensor, Tensor]:
        own = (self.work.k, self.work.v)
        parts = [self.whole.keys.cut(total.wide()) for total in self.sums]
        # Keys of all ranks have been used: they do not stand beside the gradients that arrive.
        del self.k, self.v, self.sums
        swapped = [Swapped(x, [tuple(like.shape)] * len(x)) for x, like in zip(parts, own, strict=True)]
        dk, dv = (_in_order(received) for received in self._swap("gradients", swapped))
        return dk, dv


def _in_order(parts: list[Tensor]) -> Tensor:
    """The sum of what all ranks have for this rank's keys (or values), in the order of ranks."""
    first, *others = parts
    total = first.clone()
    for part in others:
        total += part
    return total
