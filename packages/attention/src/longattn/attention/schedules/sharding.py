"""`shard_sequence` and `unshard_sequence`: between whole sequences and the rows that a rank of a schedule holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longattn.attention.schedules.base import Schedule
from longattn.attention.schedules.callers import calls_over
from longattn.attention.schedules.extents import row_numbers
from longattn.attention.schedules.gathering import row_fields
from longattn.attention.schedules.layouts import count_rows, select_rows
from longattn.attention.schedules.local import check_schedule_argument
from longattn.attention.schedules.place import Place
from longattn.attention.schedules.transport import Swapped, gather_integers, swap
from longattn.attention.validate import check_type, integers
from longattn.kernels.interface import TorchAllocator
from longattn.patterncache.spans import shortened


def shard_sequence(x: Tensor, schedule: Schedule, dim: int = 1) -> tuple[Tensor, Tensor]:
    """This rank's rows of a sequence, for data loaders, and where they stand.

    Args:
        x: the whole sequence along `dim`, such as tokens (batch, N) or embeddings (batch, N, E); the same on every rank.
        schedule: whose layout, such as Ring(group, layout="zigzag"). dim: default 1.

    Returns:
        (the rows, contiguous, differentiable; their positions (rows,), int64, on the device of x).

    Raises:
        TypeError: x is no tensor, dim no integer, or schedule no schedule.
        ValueError: x has no such axis.
    """
    schedule = check_schedule_argument(schedule)
    axis = _axis_of(x, dim)
    rows = schedule.held(x.shape[axis])
    return select_rows(x, axis, rows).contiguous(), row_numbers(rows).to(x.device)


def unshard_sequence(x: Tensor, schedule: Schedule, group: object = None, dim: int = 1) -> Tensor:
    """The whole sequence, on every rank, from the rows that `shard_sequence` gave each. Not differentiable.

    Args:
        x: this rank's rows along `dim`. schedule: the same as there.
        group: over which all ranks of the schedule meet. Default: the schedule's own; a 2-D one needs it.

    Raises:
        TypeError: x is no tensor, or schedule no schedule.
        ValueError: a schedule of several groups without `group`; x has no such axis.
    """
    schedule = check_schedule_argument(schedule)
    axis = _axis_of(x, dim)
    if not schedule.distributed:
        return x.detach()
    place = _group_of(schedule, group)
    lengths = integers(gather_integers(calls_over(place), "shard lengths", (x.shape[axis],))[:, 0])
    return _gather_rows(x.detach(), axis, place, lengths, schedule)


def _axis_of(x: object, dim: object) -> int:
    """The axis of a sequence, from 0."""
    x = check_type("x", x, Tensor, "a torch.Tensor")
    if x.layout != torch.strided:
        raise TypeError(f"x must be a plain torch.Tensor, got one of layout {x.layout}")
    axes = x.dim()
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an integer, got {shortened(dim)} ({type(dim).__name__})")
    if not -axes <= dim < axes:
        raise ValueError(f"dim must be an axis of x, which has {axes}, got {shortened(dim)}")
    return dim % axes


def _group_of(schedule: Schedule, group: object) -> Place:
    if group is not None:
        return Place.of(group)
    inner = getattr(schedule, "inner", None)
    if inner is not None and inner.distributed:
        raise ValueError("group must be that of all ranks for a schedule over several groups, got None")
    return schedule.members.place  # type: ignore[attr-defined]


def _gather_rows(x: Tensor, axis: int, place: Place, lengths: Sequence[int], schedule: Schedule) -> Tensor:
    shapes = [(*x.shape[:axis], n, *x.shape[axis + 1 :]) for n in lengths]
    rows = schedule.held(sum(lengths))
    if count_rows(rows) != x.shape[axis]:
        raise ValueError(
            f"x must have the {count_rows(rows)} rows that {schedule} gives this rank, got {x.shape[axis]}"
        )
    # Each rank says where its rows stand: that serves every schedule alike.
    tensors = [
        Swapped([x] * len(lengths), shapes),
        Swapped([row_numbers(rows)] * len(lengths), [(n,) for n in lengths]),
    ]
    calls = calls_over(place)
    with calls.underway():
        fields = row_fields(calls, "gather", x.transpose(1, axis) if axis else x, list(lengths))
        parts, row_positions = swap(calls, fields, calls.next_call(), tensors, TorchAllocator())
    sequence = x.new_empty((*x.shape[:axis], sum(lengths), *x.shape[axis + 1 :]))
    for part, positions in zip(parts, row_positions, strict=True):
        sequence.index_copy_(axis, positions.to(x.device), part)
    return sequence
