"""`pattern_attention`: the one forward. Every module and preset of this package ends here."""

from __future__ import annotations

from typing import Literal, Never, overload

import torch
from torch import Tensor

from longattn.attention.schedule import Local, Schedule
from longattn.attention.validate import check_bool, check_dropout, check_pattern_argument, check_start, refuse_unknown
from longattn.kernels import AttentionState, attend
from longattn.patterncache import Pattern, Span


@overload
def pattern_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    is_causal: bool | None = None,
    softmax_scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[False] = False,
    backend: str | None = None,
    schedule: Schedule | None = None,
    q_start: int | None = None,
) -> Tensor: ...


@overload
def pattern_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    is_causal: bool | None = None,
    softmax_scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[True],
    backend: str | None = None,
    schedule: Schedule | None = None,
    q_start: int | None = None,
) -> tuple[Tensor, Tensor]: ...


def pattern_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    is_causal: bool | None = None,
    softmax_scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
    schedule: Schedule | None = None,
    q_start: int | None = None,
    **unknown: Never,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + log counts) v, where counts[h, i, j] says how often the pattern lets query i see key j.

    Args:
        q: (batch, Nq, heads, head_dim), float16, bfloat16, float32 or float64.
        k, v: (batch, Nk, kv_heads, head_dim), same dtype and device; kv_heads divides heads.
        pattern: who sees whom, such as Dilated((2048, 4096), (1, 2)).
        is_causal: replaces the pattern's causal field. Default None takes it.
        softmax_scale: default head_dim ** -0.5.
        key_padding_mask: (batch, Nk) bool, True = padding, as in torch.nn.MultiheadAttention. Hides; never shifts positions.
        attention_mask: bool, True = may see, broadcastable to (batch, heads, Nq, Nk).
        dropout_p: probability in [0, 1) of dropping a (query, key) pair. Default 0.
        return_lse: also return lse. Default False.
        backend: name of the row of longattn.kernels that must serve; None picks, and `longattn.kernels.explain` says which.
        schedule: in which order keys arrive. Default Local().
        q_start: position of the first query. Default: queries are the last Nq positions of the keys.

    Returns:
        (batch, Nq, heads, head_dim) in q's dtype, zero where a query sees nothing; with return_lse also lse (batch, Nq, heads) in
        float32 (float64 for float64): natural log, -inf = saw no key.

    Raises:
        TypeError, ValueError: a bad argument, by name; or no row fits, with each one's reasons.
    """
    refuse_unknown("pattern_attention()", unknown)
    check_pattern_argument(pattern)
    check_dropout("dropout_p", dropout_p)
    check_bool("return_lse", return_lse)
    if dropout_p:
        raise ValueError(f"dropout_p must be 0: no backend supports dropout, got {dropout_p}")
    spans = None if check_start("q_start", q_start) is None else (Span(q_start, q.shape[1]),)
    schedule = Local() if schedule is None else schedule
    states: list[AttentionState] = []
    for shard in schedule.shards(q, k, v, spans):
        state: AttentionState | None = None
        for step in shard.steps:
            state = attend(
                shard.q,
                step.k,
                step.v,
                pattern,
                is_causal=is_causal,
                prior=state,
                q_spans=shard.spans,
                k_spans=step.spans,
                softmax_scale=softmax_scale,
                attention_mask=_mask_rows(attention_mask, shard.rows, step.rows),
                key_padding_mask=key_padding_mask if step.rows is None else _rows(key_padding_mask, 1, step.rows),
                backend=backend,
                out_dtype=q.dtype if shard.rows is None and step.rows is None else None,
            )
        states.append(AttentionState.empty(shard.q) if state is None else state)
    state = schedule.join(states)
    out = state.finalize(q.dtype)
    return (out, state.lse) if return_lse else out


def _mask_rows(mask: Tensor | None, queries: Tensor | None, keys: Tensor | None) -> Tensor | None:
    """The part of a broadcastable (batch, heads, Nq, Nk) mask for some query and key rows."""
    if mask is None:
        return None
    if queries is not None and mask.dim() > 1:
        mask = _rows(mask, -2, queries)
    return mask if keys is None else _rows(mask, -1, keys)


def _rows(mask: Tensor | None, axis: int, rows: Tensor) -> Tensor | None:
    if mask is None or mask.shape[axis] == 1:
        return mask
    return torch.index_select(mask, axis, rows)
