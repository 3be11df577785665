"""What a case hands to the harness: an experiment compares one call of ours with one call of a peer.

An experiment is only a description until `prepare` builds one side's tensors, so that a fresh process can build one
side alone. `find` names an experiment again in another process, by case and key.
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

Side = Literal["ours", "peer"]
Direction = Literal["forward", "forward+backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "forward+backward")

# The cases, in the order in which they run: name and module.
CASES: dict[str, str] = {
    "attention": "benchmarks.cases.attention",
    "presets": "benchmarks.cases.presets",
    "patterns": "benchmarks.cases.patterns",
    "buffers": "benchmarks.cases.buffers",
    "modules": "benchmarks.cases.modules",
    "native": "benchmarks.cases.native",
    "cache": "benchmarks.cases.cache",
    "planning": "benchmarks.cases.planning",
    "decode": "benchmarks.cases.decode",
    "windows": "benchmarks.cases.windows",
    "host": "benchmarks.cases.host",
    "tiles": "benchmarks.cases.tiles",
    "growth": "benchmarks.cases.growth",
    "padded": "benchmarks.cases.padded",
    "streaming": "benchmarks.cases.streaming",
}


@dataclass(frozen=True)
class Labels:
    """What a row of results says about its experiment.

    `variant` is how ours is configured, `peer` what it is compared with, `dtype` a torch dtype's bare name,
    `seq_len` in tokens.
    """

    case: str
    variant: str
    peer: str
    dtype: str
    seq_len: int
    causal: bool
    direction: Direction


@dataclass(frozen=True)
class Targets:
    """What the row should reach; None where nothing was promised.

    `ratio`: the peer's median CPU time over ours, at least. `growth`: our peak growth over q+k+v, at most. `most_ms`: our
    median CPU time, at most.
    """

    ratio: float | None = None
    growth: float | None = None
    most_ms: float | None = None


@dataclass(frozen=True)
class Path:
    """One side, ready to run.

    `call` runs the whole problem once; `first_call` runs a tiny problem through the same code, so that what a first
    call loads is not counted as the problem's memory; `input_bytes` is the size of q, k and v.
    """

    call: Callable[[], object]
    first_call: Callable[[], object]
    input_bytes: int


class Experiment(Protocol):
    """One row to be. `key` is unique within its case."""

    @property
    def labels(self) -> Labels:
        """What the row says."""
        ...

    @property
    def targets(self) -> Targets:
        """What the row should reach."""
        ...

    @property
    def key(self) -> str:
        """The experiment's name within its case."""
        ...

    def prepare(self, side: Side) -> Path:
        """Build one side. Both sides of an experiment have equal inputs."""
        ...

    def check(self) -> list[str]:
        """The correctness gate: a sentence per failure; an empty list is green."""
        ...


def experiments(case: str, *, quick: bool) -> Iterable[Experiment]:
    """The experiments of a case, in order.

    Raises:
        ValueError: `case` is not one of `CASES`.
    """
    if case not in CASES:
        raise ValueError(f"case must be one of {', '.join(CASES)}, got {case!r}")
    return importlib.import_module(CASES[case]).experiments(quick)


def find(case: str, key: str, *, quick: bool) -> Experiment:
    """The experiment of that key.

    Raises:
        ValueError: the case or the key is unknown.
    """
    for experiment in experiments(case, quick=quick):
        if experiment.key == key:
            return experiment
    raise ValueError(f"key must name an experiment of case {case!r}, got {key!r}")
