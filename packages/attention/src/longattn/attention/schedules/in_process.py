"""Schedules in one process, called directly: without an op around them, and their rectangles in one call where the kernels have a form for it.

Only where no gradient is wanted and nothing looks on; `op` serves everything else.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial

from torch import Tensor

from longattn.attention.schedules import driver
from longattn.attention.schedules.base import Schedule
from longattn.attention.schedules.local import Local
from longattn.attention.schedules.passes import ScheduleWork
from longattn.kernels import Environment
from longattn.kernels.interface import DEFAULT_ENVIRONMENT, OpArguments, OpTensors, ShardRectangle, prepare_shards

WHOLE = "pattern_attention"
"""What signatures of calls begin with whose schedule is whole, or that have none."""


def place_of(schedule: object) -> str | None:
    """What signatures of calls under this schedule begin with: whole ones are alike. None: such calls are not looked up."""
    if schedule is None or type(schedule) is Local:
        return WHOLE
    if not isinstance(schedule, Schedule) or schedule.distributed:
        return None
    return WHOLE if schedule.whole else schedule.canonical()


def attend_in_process(
    key: tuple[Hashable, ...],
    schedule: Schedule,
    tensors: OpTensors,
    arguments: OpArguments,
    environment: Environment | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the first call of a signature, rectangle by rectangle; the memo may know the next one under `key`."""
    environment = DEFAULT_ENVIRONMENT if environment is None else environment
    run = schedule.start(ScheduleWork(tensors[:1], tensors, arguments, environment))
    state = driver.forward(run, arguments, environment, tensors.v.shape[3])
    if run.by_rows and all(x is None for x in tensors[3:]):
        prepare_shards(key, partial(_rectangles, schedule, arguments), tensors, arguments.out_dtype, environment)
    return state


def _rectangles(
    schedule: Schedule, arguments: OpArguments, tensors: OpTensors, environment: Environment
) -> list[ShardRectangle]:
    """Every rectangle of a schedule, in the order of its steps; none where one is not of views of q, k and v."""
    run = schedule.start(ScheduleWork(tensors[:1], tensors, arguments, environment))
    found: list[ShardRectangle] = []
    for number, shard in enumerate(run.shards()):
        if shard.rows is None or len(shard.rows) != 1:
            return []
        rows = shard.rows[0]
        for step in shard.steps:
            own, rectangle = driver.rectangle_of(run, shard, step, arguments)
            if not all(_is_view(x, whole) for x, whole in zip(own[:3], tensors[:3], strict=True)):
                return []
            found.append(ShardRectangle(number, (rows.start, rows.length, rows.step), own, rectangle))
    return found


def _is_view(x: Tensor, whole: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
