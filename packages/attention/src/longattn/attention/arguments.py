"""What a module's call may say about lengths and positions, beside masks: the same names as in `pattern_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from longattn.attention.schedules.base import Schedule
from longattn.attention.schedules.call_extents import CallExtents
from longattn.attention.schedules.documents import as_data, documents_of, query_spans
from longattn.attention.schedules.extents import row_numbers
from longattn.attention.schedules.layouts import take
from longattn.attention.sequences.left_padding import check_positions_start
from longattn.attention.sequences.varlen import refuse_traced
from longattn.attention.validate import check_start, refuse_unknown
from longattn.kernels import Environment
from longattn.kernels.interface import Layout, ScoreTerms, dtype_name
from longattn.patterncache import Full


class CallOptions(TypedDict, total=False):
    """Keywords of a module's `forward`, by the meaning they have in `pattern_attention`; None is as good as absent.

    Attributes:
        q_start: position of the first query. Default: queries are the last positions of the keys.
        positions_start: (batch,) integers: so many first keys of each element are padding on the left.
        cu_seqlens: cumulative lengths of packed documents. cu_seqlens_q: those of the queries, where they are others.
        sink_logits: (heads,), a learned sink per head, with gradient.
        score_terms: what is done to scaled scores by rule: a Softcap, Alibi or RelativeBias of longattn.kernels, or a tuple of those.
    """

    q_start: int | None
    positions_start: Tensor | None
    cu_seqlens: Tensor | Sequence[int] | None
    cu_seqlens_q: Tensor | Sequence[int] | None
    sink_logits: Tensor | None
    score_terms: ScoreTerms


class HeadedOptions(CallOptions, total=False):
    """And of a module that is given heads.

    Attributes:
        layout: "bnhd" (default), or "bhnd" for query, key, value and output with heads before the sequence, as views.
    """

    layout: Layout


MergeGrad = Literal["exact", "detached"]
"""What the weights are to autograd that merge the branches of a pattern: functions of q and k, or constants."""


class AttentionOptions(HeadedOptions, total=False):
    """The other keywords of `pattern_attention`, by the meaning they have there, but for return_lse."""

    is_causal: bool | None
    softmax_scale: float | Tensor | None
    key_padding_mask: Tensor | None
    attention_mask: Tensor | None
    dropout_p: float
    backend: str | None
    schedule: Schedule | None
    seed: Tensor | int | None
    deterministic: bool | None
    environment: Environment | None
    merge_grad: MergeGrad
    head_start: int | None
    num_heads: int | None


def given_options(options: CallOptions) -> dict[str, Any]:
    """Those that are not None.

    Raises:
        TypeError: one that there is not.
    """
    refuse_unknown("forward()", {name: None for name in options if name not in CallOptions.__annotations__})
    return {name: value for name, value in options.items() if value is not None}


def refuse_weights(x: Tensor, options: dict[str, Any]) -> None:
    """Raise ValueError where weights are asked of a call that says more of positions than its tensors do."""
    for name in [
        *(name for name in options if name != "score_terms"),
        *(["a jagged nested tensor"] if x.is_nested else []),
    ]:
        raise ValueError(
            f"need_weights must be False where {name} is given, got True: weights are those of whole, plain sequences"
        )


def positions(call: CallExtents, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Where the rows of a call's query and key stand: each (rows,), or (batch, rows) with `positions_start`.

    Raises:
        TypeError, ValueError: a bad option, by name.
    """
    cu_seqlens = options.get("cu_seqlens")
    if cu_seqlens is not None and torch.compiler.is_compiling():
        return _packed_positions(call, cu_seqlens, options.get("cu_seqlens_q"))
    if cu_seqlens is not None:
        extents = call.extents()
        cu_k = documents_of(Full(), cu_seqlens, extents.nk).cu_seqlens
        cu_q = documents_of(Full(), options.get("cu_seqlens_q", cu_k), extents.nq, "cu_seqlens_q").cu_seqlens
        spans = take(query_spans(cu_q, cu_k), extents.q_rows), take(query_spans(cu_k, cu_k), extents.k_rows)
        q, k = (row_numbers(each).to(call.device) for each in spans)
        return q, k
    q, k = call.positions(check_start("q_start", options.get("q_start")))
    padding = call.local("positions_start", options.get("positions_start"))
    if padding is not None:
        # Of what is padding, positions are below zero: no query sees it.
        q, k = (x - padding.to(x.device).unsqueeze(-1) for x in (q, k))
    return q, k


def _packed_positions(call: CallExtents, cu_seqlens: object, cu_seqlens_q: object) -> tuple[Tensor, Tensor]:
    """The same where lengths are data: in each document, queries are the last of its keys. The op checks what they say."""
    q, k = call.positions(0)
    if cu_seqlens_q is not None:
        cu_k, cu_q = (as_data(name, x) for name, x in (("cu_seqlens", cu_seqlens), ("cu_seqlens_q", cu_seqlens_q)))
        assert cu_k is not None and cu_q is not None
        document = torch.bucketize(q, cu_q.to(q.device), right=True)
        q = q + (cu_k - cu_q).to(q.device)[document]
    return q, k


def hidden_rows(call: CallExtents, key_padding_mask: object, options: dict[str, Any]) -> Tensor | None:
    """(batch, keys) bool: rows of this process's key that no query sees; None: none, or a mask that is refused later, by name.

    Raises:
        TypeError: key_padding_mask is a tensor of something else.
    """
    mask = call.local("key_padding_mask", key_padding_mask) if isinstance(key_padding_mask, Tensor) else None
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask must be bool, True = padding, got {dtype_name(mask.dtype)}")
    if mask is not None and mask.shape != (call.batch, call.nk):
        return None
    starts = call.local("positions_start", options.get("positions_start"))
    if starts is None:
        return mask
    refuse_traced("positions_start")
    extents = call.extents()
    check_positions_start(starts, call.batch, extents.nk)
    before_start = row_numbers(extents.k_rows).to(call.device) < starts.to(call.device).unsqueeze(-1)
    return before_start if mask is None else before_start | mask
