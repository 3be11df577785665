"""Experiments of one shape: two sides take the same three tensors, and each is held to an oracle of its own.

A case builds `Comparison`s from the contenders of `benchmarks/contenders.py`; everything else (who is timed, what the
gate checks, how a row is named) is here, once.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import gate
from benchmarks.experiment import Labels, Path, Side, Targets
from longattn.patterncache import Pattern

_TINY = 256
_CHECKED_ROWS = 32


@dataclass(frozen=True)
class Inputs:
    """What both sides are given: three tensors and an upstream gradient, each (1, seq_len, *per_token).

    `per_token` is (heads, head_dim), or (embed_dim,) for multihead modules. Default (8, 64).
    """

    seq_len: int
    dtype: str
    per_token: tuple[int, ...] = (8, 64)

    def tensors(self, seq_len: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the upstream gradient: always the same normal numbers for equal inputs."""
        generator = torch.Generator().manual_seed(0)
        shape = (1, seq_len or self.seq_len, *self.per_token)
        q, k, v, grad = (torch.randn(shape, generator=generator).to(self.torch_dtype) for _ in range(4))
        return q, k, v, grad

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that `dtype` names."""
        return getattr(torch, self.dtype)

    @property
    def bytes(self) -> int:
        """Size of q, k and v together."""
        return 3 * self.seq_len * math.prod(self.per_token) * self.torch_dtype.itemsize


Oracle = Callable[[Inputs, tuple[int, ...]], gate.Truth]


@dataclass(frozen=True)
class Contender:
    """One side.

    `attention` is what is timed; `truth` gives the float64 answers for some rows of queries; `checked` is what the gate
    holds to them where that is not `attention` itself (a peer that, by design, computes something else at the end).
    """

    attention: gate.Attention
    truth: Oracle
    checked: gate.Attention | None = None


@dataclass(frozen=True)
class Comparison:
    """An experiment (the protocol of `benchmarks/experiment.py`) over two contenders.

    `name` opens the key where peer, dtype, length, mask and direction do not tell experiments of a case apart; rows on
    both sides of `borders` are among those that the gate checks.
    """

    labels: Labels
    inputs: Inputs
    ours: Contender = field(compare=False, repr=False)
    peer: Contender = field(compare=False, repr=False)
    targets: Targets
    name: str = ""
    borders: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """Name, peer, dtype, length, mask and direction."""
        labels = self.labels
        mask = "causal" if labels.causal else "full"
        parts = [labels.peer, labels.dtype, str(labels.seq_len), mask, labels.direction]
        return "-".join([self.name, *parts] if self.name else parts)

    def prepare(self, side: Side) -> Path:
        """One side with its own tensors."""
        attention = (self.ours if side == "ours" else self.peer).attention
        seq_len = self.inputs.seq_len
        return Path(
            call=self._call(attention, seq_len),
            first_call=self._call(attention, min(_TINY, seq_len)),
            input_bytes=self.inputs.bytes,
        )

    def check(self) -> list[str]:
        """Both sides on sampled rows beside their oracles; gradients where they are timed."""
        gradients = self.labels.direction == "forward+backward"
        rows = tuple(gate.sampled_rows(self.inputs.seq_len, self.borders, amount=_CHECKED_ROWS))
        tensors = self.inputs.tensors()
        failures: list[str] = []
        for name, side in (("ours", self.ours), (self.labels.peer, self.peer)):
            truth = side.truth(self.inputs, rows)
            errors = gate.errors(side.checked or side.attention, *tensors, truth, gradients=gradients)
            failures += gate.red(name, errors, self.inputs.torch_dtype)
        return failures

    def _call(self, attention: gate.Attention, seq_len: int) -> Callable[[], object]:
        q, k, v, grad = self.inputs.tensors(seq_len)
        if self.labels.direction == "forward":
            return lambda: attention(q, k, v)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        return lambda: torch.autograd.grad(attention(*inputs), inputs, grad)


def pattern_oracle(pattern: Pattern) -> Oracle:
    """The oracle of sides that compute attention by `pattern`."""
    return functools.partial(_pattern_truth, pattern)


# Experiments that share inputs and pattern follow each other; two, because sides may differ in pattern.
@functools.lru_cache(maxsize=2)
def _pattern_truth(pattern: Pattern, inputs: Inputs, rows: tuple[int, ...]) -> gate.Truth:
    return gate.oracle(*inputs.tensors(), pattern, rows)
