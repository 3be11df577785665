"""`Schedule`: in which order keys arrive. `Local`: all at once.

A schedule cuts the work into shards of queries; to each shard, keys arrive step by step, and the forward merges what each step
gives. One device is the short case of many: one shard, one step. The forward never asks which schedule it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from longattn.kernels import AttentionState
from longattn.patterncache import Span

Spans = tuple[Span, ...]


@dataclass(frozen=True)
class Step:
    """Keys and values that arrive together.

    Attributes:
        k, v: (batch, keys, kv_heads, head_dim).
        spans: their positions; None: 0 .. keys.
        rows: which rows of the caller's keys they are, as spans of row numbers, for masks; None: all.
    """

    k: Tensor
    v: Tensor
    spans: Spans | None = None
    rows: Spans | None = None


@dataclass(frozen=True)
class Shard:
    """Some of the queries, and the steps in which their keys arrive.

    Attributes:
        q: (batch, queries, heads, head_dim).
        spans: their positions; None: the last of the keys'.
        rows: which rows of the caller's queries they are, as spans of row numbers, for masks; None: all.
        steps: what arrives, in order.
    """

    q: Tensor
    steps: Iterator[Step]
    spans: Spans | None = None
    rows: Spans | None = None


class Schedule(Protocol):
    """Cuts queries into shards and feeds them keys. Any schedule gives what `Local` gives: out, lse and gradients."""

    def shards(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans | None) -> Iterator[Shard]:
        """The work on q (batch, Nq, heads, head_dim), whose positions are `spans`, and k, v (batch, Nk, kv_heads, head_dim)."""
        ...

    def join(self, states: Sequence[AttentionState]) -> AttentionState:
        """The shards' states, in the order of `shards`, as one state in the caller's order of queries."""
        ...


@dataclass(frozen=True)
class Local:
    """Everything is here: one shard, one step."""

    def shards(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans | None) -> Iterator[Shard]:
        """q as it is, with all of k and v."""
        yield Shard(q, iter((Step(k, v),)), spans)

    def join(self, states: Sequence[AttentionState]) -> AttentionState:
        """The one state."""
        return states[0]
