"""`Local`: all keys at once, in one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from longattn.attention.schedules.base import Schedule
from longattn.attention.schedules.passes import GradientSum, KeyStep, QueryShard, ScheduleRun, ScheduleWork, query_spans
from longattn.patterncache import Span
from longattn.patterncache.spans import shortened


class _LocalRun(ScheduleRun):
    one_step = True
    in_parts = False

    def __init__(self, work: ScheduleWork) -> None:
        self.work = work
        self.seed, self.mask, self.bias = work.tensors.seed, work.tensors.mask, work.tensors.bias
        self.by_distance = work.tensors.by_distance
        self._dk, self._dv = GradientSum(work.k), GradientSum(work.v)

    def _give(self, dk: Tensor, dv: Tensor) -> None:
        self._dk.add(dk)
        self._dv.add(dv)

    def shards(self) -> Iterator[QueryShard]:
        work, nq, nk = self.work, self.work.queries[0].shape[1], self.work.k.shape[1]
        step = KeyStep(work.k, work.v, work.padding, (Span(0, nk),), self._give)
        total, first, count = work.arguments.heads
        yield QueryShard(work.queries, query_spans(work.arguments, nq, nk), iter((step,)), None, (total, first, count))

    def join(self, parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return parts[0]

    def key_gradients(self) -> tuple[Tensor, Tensor]:
        return self._dk.total(), self._dv.total()


@dataclass(frozen=True)
class Local(Schedule, name="local"):
    """Everything is here: one shard, one step."""

    @property
    def whole(self) -> bool:
        """Always."""
        return True

    def start(self, work: ScheduleWork) -> ScheduleRun:
        """A run with q as it is, and all of k and v."""
        return _LocalRun(work)

    def to_spec(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """Itself."""
        return cls(**spec)


def check_schedule_argument(schedule: object) -> Schedule:
    """A Schedule; None is `Local()`."""
    if schedule is None:
        return Local()
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"schedule must be None or a Schedule such as Ring(size=4), got {shortened(schedule)} ({type(schedule).__name__})"
        )
    return schedule
