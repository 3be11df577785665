"""Dilated attention beside dense SDPA and the torchscale-style pipeline, forward and forward + backward.

B=1, H=8, D=64, segments 2048/4096/8192 with rates 1/2/4, `heads="shared"`, normal inputs. Dense attention computes
something else (every pair), so the gate holds each side to the oracle of its own pattern; the torchscale-style pipeline
computes the same outputs, and is held to the same oracle, its gradients with differentiable merge weights.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import gate
from benchmarks.experiment import Direction, Labels, Path, Side, Targets
from benchmarks.peers.dense import dense_attention
from benchmarks.peers.torchscale_style import torchscale_style_attention
from longattn.attention import pattern_attention
from longattn.patterncache import Dilated, Full

HEADS, HEAD_DIM = 8, 64
RATES = (1, 2, 4)
SEGMENTS = (2048, 4096, 8192)
_TINY = 256


@dataclass(frozen=True)
class Problem:
    """What both sides are given: shape (1, seq_len, heads, head_dim) and the branches."""

    seq_len: int
    dtype: str
    causal: bool
    segments: tuple[int, ...] = SEGMENTS
    heads: int = HEADS
    head_dim: int = HEAD_DIM

    @property
    def pattern(self) -> Dilated:
        """The dilated pattern of these branches."""
        return Dilated(self.segments, RATES, heads="shared", causal=self.causal)

    def tensors(self, seq_len: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the upstream gradient, always the same normal numbers for one problem."""
        generator = torch.Generator().manual_seed(0)
        shape = (1, seq_len or self.seq_len, self.heads, self.head_dim)
        q, k, v, grad = (torch.randn(shape, generator=generator).to(getattr(torch, self.dtype)) for _ in range(4))
        return q, k, v, grad


@dataclass(frozen=True)
class DilatedExperiment:
    """Ours on a dilated pattern beside a peer, "dense" or "torchscale-style"."""

    problem: Problem
    peer: str
    direction: Direction
    targets: Targets

    @property
    def labels(self) -> Labels:
        """What the row says."""
        branches = "+".join(f"{s}/{r}" for s, r in zip(self.problem.segments, RATES, strict=True))
        variant = f"dilated {branches} h{self.problem.heads} d{self.problem.head_dim}"
        problem = self.problem
        return Labels("attention", variant, self.peer, problem.dtype, problem.seq_len, problem.causal, self.direction)

    @property
    def key(self) -> str:
        """Peer, dtype, length, mask and direction."""
        mask = "causal" if self.problem.causal else "full"
        return f"{self.peer}-{self.problem.dtype}-{self.problem.seq_len}-{mask}-{self.direction}"

    def prepare(self, side: Side) -> Path:
        """One side with its own tensors."""
        attention = self._attention(side)
        return Path(
            call=self._call(attention, self.problem.seq_len),
            first_call=self._call(attention, min(_TINY, self.problem.seq_len)),
            input_bytes=3 * self.problem.seq_len * self.problem.heads * self.problem.head_dim * self._dtype.itemsize,
        )

    def check(self) -> list[str]:
        """Both sides on sampled rows beside the oracle; gradients where both compute them."""
        backward = self.direction == "forward+backward"
        q, k, v, grad = self.problem.tensors()
        truth = _truth(self.problem, dense=False)
        found = gate.errors(self._attention("ours"), q, k, v, grad, truth, gradients=backward)
        failures = gate.red("ours", found, self._dtype)
        dense = self.peer == "dense"
        peer = self._attention("peer") if dense else _torchscale(self.problem, merge_grad=True)
        # At lengths where dense is slow its output is proof enough: it is torch's own function.
        with_gradients = backward and not (dense and self.problem.seq_len > 8192)
        truth = _truth(self.problem, dense=True) if dense else truth
        found = gate.errors(peer, q, k, v, grad, truth, gradients=with_gradients)
        return failures + gate.red(self.peer, found, self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.problem.dtype)

    def _attention(self, side: Side) -> gate.Attention:
        if side == "ours":
            pattern = self.problem.pattern
            return lambda q, k, v: _tensor(pattern_attention(q, k, v, pattern))
        if self.peer == "dense":
            return functools.partial(dense_attention, causal=self.problem.causal)
        return _torchscale(self.problem, merge_grad=False)

    def _call(self, attention: gate.Attention, seq_len: int) -> Callable[[], object]:
        q, k, v, grad = self.problem.tensors(seq_len)
        if self.direction == "forward":
            return lambda: attention(q, k, v)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        return lambda: torch.autograd.grad(attention(*inputs), inputs, grad)


def _torchscale(problem: Problem, merge_grad: bool) -> gate.Attention:
    return functools.partial(
        torchscale_style_attention,
        segment_lengths=problem.segments,
        dilation_rates=RATES,
        causal=problem.causal,
        merge_grad=merge_grad,
    )


def _tensor(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    assert isinstance(result, Tensor), "without return_lse the output comes alone"
    return result


@functools.lru_cache(maxsize=2)
def _truth(problem: Problem, dense: bool) -> gate.Truth:
    """The oracle's answers, kept for the experiments that share a problem (they follow each other)."""
    pattern = Full(causal=problem.causal) if dense else problem.pattern
    rows = gate.sampled_rows(problem.seq_len, problem.segments, amount=32)
    return gate.oracle(*problem.tensors(), pattern, rows)


def _targets(problem: Problem, peer: str, direction: Direction) -> Targets:
    """What was promised for this machine: issue 2's figures, for float32 only."""
    if problem.dtype != "float32":
        return Targets()
    growth = 0.6 if direction == "forward" else 2.2
    if peer == "torchscale-style":
        return Targets(ratio=0.95, growth=growth)
    at_length = problem.seq_len == 32768 and direction == "forward"
    return Targets(ratio=8.0 if at_length else None, growth=growth)


def experiments(quick: bool) -> Iterator[DilatedExperiment]:
    """Every row of the case; `quick` gives a few tiny ones without targets."""
    if quick:
        for causal, direction in itertools.product((True, False), _DIRECTIONS):
            problem = Problem(256, "float32", causal, segments=(64, 128, 256), heads=4, head_dim=16)
            yield DilatedExperiment(problem, "torchscale-style", direction, Targets())
        yield DilatedExperiment(Problem(256, "bfloat16", True, segments=(64, 128, 256)), "dense", "forward", Targets())
        return
    for seq_len, dtype, causal in itertools.product((8192, 32768), ("float32", "bfloat16"), (False, True)):
        problem = Problem(seq_len, dtype, causal)
        for peer, direction in itertools.product(("torchscale-style", "dense"), _DIRECTIONS):
            if peer == "dense" and direction == "forward+backward" and seq_len > 8192:
                continue  # dense backward at this length takes minutes a call and tells nothing new
            yield DilatedExperiment(problem, peer, direction, _targets(problem, peer, direction))


_DIRECTIONS: tuple[Direction, ...] = ("forward", "forward+backward")
