"""The float64 oracle: softmax(scores + log counts) @ v, dense and boring. It judges every path, outputs and gradients."""

# torch's own types are partial.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from longattn.kernels.check import check_broadcastable, check_key_padding, check_qkv, check_scale
from longattn.kernels.state import AttentionState
from longattn.kernels.terms import Alibi, ScoreTerms, Softcap, as_terms


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: np.ndarray | Tensor,
    softmax_scale: float | Tensor | None = None,
    *,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    keep: Tensor | None = None,
    score_terms: ScoreTerms = None,
    distance: Tensor | None = None,
) -> AttentionState:
    """Attention by its definition, in float64, differentiable by autograd. O(heads * Nq * Nk) memory.

    NaN and Inf in padded keys have no influence; in keys hidden by counts of 0 or a bias of -inf they have: 0 * NaN is NaN.

    Args:
        q: (batch, Nq, heads, head_dim). k, v: (batch, Nk, kv_heads, head_dim), kv_heads dividing heads; v may have its own head_dim.
            Any floating dtype.
        counts: (heads, Nq, Nk) or (batch, heads, Nq, Nk), how many times each query sees each key; 0 hides it.
        softmax_scale: a number, or a tensor () or (heads,). Default head_dim ** -0.5.
        bias: broadcastable to (batch, heads, Nq, Nk), added to the scores; -inf hides a key.
        key_padding_mask: (batch, Nk) bool, True = padding.
        keep: broadcastable to (batch, heads, Nq, Nk), multiplied with the weights: dropout. lse is undropped.
        score_terms: as in `attend`. A Softcap acts on the scaled products; everything else is added afterwards.
        distance: (Nq, Nk) integers, position of the key minus that of the query, for terms that read it. Default: keys stand at
            0 .. Nk, queries are the last Nq of them.

    Returns:
        AttentionState in float64: out (batch, Nq, heads, v's head_dim), lse (batch, Nq, heads), natural log, -inf = saw no key.

    Raises:
        TypeError, ValueError: an argument is not such a value, by name.
    """
    check_qkv(q, k, v)
    check_key_padding(key_padding_mask, q, k)
    pairs = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if not isinstance(softmax_scale, Tensor):
        softmax_scale = check_scale(softmax_scale)
    else:
        check_broadcastable("softmax_scale", softmax_scale, pairs[1:2])
    check_broadcastable("counts", torch.from_numpy(counts) if isinstance(counts, np.ndarray) else counts, pairs)
    for name, x in (("bias", bias), ("keep", keep)):
        if x is not None:
            check_broadcastable(name, x, pairs)
    if distance is not None:
        check_broadcastable("distance", distance, pairs[2:])
    weights, lse, _ = pair_weights(
        q, k, counts, softmax_scale, torch.float64, bias, key_padding_mask, score_terms, distance
    )
    if key_padding_mask is not None:
        v = v.masked_fill(key_padding_mask[:, :, None, None], 0)
    v = v.transpose(1, 2).to(torch.float64).repeat_interleave(q.shape[2] // v.shape[2], 1)
    out = (weights if keep is None else weights * keep) @ v
    return AttentionState(out.transpose(1, 2), lse.transpose(1, 2))


def pair_weights(
    q: Tensor,
    k: Tensor,
    counts: np.ndarray | Tensor,
    softmax_scale: float | Tensor | None,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    score_terms: ScoreTerms = None,
    distance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(scores + log counts) and what it is made of, computed in `dtype`. Arguments as in `reference_attention`, not checked.

    Returns:
        The weights (batch, heads, Nq, Nk), lse (batch, heads, Nq), and the counts (batch, heads, Nq, Nk) that masks have left.
    """
    group, scale = q.shape[2] // k.shape[2], q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    times = torch.as_tensor(counts, device=q.device).to(dtype)
    times = times.expand(q.shape[0], *times.shape[-3:])
    if key_padding_mask is not None:
        k = k.masked_fill(key_padding_mask[:, :, None, None], 0)  # what padding holds reaches nothing
        times = times * ~key_padding_mask[:, None, None, :]
    keys = k.transpose(1, 2).to(dtype).repeat_interleave(group, 1)
    products = q.transpose(1, 2).to(dtype) @ keys.transpose(-1, -2)
    scores = products * (scale.to(dtype)[..., None, None] if isinstance(scale, Tensor) else scale)
    scores = _with_terms(scores, score_terms, distance)
    if bias is not None:
        hidden = bias == -torch.inf
        times = times * ~hidden
        # -inf comes from log(0) below: another one has no gradient. What float32 cannot hold is its largest number, not inf.
        bias, most = bias.masked_fill(hidden, 0), torch.finfo(dtype).max
        scores = scores + (bias.clamp(-most, most) if bias.dtype.itemsize > dtype.itemsize else bias).to(dtype)
    # log 0 = -inf hides a key. Rows that see nothing get finite scores first, and are cleared afterwards: no NaN in any gradient.
    blind = (times == 0).all(-1, keepdim=True)
    scores = torch.where(blind, 0.0, scores + times.log())
    # Divided by their sum, not by exp(lse): beside a bias such as finfo.min lse has no digits left for how many keys there are.
    pivot = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.sum(-1, keepdim=True)
    weights = (scores - pivot).exp()
    total = weights.sum(-1, keepdim=True)
    lse = (pivot + torch.where(total == 0, 1.0, total).log()).squeeze(-1)
    return (
        torch.where(blind, 0.0, weights / total),
        torch.where(blind.squeeze(-1), -torch.inf, lse),
        times,
    )


def _with_terms(scores: Tensor, score_terms: ScoreTerms, distance: Tensor | None) -> Tensor:
    """Scores (batch, heads, Nq, Nk), capped, with what terms add for each pair."""
    terms = sorted(as_terms(score_terms), key=lambda term: not isinstance(term, Softcap))
    if distance is None:
        nq, nk = scores.shape[-2:]
        distance = torch.arange(nk, device="cpu") - torch.arange(nk - nq, nk, device="cpu")[:, None]
    distance = distance.to(scores.device)
    for term in terms:
        if isinstance(term, Softcap):
            scores = term.value * torch.tanh(scores / term.value)
        elif isinstance(term, Alibi):
            scores = scores - term.slopes.to(scores.dtype)[:, None, None] * distance.abs()
        else:
            scores = scores + term.table.to(scores.dtype)[term.buckets(distance)].movedim(-1, 0)
    return scores
