"""`CallExtents`: where the rows of a module's call stand. Found once a call, for all that depends on positions.

Ranks exchange their lengths for it, unless the schedule was given them. In traced code the lengths are an op's result, and positions
that of another, `longattn::row_positions` (both in `metadata_op`), so that a graph serves any lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

from longattn.attention.schedules import metadata_op  # noqa: F401  # pyright: ignore[reportUnusedImport]  Registers roll_call and row_positions.
from longattn.attention.schedules.base import Schedule
from longattn.attention.schedules.extents import Extents
from longattn.kernels.interface import is_sharded


def dtensor_module() -> Any:
    """`schedules.dtensor`, imported when the first DTensor comes: torch's own module for them is heavy."""
    return import_module("longattn.attention.schedules.dtensor")


def on_local(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` of x, row by row; of a DTensor's local part, placed as it was."""
    return dtensor_module().on_local(function, x) if is_sharded(x) else function(x)


class CallExtents:
    """Of one call's query and key.

    Attributes:
        schedule: the one that orders the call: for DTensors sharded on the sequence, one over the ranks that hold it.
        batch, nq, nk: elements, and rows of this process's query and key. device: where they are.

    Raises:
        TypeError, ValueError: DTensors placed otherwise, or not as the schedule's rows are, by name.
    """

    def __init__(self, query: Tensor, key: Tensor, schedule: Schedule) -> None:
        self.like, local = None, (query, key)
        if is_sharded(query) or is_sharded(key):
            schedule = dtensor_module().schedule_over(query, key, schedule)
            self.like, local = query, tuple(x.to_local() for x in cast(Any, local))
        self.schedule = schedule
        self.batch, self.device = local[1].shape[0], local[1].device
        self.nq, self.nk = local[0].shape[1], local[1].shape[1]
        self._metadata: Tensor | None = None
        self._asked = False

    @property
    def metadata(self) -> Tensor | None:
        """The metadata of all ranks, as `Schedule.extents` takes it."""
        if not self._asked:
            self._metadata, self._asked = self.schedule.exchange_metadata(self.nq, self.nk, 0, None), True
        return self._metadata

    def extents(self) -> Extents:
        """The call's whole sequence, and what of it is here. Not in traced code."""
        return self.schedule.extents(self.nq, self.nk, self.metadata)

    def local(self, name: str, x: Any) -> Any:
        """This process's part of the option of that name: of a DTensor, where query is one."""
        some = is_sharded(x) or name == "score_terms"
        return dtensor_module().local_options(self.like, {name: x})[name] if is_sharded(self.like) and some else x

    def positions(self, start: int | None) -> tuple[Tensor, Tensor]:
        """Where rows of query and key stand, each (rows,) int64, where the whole's first query stands at `start`; None: the last of keys."""
        if self.schedule.distributed:
            q, k = torch.ops.longattn.row_positions(self.metadata, self.nq, self.nk, start, self.schedule.canonical())
            return q.to(self.device), k.to(self.device)
        q = torch.arange(self.nq, device=self.device) + (self.nk - self.nq if start is None else start)
        return q, torch.arange(self.nk, device=self.device)
