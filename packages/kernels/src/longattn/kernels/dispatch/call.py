"""`Call`: what a row of the table is handed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longattn.kernels.dispatch.environment import ScratchAllocator
from longattn.patterncache import Plan


class GradientPart(NamedTuple):
    """What rectangles of one backward share, beside the merged out and lse.

    Attributes:
        minus_delta: (batch, Nq, heads) float32 (float64), contiguous: dlse - rowsum(dO * O). A row reads it in place of grad_lse and out, all but
            those that hand tiles to torch's or another library's kernels: these take out, and make delta of their own.
        dq: (batch, Nq, heads, head_dim) of that dtype, contiguous: the sum so far, or None. A row may add to it in place, and return it.
    """

    minus_delta: Tensor
    dq: Tensor | None


@dataclass(frozen=True)
class Call:
    """One rectangle to compute, checked, on real tensors.

    Attributes:
        q: (batch, Nq, heads, head_dim). k, v: (batch, Nk, kv_heads, head_dim), padded rows zeroed unless the row skips them. v, and with it
            out, may have another head_dim.
        plan: who sees whom, in rows of these tensors.
        scale: of the scores.
        mask: bool, True = may see, 4-D and broadcastable to (batch, heads, Nq, Nk), or None.
        bias: floating, added to the scaled scores, shaped like mask, or None; -inf hides.
        key_padding: (batch, Nk) bool, True = padding, or None.
        prior: (out, lse) to merge onto, read only, or None.
        dropout_p, seed: probability of dropping a (query, key) pair, and what decides which (see `philox`).
        out_dtype: dtype of the returned out.
        deterministic: equal inputs must give equal bits.
        allocator: who owns outputs and scratch.
        softcap: c where scaled scores s become c * tanh(s / c), before anything is added; 0: they stay.
        by_distance: what is added for each head and distance, as `terms` says, contiguous, in float32 (float64 for float64), or None.
        by_distance_grad: like it, what a backward adds its gradient to, in place; None: not wanted.
        part: in a backward of one rectangle of several; dq, dk and dv are then in float32 (float64).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    plan: Plan
    scale: float
    mask: Tensor | None
    bias: Tensor | None
    key_padding: Tensor | None
    prior: tuple[Tensor, Tensor] | None
    dropout_p: float
    seed: int
    out_dtype: torch.dtype
    deterministic: bool
    allocator: ScratchAllocator
    softcap: float = 0.0
    by_distance: Tensor | None = None
    by_distance_grad: Tensor | None = None
    part: GradientPart | None = None

    @property
    def gradient_dtypes(self) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        """Of dq, dk and dv."""
        if self.part is not None:
            dtype = self.part.minus_delta.dtype
            return dtype, dtype, dtype
        return self.q.dtype, self.k.dtype, self.v.dtype
