"""How calls of a stream attend: one token to all that is held, itself included; several to the call by its plan, and to what was held."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longattn.attention.streaming.held_keys import HeldKeys
from longattn.attention.streaming.stream_state import StreamingState
from longattn.kernels import AttentionState, attend, merge
from longattn.kernels.interface import paged_attention
from longattn.patterncache import Full, Span

if TYPE_CHECKING:
    from longattn.attention.streaming.module import StreamingAttention

_FULL = Full()
_CELLS = 1 << 22
"""Numbers of a mask that are there at a time."""

_WORTH_SHARING = 256
"""Slots that all rows share from which they are read once for all."""


def log_counts(
    module: StreamingAttention, table: HeldKeys, start: int, count: int, used: int, q: Tensor
) -> npt.NDArray[np.floating[Any]]:
    """(heads, count, used): log of how often the queries from `start` on see what is in each slot; -inf: not at all, or nothing is there."""
    slots = table.slots[:, :used].repeat(module.num_heads // module.kv_heads, axis=0)[:, None, :]
    heads = np.arange(module.num_heads)[:, None, None]
    rows = (start + np.arange(count))[None, :, None]
    counts = module.pattern.count(heads, rows, np.maximum(slots, 0), module.num_heads)
    counts = np.where(slots >= 0, counts, 0)
    with np.errstate(divide="ignore"):
        return np.log(counts, dtype=np.float64 if q.dtype == torch.float64 else np.float32)


def attend_appended(
    module: StreamingAttention, state: StreamingState, rows: list[int] | None, q: Tensor
) -> AttentionState:
    """Attend with the query of the token that each row has just taken in, q (rows, 1, heads, head_dim), to all that is held."""
    tables = state.chosen(rows)
    used = max(table.used for table in tables)
    masks = [log_counts(module, table, table.position - 1, 1, used, q) for table in tables]
    return _attend_pages(module, state, rows, q, torch.as_tensor(np.stack(masks), device=q.device))


def _attend_pages(
    module: StreamingAttention, state: StreamingState, rows: list[int] | None, q: Tensor, mask: Tensor
) -> AttentionState:
    """Attend with q (rows, n, heads, head_dim) to the first slots of each row as they lie; mask (rows or 1, heads, n, used), log counts.

    Pages that all rows share, those of a prompt that was forked, are read once for the queries of all rows; what is behind them is
    merged with that.
    """
    batch, n, heads, _ = q.shape
    kv_heads, used = module.kv_heads, mask.shape[3]
    group = heads // kv_heads * n
    queries = q.transpose(1, 2).reshape(batch, kv_heads, group, -1)
    added = mask.reshape(len(mask), kv_heads, group, used)
    numbers = list(state.rows_of(rows))
    pages = torch.as_tensor(state.page_table.pages[numbers], device=q.device)
    cache, scale = state.pool.cache(), module.softmax_scale
    shared = state.page_table.shared_pages(numbers) * state.pool.page_size if batch > 1 else 0
    if shared < _WORTH_SHARING:
        whole = paged_attention(queries, cache, pages, used, scale, added)
    else:
        shared = min(shared, used)
        together = queries.transpose(0, 1).reshape(1, kv_heads, batch * group, -1)
        of_all = added[..., :shared].expand(batch, -1, -1, -1).transpose(0, 1).reshape(1, kv_heads, batch * group, -1)
        wide = of_all.dtype
        prefix = paged_attention(together, cache, pages[:1], shared, scale, of_all, wide)
        out = prefix.out.reshape(kv_heads, batch, group, -1).transpose(0, 1)
        first = AttentionState(out, prefix.lse.reshape(kv_heads, batch, group).transpose(0, 1))
        tail = pages[..., shared // state.pool.page_size :]
        behind = paged_attention(queries, cache, tail, used - shared, scale, added[..., shared:], wide)
        whole = merge(first, behind)
    out = whole.out.reshape(batch, heads, n, -1).transpose(1, 2)
    return AttentionState(out, whole.lse.reshape(batch, heads, n).transpose(1, 2))


def attend_before(
    module: StreamingAttention, state: StreamingState, rows: list[int] | None, q: Tensor, k: Tensor, v: Tensor
) -> AttentionState:
    """Attend with the next tokens of each row, which are not taken in yet, to one another and to all that is held."""
    if not q.shape[1] or not q.shape[0]:
        out = q.new_zeros((*q.shape[:3], module.value_head_dim))
        return AttentionState.empty(out)
    tables = state.chosen(rows)
    if state.uniform:
        return _attend_table(module, tables[0], q, k, v, state.read(rows, tables[0].used))
    parts: list[AttentionState] = []
    for index, table in enumerate(tables):
        row = slice(index, index + 1)
        slots = state.read([index if rows is None else rows[index]], table.used)
        parts.append(_attend_table(module, table, q[row], k[row], v[row], slots))
    return AttentionState(torch.cat([part.out for part in parts]), torch.cat([part.lse for part in parts]))


def _attend_table(
    module: StreamingAttention, table: HeldKeys, q: Tensor, k: Tensor, v: Tensor, slots: tuple[Tensor, Tensor]
) -> AttentionState:
    """The same for rows that stand at one position, with the keys and values of their slots in use."""
    start, n, scale = table.position, q.shape[1], module.softmax_scale
    span = Span(start, n)
    among_themselves = attend(q, k, v, module.pattern, q_spans=span, k_spans=span, softmax_scale=scale)
    used = slots[0].shape[1]
    if not used:
        return among_themselves
    strip = max(1, _CELLS // (module.num_heads * used))
    parts: list[AttentionState] = []
    for first in range(0, n, strip):
        queries = q[:, first : first + strip]
        mask = torch.as_tensor(log_counts(module, table, start + first, queries.shape[1], used, q), device=q.device)
        parts.append(attend(queries, *slots, _FULL, softmax_scale=scale, attention_mask=mask))
    earlier = AttentionState(torch.cat([p.out for p in parts], 1), torch.cat([p.lse for p in parts], 1))
    return merge(among_themselves, earlier)
