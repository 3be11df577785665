"""Sequences of different lengths: jagged nested tensors, or padded on the left (`positions_start`).

Each becomes a plain call: a jagged tensor is packed, with its offsets as cu_seqlens, and batch elements whose padding is equally long are
one call without it. Padding is read on the host, so traced code cannot do that in one graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from longattn.attention.schedules.base import Schedule
from longattn.attention.schedules.local import check_schedule_argument
from longattn.attention.sequences.left_padding import attend_in_place, check_positions_start, in_order
from longattn.patterncache.spans import shortened

Attention = Callable[..., tuple[Tensor, Tensor]]
"""(q, k, v, **options) to (out, lse)."""


def refuse_traced(name: str) -> None:
    """Raise NotImplementedError in traced code, which then breaks the graph there, or under fullgraph says this."""
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{name} cannot be traced: lengths are read on the host, so a graph ends before this call"
        )


def ragged_attention(
    attention: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions_start: Tensor | None,
    options: dict[str, Any],
    crossing: bool = False,
) -> tuple[Tensor, Tensor]:
    """`attention` where lengths differ by element: jagged, or padded on the left. `crossing` is that of `aligned_attention`."""
    if q.is_nested:
        refuse_jagged_shards("q", options.get("schedule"))
        return jagged_attention(attention, q, k, v, positions_start=positions_start, **options)
    if options.pop("cu_seqlens") is not None or options.pop("cu_seqlens_q") is not None:
        raise ValueError(
            "positions_start must be None where cu_seqlens is given, got both: packed documents have no padding"
        )
    assert positions_start is not None
    return aligned_attention(attention, q, k, v, positions_start, crossing=crossing, **options)


def refuse_jagged_shards(name: str, schedule: Any) -> None:
    """Raise ValueError where a jagged tensor would be one rank's part of a longer sequence: its offsets say nothing of the whole."""
    if isinstance(schedule, Schedule) and schedule.distributed:
        raise ValueError(
            f"{name} must be this rank's rows as (1, rows, ...) under a schedule over a process group, with cu_seqlens of the whole sequence, "
            f"got a nested tensor"
        )


def jagged_attention(attention: Attention, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`attention` on jagged nested tensors (batch, lengths, heads, head_dim): packed, and out and lse jagged like q.

    Raises:
        TypeError: one of the three is not nested, or not jagged.
        ValueError: an option that has no meaning here.
    """
    packed, ends = pack_jagged({"q": q, "k": k, "v": v}, options)
    out, lse = attention(*packed, **options, **ends)
    return jagged_like(q, out), jagged_like(q, lse)


def pack_jagged(tensors: dict[str, Tensor], options: dict[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """(queries, keys and values as (1, total, ...), cu_seqlens and where they differ cu_seqlens_q) of jagged ones, by name, in that order.

    Takes the options that have no meaning here out of `options`, where they are None. Raises as `jagged_attention` does.
    """
    for name, x in tensors.items():
        if not x.is_nested or x.layout is not torch.jagged:
            raise TypeError(
                f"{name} must be a jagged nested tensor like the others, got {x.layout} of {type(x).__name__}"
            )
    for name in ("attention_mask", "key_padding_mask", "q_start", "positions_start", "cu_seqlens", "cu_seqlens_q"):
        value = options.pop(name, None)
        if value is not None:
            raise ValueError(
                f"{name} must be None for jagged nested tensors, which hold no padding and know their lengths, got {shortened(value)}"
            )
    q, k, *_ = tensors.values()
    offsets, key_offsets = (cast(Any, x).offsets() for x in (q, k))
    ends = {"cu_seqlens": key_offsets}
    if offsets is not key_offsets:
        ends["cu_seqlens_q"] = offsets
    return [x.values().unsqueeze(0) for x in tensors.values()], ends


def jagged_like(q: Any, packed: Tensor) -> Tensor:
    """(1, total, ...) as a jagged nested tensor with the lengths of q."""
    limits = {"min_seqlen": q._get_min_seqlen(), "max_seqlen": q._get_max_seqlen()}
    return torch.nested.nested_tensor_from_jagged(packed.squeeze(0), q.offsets(), **limits)


def aligned_attention(
    attention: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions_start: Tensor,
    *,
    crossing: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`attention` where element b's first `positions_start[b]` keys are padding and positions begin after them.

    Elements with equally much padding are one call on what they have without it. Padded queries see nothing: zero, lse -inf (with a
    sink: its logit); with `crossing` no query is padded: they stand beside the keys, as in cross attention, and positions mean nothing.
    Raises TypeError or ValueError unless positions_start is (batch,) integers within the keys.
    """
    refuse_traced("positions_start")
    schedule = check_schedule_argument(options.get("schedule"))
    if schedule.distributed or options.get("dropout_p"):
        return attend_in_place(attention, q, k, v, positions_start, schedule, options, crossing)
    starts = check_positions_start(positions_start, k.shape[0], k.shape[1])
    batch, nq, nk = q.shape[0], q.shape[1], k.shape[1]
    q_start = options.pop("q_start", None)
    q_row = nk - nq if q_start is None else int(q_start)
    if q_row < 0:
        raise ValueError(
            f"q_start must be given where queries outnumber keys and positions matter, got Nq={nq}, Nk={nk}"
        )
    mask, padding = options.pop("attention_mask", None), options.pop("key_padding_mask", None)
    mask = None if mask is None else mask.expand(*mask.shape[:-2], nq, nk) if mask.dim() > 1 else mask.expand(nq, nk)
    outs: list[tuple[Tensor, Tensor]] = []
    order: list[int] = []
    for start in sorted(set(starts)):
        members = [b for b in range(batch) if starts[b] == start]
        group = slice(None) if len(members) == batch else torch.tensor(members, device=q.device)
        hidden = 0 if crossing else min(nq, max(0, start - q_row))
        group_options = {"q_start": max(0, q_row - start)}
        if mask is not None:
            per_element = mask[group] if mask.dim() == 4 and mask.shape[0] > 1 else mask
            group_options["attention_mask"] = per_element[..., hidden:, start:]
        if padding is not None:
            group_options["key_padding_mask"] = padding[group][:, start:]
        out, lse = attention(
            q[group][:, hidden:], k[group][:, start:], v[group][:, start:], **(options | group_options)
        )
        outs.append(
            (_prepend_rows(out, hidden, 0.0), _prepend_rows(lse, hidden, -torch.inf, options.get("sink_logits")))
        )
        order += members
    return in_order([pair[0] for pair in outs], order), in_order([pair[1] for pair in outs], order)


def _prepend_rows(x: Tensor, rows: int, value: float, each: Tensor | None = None) -> Tensor:
    """x below so many rows of a value; or of one for each head, as a learned sink has it."""
    if not rows:
        return x
    shape = (x.shape[0], rows, *x.shape[2:])
    return torch.cat((x.new_full(shape, value) if each is None else each.to(x.dtype).expand(shape), x), 1)
