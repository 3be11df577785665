"""`pattern_attention`: the one forward. Every module and preset of this package ends here."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, Never, Unpack, overload

import torch
from torch import Tensor

from longattn.attention.arguments import AttentionOptions, MergeGrad
from longattn.attention.ragged_calls import attend_ragged, is_ragged
from longattn.attention.schedules.base import Schedule
from longattn.attention.schedules.call_extents import is_sharded
from longattn.attention.schedules.documents import as_data, check_packed, packed_pattern
from longattn.attention.schedules.extents import SINKS, Extents, mask_flags
from longattn.attention.schedules.in_process import WHOLE, attend_in_process, place_of
from longattn.attention.schedules.key_weights import key_weights
from longattn.attention.schedules.local import check_schedule_argument
from longattn.attention.schedules.op import scheduled_attend
from longattn.attention.validate import (
    check_bool,
    check_merge_grad,
    check_pattern_argument,
    check_start,
    global_heads,
    refuse_unknown,
)
from longattn.kernels import AttentionState, Environment
from longattn.kernels.interface import (
    Layout,
    OpTensors,
    Options,
    ScoreTerms,
    add_sink,
    arguments_of,
    as_seed,
    attend_prepared,
    autocast,
    call_signature,
    check_options,
    check_qkv,
    check_sinks,
    exchanged,
    fold_scale,
    in_order,
    last_positions,
    merge_detached,
    prepare_and_run,
    refuse_torchscript,
    run_shards,
    state_dtype,
    tensors_of,
    wants_gradient,
    warn_of_axes,
)
from longattn.patterncache import Pattern


@overload
def pattern_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    return_lse: Literal[False] = False,
    return_key_weights: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...


@overload
def pattern_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    return_lse: Literal[True],
    return_key_weights: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def pattern_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    return_lse: Literal[False] = False,
    return_key_weights: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def pattern_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    return_lse: Literal[True],
    return_key_weights: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor, Tensor]: ...


def pattern_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    is_causal: bool | None = None,
    softmax_scale: float | Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    score_terms: ScoreTerms = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
    schedule: Schedule | None = None,
    q_start: int | None = None,
    seed: Tensor | int | None = None,
    sink_logits: Tensor | None = None,
    deterministic: bool | None = None,
    environment: Environment | None = None,
    positions_start: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    cu_seqlens_q: Tensor | Sequence[int] | None = None,
    merge_grad: MergeGrad = "exact",
    head_start: int | None = None,
    num_heads: int | None = None,
    layout: Layout = "bnhd",
    return_key_weights: bool = False,
    **unknown: Never,
) -> Tensor | tuple[Tensor, ...]:
    """softmax(scale * q k^T + log counts) v, where counts[h, i, j] says how often the pattern lets query i see key j.

    Args:
        q: (batch, Nq, heads, head_dim), float16, bfloat16, float32 or float64.
        k, v: (batch, Nk, kv_heads, head_dim), same dtype and device; kv_heads divides heads. v, and so the output, may have its own
            head_dim, as in multi-head latent attention.
        pattern: who sees whom, such as Dilated((2048, 4096), (1, 2)).
        is_causal: replaces the pattern's causal field. Default None takes it.
        softmax_scale: a number, or floating () or (heads,) with gradient, such as a learned temperature: q is multiplied by it, which in half
            precision is one more rounding. Default head_dim ** -0.5.
        key_padding_mask: (batch, Nk) bool, True = padding, as in torch.nn.MultiheadAttention. Hides; never shifts positions.
        attention_mask: bool, True = may see, or floating, added to the scaled scores, with gradient; broadcastable to
            (batch, heads, Nq, Nk).
        score_terms: a longattn.kernels.Softcap, Alibi or RelativeBias, or a tuple of those: what is done to scaled scores by rule, by the
            positions of query and key, with gradient of slopes and tables. On each rank, as of sink_logits, that of its own rows.
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
        positions_start: (batch,) integers: so many first keys of each element are padding on the left, and positions begin after them.
            Queries before that are padding too, but where q_start places them and positions do not matter (cross attention).
        cu_seqlens: cumulative lengths from 0 of documents packed as (1, total, heads, head_dim); positions restart in each, and none
            sees another.
        cu_seqlens_q: those of the queries, where they are others: in each document the last of its keys. Default cu_seqlens.
        merge_grad: "exact" (default): the gradient of what is computed. "detached": torchscale's, in which the weights that merge the
            branches of a dilated pattern are constants; out and lse are the same. Not with sink_logits, which has no other gradient.
        head_start: q holds heads head_start, head_start + 1, ... of `num_heads`, as a tensor-parallel rank does: patterns and dropout
            that depend on the head see those numbers. k and v hold the key heads of these heads alone. Default: q holds all.
        num_heads: query heads of the whole module; must be given with head_start.
        layout: "bnhd" (default): tensors are as above. "bhnd": q, k, v and what is returned have heads before the sequence, (batch, heads, Nq,
            head_dim) and lse (batch, heads, Nq); they are views, and nothing is copied for it. Masks are as they are.
        return_key_weights: also return how much weight each key received, for eviction policies such as H2O (Zhang et al. 2023,
            arXiv:2306.14048): the undropped weights summed over queries, and over the query heads of a kv head. Costs about a backward pass,
            and memory for gradients of q and k, never for Nq * Nk weights. Not differentiable. Default False.

    What padded keys hold reaches nothing, NaN and Inf included. Keys hidden by the pattern, causality or attention_mask weigh 0 but may be
    read, so they must be finite.

    q, k and v may be jagged nested tensors (batch, lengths, heads, head_dim), or DTensors sharded on the sequence, on the heads (whose
    numbers are then known), or both; then so are out and lse. In a compiled or exported graph cu_seqlens is data. Under a schedule over a process group they are this rank's rows, and masks have its rows and the whole sequence's columns; q_start,
    positions_start and cu_seqlens speak of the whole sequence, the same on every rank.

    Returns:
        (batch, Nq, heads, v's head_dim) in q's dtype, zero where a query sees nothing; with return_lse also lse (batch, Nq, heads) in
        float32 (float64 for float64): natural log, -inf = saw no key; with return_key_weights, last, (batch, kv_heads, Nk) in lse's dtype, of
        this rank's keys and all ranks' queries.

    Raises:
        TypeError, ValueError: a bad argument, by name; or no row fits, with each one's reasons.
    """
    refuse_unknown("pattern_attention()", unknown)
    if layout != "bnhd":
        q, k, v = in_order(layout, q, k, v)
    if isinstance(softmax_scale, Tensor) and not (is_sharded(q) or getattr(q, "is_nested", False)):
        q, softmax_scale = fold_scale(q, softmax_scale)
    options = Options(
        attention_mask,
        key_padding_mask,
        score_terms,
        environment,
        deterministic,
        is_causal,
        softmax_scale,  # type: ignore[arg-type]
        dropout_p,
        backend,
        None,
        q_start,
        head_start,
        num_heads,
    )
    key = None
    if (
        positions_start is None
        and cu_seqlens is None
        and cu_seqlens_q is None
        and sink_logits is None
        and merge_grad == "exact"
        and (return_lse is True or return_lse is False)
        and return_key_weights is False
        and (place := place_of(schedule)) is not None
    ):
        key = call_signature(place, q, k, v, pattern, options)
        computed = None
        if key is not None and place == WHOLE:
            computed = attend_prepared(key, q, k, v, pattern, options, seed if dropout_p else None)
        elif key is not None:
            computed = run_shards(key, OpTensors(q, k, v), environment)
        if computed is not None:
            return _in_layout(computed[0], computed[1], None, layout, return_lse)
    refuse_torchscript()
    if is_ragged(q, k, v, positions_start):
        others: dict[str, Any] = options._asdict()
        del others["out_dtype"]
        others |= {"schedule": schedule, "seed": seed, "sink_logits": sink_logits, "pattern": pattern}
        others |= {"cu_seqlens": cu_seqlens, "cu_seqlens_q": cu_seqlens_q, "merge_grad": merge_grad}
        whole = functools.partial(pattern_attention, return_lse=True)
        out, lse = attend_ragged(whole, q, k, v, positions_start, others, return_key_weights)
        return _in_layout(out, lse, None, layout, check_bool("return_lse", return_lse))
    schedule = check_schedule_argument(schedule)
    check_pattern_argument(pattern)
    if is_causal is not None and check_bool("is_causal", is_causal) != pattern.causal:
        pattern = pattern.with_causal(is_causal)
    q, k, v = autocast(q, k, v)
    check_qkv(q, k, v)
    warn_of_axes("q", q, layout)
    start = check_start("q_start", q_start)
    q_spans = [] if start is None else [start, q.shape[1], 1]
    check_bool("return_lse", return_lse)
    check_bool("return_key_weights", return_key_weights)
    check_options(q, k, options, masked_k=_masked_keys(attention_mask, k, schedule))
    check_sinks(sink_logits, q)
    heads = global_heads(q.shape[2], head_start, num_heads)
    check_merge_grad(merge_grad, pattern, sink_logits)
    drawn = as_seed(seed) if dropout_p else None
    nq, nk = q.shape[1], k.shape[1]
    # Exchanged once a call: lengths of the whole sequence, and one seed, so that all shards and steps drop the same pairs.
    flags = mask_flags(key_padding_mask, attention_mask, nq) | (0 if sink_logits is None else SINKS)
    metadata = schedule.exchange_metadata(nq, nk, flags, drawn)
    ends: dict[str, Tensor | None] = {}
    if cu_seqlens is not None or cu_seqlens_q is not None:
        check_packed(q, k, start, cu_seqlens)
        if torch.compiler.is_compiling():
            ends = {"cu_seqlens": as_data("cu_seqlens", cu_seqlens)}
            ends["cu_seqlens_q"] = as_data("cu_seqlens_q", cu_seqlens_q)
        else:
            # Of a schedule in one process, all rows are here.
            extents = schedule.extents(nq, nk, metadata) if schedule.distributed else Extents.of_whole(nq, nk)
            pattern, q_spans = packed_pattern(pattern, cu_seqlens, cu_seqlens_q, extents)
    k_spans: list[int] = []
    if not schedule.distributed:
        _check_positions(q, k, pattern, q_spans)
        # Said, because AOTInductor's packages cannot hand an empty list to an op. On one rank the whole is not known here.
        q_spans, k_spans = q_spans or last_positions(nq, nk, pattern.positional), [0, nk, 1]
    tensors, out_dtype = tensors_of(q, k, v, options, drawn), q.dtype if sink_logits is None else state_dtype(q.dtype)
    if key is not None and (schedule.whole or not wants_gradient(tensors)):
        arguments = arguments_of(pattern, options, q_spans, k_spans, heads, out_dtype)
        if schedule.whole:
            computed = prepare_and_run(key, tensors, arguments, environment)
        else:
            computed = attend_in_process(key, schedule, tensors, arguments, environment)
        return _in_layout(computed[0], computed[1], None, layout, return_lse)
    tensors = tensors._replace(metadata=metadata, **ends)
    arguments = arguments_of(pattern, options, q_spans, k_spans, heads, out_dtype, schedule.canonical())
    if merge_grad == "exact":
        state = AttentionState(*scheduled_attend(tensors, arguments))
    else:
        # Each branch is a state of its own, whose gradient does not depend on the others; seed and lengths are the call's.
        parts = [
            arguments._replace(pattern=part.canonical(), out_dtype=state_dtype(q.dtype)) for part in pattern.addends
        ]
        state = merge_detached([AttentionState(*scheduled_attend(tensors, part)) for part in parts])
    if sink_logits is not None:
        state = add_sink(state, sink_logits)
    received = key_weights(tensors, arguments, state.lse) if return_key_weights else None
    return _in_layout(state.finalize(q.dtype), state.lse, received, layout, return_lse)


def _in_layout(
    out: Tensor, lse: Tensor, received: Tensor | None, layout: Layout, return_lse: bool
) -> Tensor | tuple[Tensor, ...]:
    """What the call returns, in the caller's layout."""
    if layout != "bnhd":
        out, lse = exchanged(out), exchanged(lse)
    results = (out, *((lse,) if return_lse else ()), *(() if received is None else (received,)))
    return results if len(results) > 1 else out


def _masked_keys(mask: object, k: Tensor, schedule: Schedule) -> Tensor:
    """Keys that the mask has columns for: those of the whole sequence, as many as it says."""
    if schedule.distributed and isinstance(mask, Tensor) and mask.dim():
        return k.new_empty(()).expand(k.shape[0], mask.shape[-1], *k.shape[2:])
    return k


def _check_positions(q: Tensor, k: Tensor, pattern: Pattern, q_spans: list[int]) -> None:
    """Positions of queries are known, where all of the sequence is here to see it."""
    if not q_spans and q.shape[1] > k.shape[1] and pattern.positional:
        raise ValueError(
            f"q_start must be given where queries outnumber keys and positions matter, got Nq={q.shape[1]}, Nk={k.shape[1]}"
        )
