"""Attention weights for those who want to look at them: dense, O(Nq * Nk) memory, or sparse, O(pairs seen)."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from longattn.attention.schedules.call_extents import CallExtents, dtensor_module
from longattn.attention.schedules.extents import Extents, row_numbers
from longattn.attention.schedules.layouts import Spans, take
from longattn.attention.validate import check_pattern_argument, global_heads
from longattn.kernels.interface import (
    Layout,
    ScoreTerm,
    ScoreTerms,
    check_attention_mask,
    check_broadcastable,
    check_key_padding,
    check_qkv,
    check_scale,
    check_terms,
    fold_scale,
    in_order,
    pair_weights,
)
from longattn.patterncache import Pattern, Rectangle, Span


def attention_weights(
    q: Tensor,
    k: Tensor,
    pattern: Pattern,
    softmax_scale: float | Tensor | None = None,
    attention_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    *,
    head_start: int | None = None,
    num_heads: int | None = None,
    layout: Layout = "bnhd",
    score_terms: ScoreTerms = None,
    distance: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T + log counts), differentiable, dense.

    Args:
        q: (batch, Nq, heads, head_dim); the last Nq positions. k: (batch, Nk, kv_heads, head_dim).
        pattern: who sees whom; a key that counts twice has the weight of both.
        softmax_scale: a number, or a tensor () or (heads,). Default head_dim ** -0.5.
        attention_mask: bool, True = may see, or floating, added to the scaled scores; broadcastable to (batch, heads, Nq, Nk).
        key_padding_mask: (batch, Nk) bool, True = padding.
        head_start, num_heads: which heads of how many q has, as in `pattern_attention`. Default: all.
        layout: "bnhd" (default), or "bhnd" for q and k with heads before the sequence. Weights are the same.
        score_terms: as in `pattern_attention`. distance: (Nq, Nk) integers, position of the key minus that of the query, for terms that
            read it. Default: keys stand at 0 .. Nk.

    Returns:
        (batch, heads, Nq, Nk) in q's dtype; rows sum to one, or to zero where a query sees nothing.

    Raises:
        TypeError, ValueError: an argument is not such a value, by name.
    """
    q, k = in_order(layout, q, k)
    softmax_scale = _checked_scale(q, k, pattern, softmax_scale, attention_mask, key_padding_mask)
    rows = Extents.of_whole(q.shape[1], k.shape[1]).query_spans()
    heads = global_heads(q.shape[2], head_start, num_heads)
    terms = check_terms(score_terms, q)
    if distance is not None:
        check_broadcastable("distance", distance, (q.shape[1], k.shape[1]))
    return _weights(q, k, pattern, rows, heads, softmax_scale, attention_mask, key_padding_mask, terms, distance)[0]


def _checked_scale(
    q: Tensor, k: Tensor, pattern: object, scale: object, mask: object, padding: object
) -> float | Tensor | None:
    """The scale; raises where an argument is not such a value."""
    check_qkv(q, k, k)
    check_pattern_argument(pattern)
    check_attention_mask(mask, q, k)
    check_key_padding(padding, q, k)
    if isinstance(scale, Tensor):
        fold_scale(q, scale)
        return scale
    return check_scale(scale)


def weights_of(
    call: CallExtents,
    q: Tensor,
    k: Tensor,
    pattern: Pattern,
    softmax_scale: float | Tensor | None,
    masks: dict[str, Tensor | None],
    sparse: bool,
    heads: tuple[int | None, int | None],
    score_terms: ScoreTerms = None,
) -> Tensor:
    """The weights of a module's call: this process's rows of queries, and all keys of the whole sequence as columns.

    Keys of other ranks are gathered, and their gradients return to them. Of DTensors, a DTensor with its rows sharded as theirs.

    Raises:
        ValueError: sparse weights of DTensors.
    """
    like = call.like
    if like is not None and sparse:
        raise ValueError("sparse_weights must be False for DTensors, which hold nothing sparse, got True")
    if like is not None:
        heads = dtensor_module().heads_here(q, k, *heads)
        q, k = (getattr(x, "to_local")() for x in (q, k))  # noqa: B009
        masks = {name: call.local(name, x) for name, x in masks.items()}
    padding = masks["key_padding_mask"]
    extents = call.extents()
    if call.schedule.distributed:
        gather = partial(call.schedule.gather_keys, nq=call.nq, nk=call.nk, metadata=call.metadata)
        k, padding = gather(k), None if padding is None else gather(padding)
    numbers = global_heads(q.shape[2], *heads)
    weigh = _sparse_weights if sparse else _dense_weights
    terms = check_terms(call.local("score_terms", score_terms), q)
    masks_here = (masks["attention_mask"], padding)
    weights = weigh(q, k, pattern, extents.query_spans(), numbers, softmax_scale, *masks_here, terms)
    return weights if like is None else _placed(weights, like, (like.shape[0], like.shape[2], extents.nq, extents.nk))


def _dense_weights(*arguments: Any) -> Tensor:
    return _weights(*arguments)[0]


def _placed(weights: Tensor, like: Any, shape: tuple[int, ...]) -> Tensor:
    """(batch, heads, Nq, Nk) of a rank as a DTensor: axes 1 and 2 of q are axes 2 and 1 here."""
    sharded = dtensor_module()
    return sharded.placed_like(weights, like, shape, sharded.moved(like.placements, {1: 2, 2: 1}))


_CELLS = 1 << 21
"""Weights that stand densely at a time while sparse ones are made: 8 MiB in float32."""


def sparse_attention_weights(
    q: Tensor,
    k: Tensor,
    pattern: Pattern,
    softmax_scale: float | Tensor | None = None,
    attention_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    *,
    head_start: int | None = None,
    num_heads: int | None = None,
    layout: Layout = "bnhd",
    score_terms: ScoreTerms = None,
) -> Tensor:
    """`attention_weights` as a coalesced sparse COO tensor of the same shape: an entry per pair that is seen.

    Strips of queries are made densely, one after the other, and only what is seen is kept. Arguments and errors as there.
    """
    q, k = in_order(layout, q, k)
    softmax_scale = _checked_scale(q, k, pattern, softmax_scale, attention_mask, key_padding_mask)
    rows = Extents.of_whole(q.shape[1], k.shape[1]).query_spans()
    heads = global_heads(q.shape[2], head_start, num_heads)
    terms = check_terms(score_terms, q)
    return _sparse_weights(q, k, pattern, rows, heads, softmax_scale, attention_mask, key_padding_mask, terms)


def _sparse_weights(
    q: Tensor,
    k: Tensor,
    pattern: Pattern,
    positions: Spans,
    numbers: list[int],
    softmax_scale: float | Tensor | None,
    attention_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    terms: tuple[ScoreTerm, ...],
) -> Tensor:
    (batch, nq, heads, _), nk = q.shape, k.shape[1]
    strip = max(1, _CELLS // max(1, batch * heads * nk))
    wide = None if attention_mask is None else attention_mask.expand(batch, heads, nq, nk)
    indices: list[Tensor] = []
    values: list[Tensor] = []
    for begin in range(0, nq, strip):
        q_strip = q[:, begin : begin + strip]
        mask = None if wide is None else wide[:, :, begin : begin + strip]
        rows = take(positions, (Span(begin, q_strip.shape[1]),))
        weights, counts = _weights(q_strip, k, pattern, rows, numbers, softmax_scale, mask, key_padding_mask, terms)
        at = counts.expand(weights.shape).nonzero().unbind(1)
        values.append(weights[at])
        indices.append(torch.stack((at[0], at[1], at[2] + begin, at[3])))
    size = (batch, heads, nq, nk)
    at = torch.cat(indices, 1) if indices else torch.zeros(4, 0, dtype=torch.int64, device=q.device)
    pair_weights = torch.cat(values) if values else q.new_zeros(0)
    with torch.sparse.check_sparse_tensor_invariants(True):
        return cast(Any, torch).sparse_coo_tensor(at, pair_weights, size, device=q.device).coalesce()


def _weights(
    q: Tensor,
    k: Tensor,
    pattern: Pattern,
    rows: Spans,
    numbers: list[int],
    softmax_scale: float | Tensor | None,
    attention_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    terms: tuple[ScoreTerm, ...],
    distance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(weights of the queries at positions `rows` of heads `numbers`, as in `global_heads`, how often each pair is seen, broadcastable to them)."""
    nk, heads = k.shape[1], q.shape[2]
    total, first, _ = numbers
    counts: Any = pattern.counts(Rectangle(total, rows, Span(0, nk), Span(first, heads)))
    bias = attention_mask
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        counts, bias = torch.as_tensor(counts, device="cpu").to(q.device) * attention_mask, None
    if distance is None and terms:
        distance = torch.arange(nk, device="cpu") - row_numbers(rows)[:, None]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    weights, _, counts = pair_weights(q, k, counts, softmax_scale, dtype, bias, key_padding_mask, terms, distance)
    return weights.to(q.dtype), counts
