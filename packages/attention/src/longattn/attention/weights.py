"""Attention weights as a dense tensor, for those who want to look at them. O(Nq * Nk) memory."""

from __future__ import annotations

import torch
from torch import Tensor

from longattn.patterncache import Pattern, Rectangle, Span


def attention_weights(
    q: Tensor,
    k: Tensor,
    pattern: Pattern,
    softmax_scale: float | None = None,
    attention_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T + log counts), differentiable.

    Args:
        q: (batch, Nq, heads, head_dim); the last Nq positions. k: (batch, Nk, kv_heads, head_dim).
        pattern: who sees whom; a key that counts twice has the weight of both.
        softmax_scale: default head_dim ** -0.5.
        attention_mask: bool, True = may see, or floating, added to the scaled scores; broadcastable to (batch, heads, Nq, Nk).
        key_padding_mask: (batch, Nk) bool, True = padding.

    Returns:
        (batch, heads, Nq, Nk) in q's dtype; rows sum to one, or to zero where a query sees nothing.
    """
    nq, nk, heads = q.shape[1], k.shape[1], q.shape[2]
    counts = pattern.counts(Rectangle(heads, Span(max(0, nk - nq), nq), Span(0, nk)))
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    times = torch.from_numpy(counts).to(q.device, dtype)
    floating = attention_mask is not None and attention_mask.dtype != torch.bool
    if attention_mask is not None:
        times = times * (attention_mask != -torch.inf if floating else attention_mask)
    if key_padding_mask is not None:
        times = times * ~key_padding_mask[:, None, None, :]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    keys = k.repeat_interleave(heads // k.shape[2], 2).permute(0, 2, 3, 1).to(dtype)
    scores = q.transpose(1, 2).to(dtype) @ keys * scale
    if attention_mask is not None and floating:
        # Hidden pairs carry -inf from log(0) already; another -inf has no gradient.
        scores = scores + attention_mask.to(dtype).masked_fill(attention_mask == -torch.inf, 0)
    blind = (times == 0).all(-1, keepdim=True)
    scores = torch.where(blind, 0.0, scores + times.log())
    return torch.where(blind, 0.0, torch.softmax(scores, -1)).to(q.dtype)
