"""One pass of a schedule: a `ScheduleRun` cuts a `ScheduleWork` into `QueryShard`s, whose keys arrive in `KeyStep`s.

Life of a `ScheduleRun`, one pass: 1. `Schedule.start` takes the work; 2. `shards` are computed once, in order, each with all of its steps;
3. `join` puts the results of each shard's queries into the caller's rows; 4. in a backward, `key_gradients` are dk and dv of this rank's keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longattn.attention.schedules.layouts import Spans
from longattn.kernels import Environment
from longattn.kernels.interface import OpArguments, OpTensors, state_dtype
from longattn.patterncache import Span


@dataclass(frozen=True)
class ScheduleWork:
    """One pass over this process's part of q, k and v.

    Attributes:
        queries: q (batch, Nq, heads, head_dim), and in a backward the tensors of its rows: grad_out, out, lse, perhaps grad_lse.
        tensors: the call's. mask and bias are broadcastable to (batch, heads, Nq, keys of the whole sequence); metadata is from
            `Schedule.exchange_metadata`.
        arguments: the call's other arguments; q_spans is empty where queries are the last positions.
        environment: where plans are cached and memory comes from.
    """

    queries: tuple[Tensor, ...]
    tensors: OpTensors
    arguments: OpArguments
    environment: Environment

    @property
    def k(self) -> Tensor:
        """(batch, Nk, kv_heads, head_dim)."""
        return self.tensors.k

    @property
    def v(self) -> Tensor:
        """(batch, Nk, kv_heads, head_dim)."""
        return self.tensors.v

    @property
    def padding(self) -> Tensor | None:
        """(batch, Nk) bool, or None."""
        return self.tensors.key_padding


@dataclass(frozen=True)
class KeyStep:
    """Keys and values that arrive together.

    Attributes:
        k, v: (batch, keys, kv_heads, head_dim). padding: (batch, keys) bool, or None.
        spans: their positions.
        give: called with their gradients, in a backward.
        rows: which columns of the run's masks they are, as spans of row numbers; None: all.
    """

    k: Tensor
    v: Tensor
    padding: Tensor | None
    spans: Spans
    give: Callable[[Tensor, Tensor], None]
    rows: Spans | None = None


@dataclass(frozen=True)
class QueryShard:
    """Some of the queries, and the steps in which their keys arrive.

    Attributes:
        queries: of its rows, as `ScheduleWork.queries`.
        spans: their positions.
        steps: the keys, in order of arrival.
        rows: which rows of the run's masks they are, as spans of row numbers; None: all.
        heads: (of the whole, first, count): the global query heads that are here.
    """

    queries: tuple[Tensor, ...]
    spans: Spans
    steps: Iterator[KeyStep]
    rows: Spans | None
    heads: tuple[int, int, int]


class ScheduleRun(ABC):
    """One pass of a schedule.

    Attributes:
        seed: 0-dim int64, the same on every rank, or None without dropout.
        mask, bias, by_distance: as in `ScheduleWork.tensors`, for the rows and heads of this run's shards.
        one_step: whether every shard has one step at most, so that nothing is merged.
        in_parts: whether gradients of the shards' steps are added up, so that each is made in float32 (float64).
        by_rows: whether all there is to `join` is to put each shard's results where its `rows` are.
    """

    seed: Tensor | None
    mask: Tensor | None
    bias: Tensor | None
    by_distance: Tensor | None
    one_step: bool = False
    in_parts: bool = True
    by_rows: bool = False

    @abstractmethod
    def shards(self) -> Iterator[QueryShard]:
        """The shards, once."""

    @abstractmethod
    def join(self, parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The results of the shards' queries, given in the order of `shards`, in the caller's order of rows."""

    @abstractmethod
    def key_gradients(self) -> tuple[Tensor, Tensor]:
        """dk and dv of this process's k and v, after all shards: float32 (float64) where more than one step added to them."""

    def bias_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient of `ScheduleWork.bias` from that of `bias`."""
        return gradient

    def by_distance_gradient(self, gradient: Tensor) -> Tensor:
        """This rank's share of the gradient of `ScheduleWork.tensors.by_distance` from that of `by_distance`."""
        return gradient


class GradientSum:
    """Adds gradients up in float32 (float64), whatever their dtype. A single one is itself, not a copy."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.sum: Tensor | None = None

    def add(self, part: Tensor) -> None:
        """One more part, in the shape of `like`; or the sum itself, to which a part was added in place."""
        if self.sum is None:
            self.sum = part
        elif part is not self.sum:
            self.wide().add_(part)

    def in_place(self) -> Tensor | None:
        """The sum so far in float32 (float64), contiguous, to be added to in place; None without any part."""
        return None if self.sum is None else self.wide()

    def wide(self) -> Tensor:
        """The sum so far in float32 (float64), contiguous, to be added to in place."""
        # A part is fresh: whoever computed it keeps no reference.
        so_far = self.total()
        self.sum = so_far.to(state_dtype(so_far.dtype)).contiguous()
        return self.sum

    def total(self) -> Tensor:
        """The sum; zeros without any part."""
        return torch.zeros_like(self.like, memory_format=torch.contiguous_format) if self.sum is None else self.sum


def query_spans(arguments: OpArguments, nq: int, nk: int) -> Spans:
    """Positions of all queries: from the start that was asked for, else the last of the keys'."""
    # Queries that outnumber keys without positions: the edge lets them pass only where positions do not matter.
    flat = arguments.q_spans or [max(nk - nq, 0), nq, 1]
    if len(flat) == 3:
        # The length there is that of one rank's queries.
        return (Span(flat[0], nq, flat[2]),)
    return tuple(Span(*flat[n : n + 3]) for n in range(0, len(flat), 3))
