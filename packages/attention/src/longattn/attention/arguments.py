"""What a module's call may say about lengths and positions, beside masks: the same names as in `pattern_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from longattn.attention.sequences.varlen import check_positions_start, documents_of, query_spans
from longattn.attention.validate import check_start, refuse_unknown
from longattn.kernels.dispatch.capability import dtype_name
from longattn.patterncache import Full


class CallOptions(TypedDict, total=False):
    """Keywords of a module's `forward`, by the meaning they have in `pattern_attention`; None is as good as absent.

    Attributes:
        q_start: position of the first query. Default: queries are the last positions of the keys.
        positions_start: (batch,) integers: so many first keys of each element are padding on the left.
        cu_seqlens: cumulative lengths of packed documents. cu_seqlens_q: those of the queries, where they are others.
        sink_logits: (heads,), a learned sink per head, with gradient.
    """

    q_start: int | None
    positions_start: Tensor | None
    cu_seqlens: Tensor | Sequence[int] | None
    cu_seqlens_q: Tensor | Sequence[int] | None
    sink_logits: Tensor | None


def given_options(options: CallOptions) -> dict[str, Any]:
    """Those that are not None.

    Raises:
        TypeError: one that there is not.
    """
    refuse_unknown("forward()", {name: None for name in options if name not in CallOptions.__annotations__})
    return {name: value for name, value in options.items() if value is not None}


def refuse_weights(x: Tensor, given: dict[str, Any]) -> None:
    """Raise ValueError where weights are asked of a call that says more of positions than its tensors do."""
    for name in [*given, *(["a jagged nested tensor"] if x.is_nested else [])]:
        raise ValueError(
            f"need_weights must be False where {name} is given: weights are those of whole, plain sequences"
        )


def positions(query: Tensor, key: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Where the rows of query and key (batch, seq, ...) stand: each (seq,), or (batch, seq) with `positions_start`.

    Raises:
        TypeError, ValueError: a bad option, by name.
    """
    nq, nk = query.shape[1], key.shape[1]
    ends = given.get("cu_seqlens")
    if ends is not None:
        keys = documents_of(Full(), ends, nk).cu_seqlens
        found = documents_of(Full(), given.get("cu_seqlens_q", keys), nq, "cu_seqlens_q").cu_seqlens
        spans = query_spans(found, keys), query_spans(keys, keys)
        q, k = (torch.cat([torch.arange(s.start, s.start + s.length) for s in each]) for each in spans)
        return q.to(query.device), k.to(query.device)
    start = check_start("q_start", given.get("q_start"))
    q = torch.arange(nq, device=query.device) + (nk - nq if start is None else start)
    k = torch.arange(nk, device=query.device)
    padded = given.get("positions_start")
    if padded is not None:
        check_positions_start(padded, key)
        # Of what is padding, positions are below zero: nobody sees it.
        q, k = (x - padded.to(x.device).unsqueeze(-1) for x in (q, k))
    return q, k


def hidden_rows(key: Tensor, key_padding_mask: object, given: dict[str, Any]) -> Tensor | None:
    """(batch, keys) bool: rows that nobody sees, whatever they hold; None: none, or a mask that is refused later, by name.

    Raises:
        TypeError: key_padding_mask is a tensor of something else.
    """
    mask = key_padding_mask if isinstance(key_padding_mask, Tensor) else None
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask must be bool, True = padding, got {dtype_name(mask.dtype)}")
    if mask is not None and mask.shape != key.shape[:2]:
        return None
    starts = given.get("positions_start")
    if starts is None:
        return mask
    check_positions_start(starts, key)
    left = torch.arange(key.shape[1], device=key.device) < starts.to(key.device).unsqueeze(-1)
    return left if mask is None else left | mask
