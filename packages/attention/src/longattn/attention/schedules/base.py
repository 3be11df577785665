"""`Schedule`: in which order keys arrive.

A schedule cuts the work into shards of queries; to each shard, keys arrive step by step. The forward merges what each step gives; the
backward goes through the same steps with the merged result, and each step adds its key gradients to those of the rank that owns the
keys. One device is the short case of many: one shard, one step. Neither forward nor backward asks which schedule it runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Self

from torch import Tensor

from longattn.attention.schedules.extents import Extents
from longattn.attention.schedules.layouts import Spans
from longattn.attention.schedules.passes import ScheduleRun, ScheduleWork
from longattn.patterncache import Span
from longattn.patterncache.canonical import spec_text
from longattn.patterncache.spans import shortened

_REGISTRY: dict[str, type[Schedule]] = {}
"""Every schedule that has a name, under it: a class registers itself when it is defined."""


class Schedule(ABC):
    """Cuts queries into shards and feeds them keys. Any schedule gives what `Local` gives: out, lse and gradients.

    To write one's own: subclass with a name (`class Mine(Schedule, name="mine")`), give `start`, `to_spec` and `from_spec`, and over
    processes `extents` and `gather_keys`. It crosses into the op as its canonical string, JSON `["name",{spec}]`, so what it holds must be there.
    """

    name: ClassVar[str]

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:
            cls.name = name
            _REGISTRY[name] = cls

    @abstractmethod
    def start(self, work: ScheduleWork) -> ScheduleRun:
        """A pass over the work; over a process group, its exchanges begin."""

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

    @property
    def whole(self) -> bool:
        """Whether the whole call is one rectangle, so that the kernels can be asked without a schedule."""
        return False

    def held(self, length: int) -> Spans:
        """The rows of a sequence of `length` that this process hands to the forward."""
        return (Span(0, length),)

    def underway(self) -> AbstractContextManager[None]:
        """The context of one pass. Over a process group: what fails in it is noticed, and later calls are refused."""
        return nullcontext()

    def exchange_metadata(self, nq: int, nk: int, flags: int, seed: Tensor | None) -> Tensor | None:
        """What becomes `ScheduleWork.tensors.metadata`. Default: None. Over a process group: the metadata of all ranks, with rank 0's seed.

        flags: `extents.mask_flags` of this rank's masks.
        """
        return None

    def extents(self, nq: int, nk: int, metadata: Tensor | None) -> Extents:
        """Where this process's rows of q and k, `nq` and `nk` of them, stand in the whole sequence; metadata is from `exchange_metadata`.

        Raises:
            NotImplementedError: a user's schedule over processes that does not define this.
        """
        if self.distributed:
            raise NotImplementedError(f"{type(self).__name__} must define extents() for what depends on positions")
        return Extents.of_whole(nq, nk)

    def gather_keys(self, x: Tensor, nq: int, nk: int, metadata: Tensor | None) -> Tensor:
        """All rows of the whole sequence of keys, in order, from this rank's rows (batch, nk, ...); differentiable.

        Raises:
            NotImplementedError: a user's schedule over processes that does not define this.
        """
        if self.distributed:
            raise NotImplementedError(f"{type(self).__name__} must define gather_keys() for weights")
        return x

    @property
    def ranks(self) -> int:
        """Rows of what `gather_metadata` returns."""
        return 0

    def gather_metadata(self, nq: int, nk: int, flags: int, seed: int | None) -> Tensor:
        """What `longattn::roll_call` is for this schedule: (ranks, 5) int64. seed: None without dropout."""
        raise NotImplementedError(f"{type(self).__name__} has no process group")

    def canonical(self) -> str:
        """The canonical string: equal for equal schedules. Built once."""
        text = self.__dict__.get("_canonical")
        if text is None:
            text = spec_text([self.name, self.to_spec()])
            object.__setattr__(self, "_canonical", text)
        return text


def build_schedule(name: str, spec: dict[str, Any]) -> Schedule:
    """The schedule registered under `name`, from its spec.

    Raises:
        ValueError: no schedule of that name is registered in this process.
    """
    if name not in _REGISTRY:
        raise ValueError(
            f"schedule must be one of {sorted(_REGISTRY)} (import the module that defines yours), got {shortened(name)}"
        )
    return _REGISTRY[name].from_spec(spec)
