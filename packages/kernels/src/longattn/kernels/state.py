"""`AttentionState` and `merge`: partial attention results, and how they add up.

A state is a softmax-weighted mean `out` and the log of its weight `lse`. States over disjoint multisets of keys merge into the state
over their sum: a commutative monoid whose identity is the empty state. A ring step, a second branch, a wrapped ring buffer, a
split-K part and an attention sink are all this one operation (flashinfer's recursive attention; LongNet equation 10).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longattn.patterncache.spans import shortened

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What q, k and v may be of."""

_STRIP = 256
"""Rows of which products stand at a time."""


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """What partial results of inputs of `dtype` are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class AttentionState:
    """What is known after some of the keys.

    Attributes:
        out: (batch, seq, heads, head_dim of v), float32 (float64 for float64 inputs) until `finalize`; zero where no key was seen.
        lse: (batch, seq, heads), float32 (float64), natural log of the summed exp(scale * q k + bias + log counts);
            -inf = saw no key.
    """

    out: Tensor
    lse: Tensor

    @classmethod
    def empty(cls, out: Tensor) -> AttentionState:
        """The identity of `merge`, shaped like `out` (batch, seq, heads, head_dim).

        Raises:
            TypeError: out is no tensor.
        """
        if not isinstance(out, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"out must be a torch.Tensor, got {shortened(out)} ({type(out).__name__})")
        dtype = state_dtype(out.dtype)
        lse = torch.full(out.shape[:-1], -torch.inf, dtype=dtype, device=out.device)
        return cls(torch.zeros_like(out, dtype=dtype), lse)

    def finalize(self, dtype: torch.dtype) -> Tensor:
        """`out` in `dtype`: the one rounding, whatever the number of merges.

        Raises:
            TypeError: dtype is no torch.dtype.
        """
        if not isinstance(dtype, torch.dtype):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"dtype must be a torch.dtype, got {shortened(dtype)} ({type(dtype).__name__})")
        return self.out.to(dtype)


def merge(first: AttentionState, second: AttentionState) -> AttentionState:
    """The state over the keys of both. Commutative, associative up to rounding, differentiable in both; fresh tensors.

    Raises:
        TypeError, ValueError: not two states of the same shape, or of dtypes other than float32 and float64.
    """
    for name, state in (("first", first), ("second", second)):
        if not isinstance(state, AttentionState):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{name} must be an AttentionState, got {type(state).__name__}")
        if state.out.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{name}.out must be float32 or float64 (merging rounded states loses precision), got {state.out.dtype}"
            )
    if first.out.shape != second.out.shape or first.lse.shape != second.lse.shape:
        raise ValueError(
            f"second must have the shapes of first, out {tuple(first.out.shape)} and lse {tuple(first.lse.shape)}, "
            f"got {tuple(second.out.shape)} and {tuple(second.lse.shape)}"
        )
    # The pivot is finite for rows that saw nothing on either side, so that no inf - inf arises, forward or backward.
    pivot = torch.maximum(first.lse, second.lse).detach()
    pivot = torch.where(pivot == -torch.inf, 0.0, pivot)
    a, b = (first.lse - pivot).exp(), (second.lse - pivot).exp()
    total = a + b
    seen = torch.where(total == 0, 1.0, total)
    out = first.out * (a / seen).unsqueeze(-1) + second.out * (b / seen).unsqueeze(-1)
    lse = torch.where(total == 0, -torch.inf, pivot + seen.log())
    return AttentionState(out, lse)


def merge_detached(states: Sequence[AttentionState]) -> AttentionState:
    """`merge` of all of them, but with merge weights that are constants to autograd, as torchscale has them.

    out = sum of states[b].out * softmax over b of states[b].lse; the softmax is detached, so no gradient of out reaches an lse. The gradient
    of the merged lse is exact. torchscale: `component/dilated_attention.py`, where the softmax is computed under no_grad.
    """
    lse = torch.stack([state.lse for state in states])
    # Finite for rows that saw nothing anywhere, as in `merge`.
    pivot = lse.detach().amax(0)
    pivot = torch.where(pivot == -torch.inf, 0.0, pivot)
    each = (lse - pivot).exp()
    total = each.sum(0)
    seen = torch.where(total == 0, 1.0, total)
    weights = (each / seen).detach().unsqueeze(-1)
    out = torch.stack([state.out for state in states]).mul(weights).sum(0)
    return AttentionState(out, torch.where(total == 0, -torch.inf, pivot + seen.log()))


def merge_into(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """`merge` in place on `out` (..., d) and `lse` (...), which may be strided views. Not differentiable; for use inside one call.

    Both lse may be float64 beside a float32 `out`, where many merges follow and lse is to be rounded once.
    """
    # Weight of the other side. inf - inf (both empty) is NaN: then the other side weighs nothing.
    weight = torch.sigmoid(other_lse - lse).nan_to_num_(nan=0.0).to(out.dtype)
    out.lerp_(other_out, weight.unsqueeze(-1))
    torch.logaddexp(lse, other_lse, out=lse)


def minus_delta_of(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor) -> Tensor:
    """dlse - rowsum(dO * O), (batch, Nq, heads) in float32 (float64): what a backward needs of the merged result, one number a row.

    Made strip by strip: no product stands whole.
    """
    dtype = state_dtype(out.dtype)
    total = (
        torch.zeros(out.shape[:3], dtype=dtype, device=out.device)
        if grad_lse is None
        else grad_lse.to(dtype, copy=True)
    )
    for first in range(0, out.shape[1], _STRIP):
        rows = first, min(_STRIP, out.shape[1] - first)
        own = (x.narrow(1, *rows).to(dtype) for x in (grad_out, out))
        total.narrow(1, *rows).sub_(torch.mul(*own).sum(-1))
    return total


def add_sink(state: AttentionState, sink_logits: Tensor) -> AttentionState:
    """`merge` with the state (out 0, lse = sink_logits per head): a learned attention sink. Differentiable in all.

    Args:
        state: out (batch, seq, heads, head_dim), lse (batch, seq, heads).
        sink_logits: (heads,), natural log; -inf is no sink.
    """
    logits = sink_logits.to(state.lse.dtype)
    # -inf - -inf is NaN: a row without keys and without a sink is left as it is, and out of every gradient.
    blind = (state.lse == -torch.inf) & (logits == -torch.inf)
    lse = state.lse.masked_fill(blind, 0)
    out = state.out * torch.sigmoid(lse - logits).unsqueeze(-1)
    return AttentionState(out, torch.logaddexp(lse, logits).masked_fill(blind, -torch.inf))
