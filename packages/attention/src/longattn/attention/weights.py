"""Attention weights for those who want to look at them: dense, O(Nq * Nk) memory, or sparse, O(pairs seen)."""

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
    """softmax(scale * q k^T + log counts), differentiable, dense.

    Args:
        q: (batch, Nq, heads, head_dim); the last Nq positions. k: (batch, Nk, kv_heads, head_dim).
        pattern: who sees whom; a key that counts twice has the weight of both.
        softmax_scale: default head_dim ** -0.5.
        attention_mask: bool, True = may see, or floating, added to the scaled scores; broadcastable to (batch, heads, Nq, Nk).
        key_padding_mask: (batch, Nk) bool, True = padding.

    Returns:
        (batch, heads, Nq, Nk) in q's dtype; rows sum to one, or to zero where a query sees nothing.
    """
    rows = Span(max(0, k.shape[1] - q.shape[1]), q.shape[1])
    return _weights(q, k, pattern, rows, softmax_scale, attention_mask, key_padding_mask)[0]


_CELLS = 1 << 21
"""Weights that stand densely at a time while sparse ones are made: 8 MiB in float32."""


def sparse_attention_weights(
    q: Tensor,
    k: Tensor,
    pattern: Pattern,
    softmax_scale: float | None = None,
    attention_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """`attention_weights` as a coalesced sparse COO tensor of the same shape: an entry per pair that is seen.

    Strips of queries are made densely, one after the other, and only what is seen is kept. Arguments and errors as there.
    """
    (batch, nq, heads, _), nk = q.shape, k.shape[1]
    first, strip = max(0, nk - nq), max(1, _CELLS // max(1, batch * heads * nk))
    wide = None if attention_mask is None else attention_mask.expand(batch, heads, nq, nk)
    indices, values = [], []
    for begin in range(0, nq, strip):
        part = q[:, begin : begin + strip]
        mask = None if wide is None else wide[:, :, begin : begin + strip]
        rows = Span(first + begin, part.shape[1])
        weights, times = _weights(part, k, pattern, rows, softmax_scale, mask, key_padding_mask)
        at = times.expand(weights.shape).nonzero().unbind(1)
        values.append(weights[at])
        indices.append(torch.stack((at[0], at[1], at[2] + begin, at[3])))
    size = (batch, heads, nq, nk)
    at = torch.cat(indices, 1) if indices else torch.zeros(4, 0, dtype=torch.int64, device=q.device)
    kept = torch.cat(values) if values else q.new_zeros(0)
    return torch.sparse_coo_tensor(at, kept, size, check_invariants=True).coalesce()


def _weights(
    q: Tensor,
    k: Tensor,
    pattern: Pattern,
    rows: Span,
    softmax_scale: float | None,
    attention_mask: Tensor | None,
    key_padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(weights of the queries at positions `rows`, how often each pair is seen, broadcastable to them)."""
    nk, heads = k.shape[1], q.shape[2]
    counts = pattern.counts(Rectangle(heads, rows, Span(0, nk)))
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    times = torch.from_numpy(counts).to(q.device, dtype)
    floating = attention_mask is not None and attention_mask.dtype != torch.bool
    if attention_mask is not None:
        times = times * (attention_mask != -torch.inf if floating else attention_mask)
    if key_padding_mask is not None:
        times = times * ~key_padding_mask[:, None, None, :]
        k = k.masked_fill(key_padding_mask[:, :, None, None], 0)  # what padding holds reaches nothing
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    keys = k.repeat_interleave(heads // k.shape[2], 2).permute(0, 2, 3, 1).to(dtype)
    scores = q.transpose(1, 2).to(dtype) @ keys * scale
    if attention_mask is not None and floating:
        # Hidden pairs carry -inf from log(0) already; another -inf has no gradient.
        bias, most = attention_mask.masked_fill(attention_mask == -torch.inf, 0), torch.finfo(dtype).max
        scores = scores + bias.clamp(-most, most).to(dtype) if bias.dtype == torch.float64 else scores + bias.to(dtype)
    blind = (times == 0).all(-1, keepdim=True)
    scores = torch.where(blind, 0.0, scores + times.log())
    return torch.where(blind, 0.0, torch.softmax(scores, -1)).to(q.dtype), times
