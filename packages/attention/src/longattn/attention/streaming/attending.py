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
from longattn.patterncache import Full, Span

if TYPE_CHECKING:
    from longattn.attention.streaming.module import StreamingAttention

_FULL = Full()
_CELLS = 1 << 22
"""Numbers of a mask that are there at a time."""

_ROUND = 64


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
    # Slots in steps, so that a call's shape is an old one most of the time.
    used = min(state.capacity, -(-max(table.used for table in tables) // _ROUND) * _ROUND)
    masks = [log_counts(module, table, table.position - 1, 1, used, q) for table in tables]
    keys, values = _slots(state, rows, used)
    mask = torch.as_tensor(np.stack(masks), device=q.device)
    return attend(q, keys, values, _FULL, softmax_scale=module.softmax_scale, attention_mask=mask)


def attend_before(
    module: StreamingAttention, state: StreamingState, rows: list[int] | None, q: Tensor, k: Tensor, v: Tensor
) -> AttentionState:
    """Attend with the next tokens of each row, which are not taken in yet, to one another and to all that is held."""
    if not q.shape[1] or not q.shape[0]:
        out = q.new_zeros((*q.shape[:3], module.value_head_dim))
        return AttentionState.empty(out)
    tables = state.chosen(rows)
    if state.uniform:
        return _attend_table(module, tables[0], q, k, v, _slots(state, rows, tables[0].used))
    parts: list[AttentionState] = []
    for index, table in enumerate(tables):
        row = slice(index, index + 1)
        slots = _slots(state, [index if rows is None else rows[index]], table.used)
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


def _slots(state: StreamingState, rows: list[int] | None, used: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the first slots, (rows, used, kv_heads, head_dim): views, but of some rows of several a copy."""
    index: Any = (slice(None), slice(None), slice(used))
    if rows is not None and rows != list(range(state.batch_size)):
        index = (slice(rows[0], rows[0] + 1) if len(rows) == 1 else torch.tensor(rows, device=state.device), *index[1:])
    keys, values = (buffer.read(index).transpose(1, 2) for buffer in (state.keys, state.values))
    return keys, values
