"""`Schedule`: in which order keys arrive. `Local`: all at once.

A schedule cuts the work into shards of queries; to each shard, keys arrive step by step. The forward merges what each step gives; the
backward goes through the same steps with the merged result, and each step takes its key gradients home. One device is the short case
of many: one shard, one step. Neither forward nor backward asks which schedule it runs.

Life of a `Run`, one pass: 1. `start` takes the work; 2. `shards` are gone through once, in order, each with all of its steps; 3. `join`
puts what was found for each shard's queries into the caller's rows; 4. in a backward, `key_gradients` are what came home.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from longattn.attention.layouts import Spans
from longattn.kernels.environment import Environment
from longattn.kernels.op import Asked
from longattn.kernels.state import state_dtype
from longattn.patterncache import Span
from longattn.patterncache.pattern import spec_text


@dataclass(frozen=True)
class Work:
    """One pass over this process's part of q, k and v.

    Attributes:
        queries: q (batch, Nq, heads, head_dim), and in a backward what belongs to its rows: grad_out, out, lse, perhaps grad_lse.
        k, v: (batch, Nk, kv_heads, head_dim). padding: (batch, Nk) bool, or None.
        mask, bias: broadcastable to (batch, heads, Nq, keys of the whole sequence), or None.
        asked: what else is asked; q_spans is empty where queries are the last positions; seed is what `agree` gave.
        environment: where plans are cached and memory comes from.
    """

    queries: tuple[Tensor, ...]
    k: Tensor
    v: Tensor
    padding: Tensor | None
    mask: Tensor | None
    bias: Tensor | None
    asked: Asked
    environment: Environment


@dataclass(frozen=True)
class Step:
    """Keys and values that arrive together.

    Attributes:
        k, v: (batch, keys, kv_heads, head_dim). padding: (batch, keys) bool, or None.
        spans: their positions.
        give: takes their gradients, in a backward.
        rows: which columns of the run's masks they are, as spans of row numbers; None: all.
    """

    k: Tensor
    v: Tensor
    padding: Tensor | None
    spans: Spans
    give: Callable[[Tensor, Tensor], None]
    rows: Spans | None = None


@dataclass(frozen=True)
class Shard:
    """Some of the queries, and the steps in which their keys arrive.

    Attributes:
        queries: of its rows, as `Work.queries`.
        spans: their positions.
        steps: what arrives, in order.
        rows: which rows of the run's masks they are, as spans of row numbers; None: all.
        heads: (of the whole, first, count): the global query heads that are here.
    """

    queries: tuple[Tensor, ...]
    spans: Spans
    steps: Iterator[Step]
    rows: Spans | None
    heads: tuple[int, int, int]


class Run(ABC):
    """One pass of a schedule.

    Attributes:
        seed: 0-dim int64, the same on every rank, or None without dropout.
        mask, bias: as in `Work`, for the rows and heads of this run's shards.
        one_step: whether every shard has one step at most, so that nothing is merged.
    """

    seed: Tensor | None
    mask: Tensor | None
    bias: Tensor | None
    one_step: bool = False

    @abstractmethod
    def shards(self) -> Iterator[Shard]:
        """The shards, once."""

    @abstractmethod
    def join(self, parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What was found for the shards' queries, in the order of `shards`, in the caller's order of rows."""

    @abstractmethod
    def key_gradients(self) -> tuple[Tensor, Tensor]:
        """dk and dv of this process's k and v, after all shards: float32 (float64) where more than one step gave."""

    def bias_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient of `Work.bias` from that of `bias`."""
        return gradient


_REGISTRY: dict[str, type[Schedule]] = {}

_HOME = {"local": "schedule", "ring": "ring", "all_gather": "all_gather", "ulysses": "ulysses"}
"""Submodule of each schedule of ours, so that a string can be read before anybody imported its class."""


class Schedule(ABC):
    """Cuts queries into shards and feeds them keys. Any schedule gives what `Local` gives: out, lse and gradients.

    To write one's own: subclass with a name (`class Mine(Schedule, name="mine")`), give `start`, `to_spec` and `from_spec`. It crosses
    into the op as its canonical string, JSON `["name",{spec}]`, so what it holds must be there.
    """

    name: ClassVar[str]

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:
            cls.name = name
            _REGISTRY[name] = cls

    @abstractmethod
    def start(self, work: Work) -> Run:
        """A pass over the work; process groups begin to talk."""

    @abstractmethod
    def to_spec(self) -> dict[str, Any]:
        """JSON values from which `from_spec` rebuilds this schedule."""

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """The schedule that `to_spec` described."""

    @property
    def distributed(self) -> bool:
        """Whether q, k and v are one rank's part of a longer sequence."""
        return False

    def held(self, length: int) -> Spans:
        """The rows of a sequence of `length` that this process hands to the forward."""
        return (Span(0, length),)

    def agree(self, nq: int, nk: int, flags: int, seed: Tensor | None) -> Tensor | None:
        """What `Work.asked.seed` is to be. Default: the seed. Process groups call the roll, and take rank 0's seed.

        flags: 1 where there is key padding, 2 where a mask has rows of its own for each query.
        """
        return seed

    @property
    def ranks(self) -> int:
        """Rows of what `call_roll` returns."""
        return 0

    def call_roll(self, nq: int, nk: int, flags: int, seed: int) -> Tensor:
        """What `longattn::roll_call` is for this schedule: (ranks, 4) int64."""
        raise NotImplementedError(f"{type(self).__name__} has no process group")

    def canonical(self) -> str:
        """The canonical string: equal for equal schedules. Kept with the schedule."""
        kept = self.__dict__.get("_canonical")
        if kept is None:
            kept = spec_text([self.name, self.to_spec()])
            object.__setattr__(self, "_canonical", kept)
        return kept


@lru_cache(maxsize=256)
def parse_schedule(text: str) -> Schedule:
    """The schedule of a canonical string.

    Raises:
        ValueError: no schedule of that name is registered in this process.
    """
    return build_schedule(*json.loads(text))


def build_schedule(name: str, spec: dict[str, Any]) -> Schedule:
    """The schedule registered under `name`, from its spec."""
    if name in _HOME:
        import_module(f"longattn.attention.{_HOME[name]}")
    if name not in _REGISTRY:
        raise ValueError(
            f"schedule must be one of {sorted(_REGISTRY)} (import the module that defines yours), got {name!r}"
        )
    return _REGISTRY[name].from_spec(spec)


def check_schedule_argument(schedule: object) -> Schedule:
    """A Schedule; None is `Local()`."""
    if schedule is None:
        return Local()
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"schedule must be None or a Schedule such as Ring(size=4), got {schedule!r} ({type(schedule).__name__})"
        )
    return schedule


class GradientSum:
    """Adds gradients up in float32 (float64), whatever their dtype. A single one is itself, not a copy."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.sum: Tensor | None = None
        self._own = False

    def add(self, part: Tensor) -> None:
        """One more part, in the shape of `like`."""
        if self.sum is None:
            self.sum = part
            return
        self.wide().add_(part)

    def wide(self) -> Tensor:
        """The sum so far in float32 (float64), contiguous, to be added to in place."""
        if not self._own:
            sum_so_far = self.total()
            dtype = state_dtype(sum_so_far.dtype)
            self.sum = sum_so_far.to(dtype, copy=True, memory_format=torch.contiguous_format)
            self._own = True
        assert self.sum is not None
        return self.sum

    def total(self) -> Tensor:
        """The sum; zeros without any part."""
        return torch.zeros_like(self.like, memory_format=torch.contiguous_format) if self.sum is None else self.sum


def query_spans(asked: Asked, nq: int, nk: int) -> Spans:
    """Positions of all queries: from the start that was asked for, else the last of the keys'."""
    # Queries that outnumber keys without positions: the edge lets them pass only where positions do not matter.
    return (Span(asked.q_spans[0] if asked.q_spans else max(nk - nq, 0), nq),)


class _LocalRun(Run):
    one_step = True

    def __init__(self, work: Work) -> None:
        self.work = work
        self.seed, self.mask, self.bias = work.asked.seed, work.mask, work.bias
        self._dk, self._dv = GradientSum(work.k), GradientSum(work.v)

    def _give(self, dk: Tensor, dv: Tensor) -> None:
        self._dk.add(dk)
        self._dv.add(dv)

    def shards(self) -> Iterator[Shard]:
        work, nq, nk = self.work, self.work.queries[0].shape[1], self.work.k.shape[1]
        step = Step(work.k, work.v, work.padding, (Span(0, nk),), self._give)
        total, first, count = work.asked.heads
        yield Shard(work.queries, query_spans(work.asked, nq, nk), iter((step,)), None, (total, first, count))

    def join(self, parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return parts[0]

    def key_gradients(self) -> tuple[Tensor, Tensor]:
        return self._dk.total(), self._dv.total()


@dataclass(frozen=True)
class Local(Schedule, name="local"):
    """Everything is here: one shard, one step."""

    def start(self, work: Work) -> Run:
        """A run with q as it is, and all of k and v."""
        return _LocalRun(work)

    def to_spec(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """Itself."""
        return cls(**spec)
