"""`PreparedShards`: many rectangles of one q, k and v that were looked up once, in the memo beside prepared calls of one rectangle.

A schedule within one process is such: shards of query rows, each with its rectangles in the order in which keys arrive. Where one row
serves them all and has a form for it, they are one call. Plans are looked up in the environment's cache at every call, one for each
rectangle, and where the cache has another plan than before, the whole is bound anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longattn.kernels.dispatch.environment import DEFAULT_ENVIRONMENT, Environment, find_plan_of
from longattn.kernels.dispatch.plans import plan_key
from longattn.kernels.dispatch.prepared import PREPARED, prepared_for, rectangle_key
from longattn.kernels.dispatch.table import TableRow
from longattn.kernels.ops.arguments import OpArguments, OpTensors
from longattn.patterncache import Plan


class ShardRectangle(NamedTuple):
    """A rectangle of a shard.

    Attributes:
        shard: which shard, counted from 0. rows: (first, length, step) of the whole's query rows, those of the shard.
        tensors: views of the whole's q, k and v. arguments: the op's arguments.
    """

    shard: int
    rows: tuple[int, int, int]
    tensors: OpTensors
    arguments: OpArguments


Cut = Callable[[OpTensors, Environment], Sequence[ShardRectangle]]
"""The rectangles of a whole; none where they are not views of its q, k and v."""


class PreparedShards:
    """A schedule's rectangles of one signature, bound as one call.

    Attributes:
        used: whether it was looked up since the memo last passed over it.
    """

    __slots__ = ("_bound", "_cut", "_keys", "_out_dtype", "_plans", "used")

    def __init__(self, cut: Cut, keys: list[Any], bound: Any, plans: Sequence[Plan], out_dtype: torch.dtype) -> None:
        self.used = False
        self._cut, self._keys, self._bound, self._out_dtype = cut, keys, bound, out_dtype
        self._plans = [weakref.ref(plan) for plan in plans]

    @classmethod
    def of(
        cls, cut: Cut, tensors: OpTensors, out_dtype: torch.dtype, environment: Environment
    ) -> PreparedShards | None:
        """Of rectangles that were all computed before, one by one; None where that cannot be one call. Nothing is looked up in the pattern cache."""
        rectangles = cut(tensors, environment)
        calls = [PREPARED.peek(rectangle_key(each.tensors, each.arguments)) for each in rectangles]
        plans = [call.plan for call in calls if call is not None]
        known = [plan for plan in plans if plan is not None]
        if not rectangles or len(known) < len(rectangles):
            return None
        bound = _bind(rectangles, tensors, known, out_dtype, environment)
        return (
            None
            if bound is None
            else cls(cut, [plan_key(each.arguments) for each in rectangles], bound, known, out_dtype)
        )

    def forward(self, tensors: OpTensors, environment: Environment) -> tuple[Tensor, Tensor] | None:
        """(out, lse) of tensors of this signature; None where these rectangles are no longer one call."""
        plans = [find_plan_of(key, environment) for key in self._keys]
        q, k, v = tensors[:3]
        if all(reference() is plan for reference, plan in zip(self._plans, plans, strict=True)):
            computed = self._bound(q, k, v, environment.allocator)
            if computed is not None:
                return computed
        bound = _bind(self._cut(tensors, environment), tensors, plans, self._out_dtype, environment)
        if bound is None:
            return None
        self._bound, self._plans = bound, [weakref.ref(plan) for plan in plans]
        return bound(q, k, v, environment.allocator)


def _bind(
    rectangles: Sequence[ShardRectangle],
    tensors: OpTensors,
    plans: Sequence[Plan],
    out_dtype: torch.dtype,
    environment: Environment,
) -> Any:
    """One call of the row that serves all rectangles which see anything; None where it is not one row, or has no such form."""
    q, k, v = tensors[:3]
    shards: dict[int, Any] = {}
    rows: dict[str, TableRow] = {}
    for each, plan in zip(rectangles, plans, strict=True):
        if not each.rows[1]:
            continue
        call = prepared_for(each.tensors, each.arguments, environment, plan)[0]
        rows[call.row.name] = call.row
        calls = shards.setdefault(each.shard, (each.rows, []))[1]
        if not plan.empty:
            calls.append(call.call(each.tensors, plan, environment))
    if len(rows) != 1:
        return None
    (row,) = rows.values()
    return None if row.bind_shards is None else row.bind_shards(q, k, v, list(shards.values()), out_dtype)


def run_shards(
    key: tuple[Hashable, ...], tensors: OpTensors, environment: Environment | None
) -> tuple[Tensor, Tensor] | None:
    """(out, lse) of the prepared schedule of a `signature`; None where there is none."""
    prepared = PREPARED.find(key)
    if prepared is None:
        return None
    return prepared.forward(tensors, DEFAULT_ENVIRONMENT if environment is None else environment)


def prepare_shards(
    key: tuple[Hashable, ...], cut: Cut, tensors: OpTensors, out_dtype: torch.dtype, environment: Environment
) -> None:
    """Keep a schedule of a `signature` in the memo, once its rectangles were computed one by one, if they can be one call."""
    prepared = PreparedShards.of(cut, tensors, out_dtype, environment)
    if prepared is not None:
        PREPARED.keep(key, prepared)
