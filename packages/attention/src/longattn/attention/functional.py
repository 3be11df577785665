"""`pattern_attention`: the one forward. Every module and preset of this package ends here."""

from __future__ import annotations

from functools import reduce
from typing import Any, Literal, Never, overload

import torch
from torch import Tensor

from longattn.attention.schedule import Local, Schedule, Shard, Spans, Step
from longattn.attention.validate import check_bool, check_pattern_argument, check_start, refuse_unknown
from longattn.kernels import AttentionState, attend, merge
from longattn.kernels.check import check_attention_mask, check_dropout, check_key_padding, check_sinks
from longattn.kernels.environment import Environment
from longattn.kernels.philox import as_seed
from longattn.kernels.state import add_sink
from longattn.patterncache import Pattern, Rectangle, Span, get_global_pattern_cache


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
    seed: Tensor | int | None = None,
    sink_logits: Tensor | None = None,
    deterministic: bool | None = None,
    environment: Environment | None = None,
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
    seed: Tensor | int | None = None,
    sink_logits: Tensor | None = None,
    deterministic: bool | None = None,
    environment: Environment | None = None,
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
    seed: Tensor | int | None = None,
    sink_logits: Tensor | None = None,
    deterministic: bool | None = None,
    environment: Environment | None = None,
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
        attention_mask: bool, True = may see, or floating, added to the scaled scores, with gradient; broadcastable to
            (batch, heads, Nq, Nk).
        dropout_p: probability in [0, 1) of dropping a (query, key) pair. Default 0. lse is undropped.
        return_lse: also return lse. Default False.
        backend: name of the row of longattn.kernels that must serve; None picks, and `longattn.kernels.explain` says which.
        schedule: in which order keys arrive. Default Local().
        q_start: position of the first query. Default: queries are the last Nq positions of the keys.
        seed: 0-dim int64 CPU tensor or integer that decides what is dropped, the same under any schedule. Default: drawn from torch's
            generator, once a call.
        sink_logits: (heads,), a learned sink per head, with gradient: joins the softmax once, as a key of that score and value zero.
        deterministic: equal inputs give equal bits. Default: torch.are_deterministic_algorithms_enabled().
        environment: where plans are cached and memory comes from. Default: the global cache, plain torch; always so in traced code.

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
    if is_causal is not None and check_bool("is_causal", is_causal) != pattern.causal:
        pattern = pattern.with_causal(is_causal)
    start = check_start("q_start", q_start)
    spans = None if start is None else (Span(start, q.shape[1]),)
    schedule = Local() if schedule is None else schedule
    options: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "dropout_p": dropout_p,
        # Drawn here: shards and steps drop the same pairs.
        "seed": as_seed(seed) if dropout_p else None,
        "backend": backend,
        "deterministic": deterministic,
        "environment": environment,
    }
    states: list[AttentionState] = []
    for shard in schedule.shards(q, k, v, spans):
        if shard.rows is not None:
            _check_whole(q, k, pattern, spans, attention_mask, key_padding_mask)
        parts = _Parts()
        for step in shard.steps:
            # The first step always runs: it checks the other arguments and ties the output to q, k and v.
            if parts.waiting and _sees_nothing(pattern, q.shape[2], shard, step, environment):
                continue
            whole = shard.rows is None and step.rows is None and sink_logits is None
            masks = (_mask_rows(attention_mask, shard.rows, step.rows), _rows(key_padding_mask, 1, step.rows))
            parts.add(_attend(pattern, shard, step, masks, q.dtype if whole else None, options))
        states.append(parts.merged() or AttentionState.empty(shard.q))
    state = schedule.join(states)
    if sink_logits is not None:
        check_sinks(sink_logits, q)
        state = add_sink(state, sink_logits)
    out = state.finalize(q.dtype)
    return (out, state.lse) if return_lse else out


def _attend(
    pattern: Pattern,
    shard: Shard,
    step: Step,
    masks: tuple[Tensor | None, Tensor | None],
    out_dtype: torch.dtype | None,
    options: dict[str, Any],
) -> AttentionState:
    """One rectangle. out_dtype: of a state that nothing will be merged onto; None for the others."""
    return attend(
        shard.q,
        step.k,
        step.v,
        pattern,
        q_spans=shard.spans,
        k_spans=step.spans,
        attention_mask=masks[0],
        key_padding_mask=masks[1],
        out_dtype=out_dtype,
        **options,
    )


class _Parts:
    """Merges parts as they come, like a binary counter: 2 ** n parts are merged n deep, and log2 of their number stand at a time.

    One after the other, each part would round the whole sum again: 16 parts made twice Local's error in lse.
    """

    def __init__(self) -> None:
        self.waiting: list[tuple[int, AttentionState]] = []

    def add(self, state: AttentionState) -> None:
        """Merge with what is as deep, and what comes of that likewise."""
        depth = 0
        while self.waiting and self.waiting[-1][0] == depth:
            state, depth = merge(self.waiting.pop()[1], state), depth + 1
        self.waiting.append((depth, state))

    def merged(self) -> AttentionState | None:
        """The state over all parts; None without any."""
        states = [state for _, state in reversed(self.waiting)]
        return reduce(merge, states) if states else None


def _check_whole(
    q: Tensor, k: Tensor, pattern: Pattern, spans: Spans | None, mask: Tensor | None, key_padding: Tensor | None
) -> None:
    """What only the whole call can show, before it is cut."""
    check_attention_mask(mask, q, k)
    check_key_padding(key_padding, q, k)
    if spans is None and q.shape[1] > k.shape[1] and pattern.positional:
        raise ValueError(
            f"q_start must be given where queries outnumber keys and positions matter, got Nq={q.shape[1]}, Nk={k.shape[1]}"
        )


def _sees_nothing(pattern: Pattern, heads: int, shard: Shard, step: Step, environment: Environment | None) -> bool:
    """Whether the rectangle of a shard and a step is known to be empty. Traced code never knows: it reads no cache."""
    if shard.spans is None or step.spans is None or torch.compiler.is_compiling():
        return False
    queries, keys = shard.spans, step.spans
    # The op's own key: what is found here is what the op finds.
    flat = (tuple(n for s in side for n in (s.start, s.length, s.step)) for side in (queries, keys))
    cache = get_global_pattern_cache() if environment is None else environment.cache
    key = (pattern.canonical(), *flat, (heads, 0, heads))
    return cache.get_or_build(key, lambda: pattern.plan(Rectangle(heads, queries, keys))).empty


def _mask_rows(mask: Tensor | None, queries: Spans | None, keys: Spans | None) -> Tensor | None:
    """The part of a broadcastable (batch, heads, Nq, Nk) mask for some query and key rows; views where one span says which."""
    if mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
        mask = _rows(mask, -2, queries)
    return mask if mask is None or mask.dim() == 0 or mask.shape[-1] == 1 else _rows(mask, -1, keys)


def _rows(mask: Tensor | None, axis: int, rows: Spans | None) -> Tensor | None:
    if mask is None or rows is None:
        return mask
    index = [slice(None)] * mask.dim()
    parts: list[Tensor] = []
    for span in rows:
        index[axis] = slice(span.start, span.start + span.length * span.step, span.step)
        parts.append(mask[tuple(index)])
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)
