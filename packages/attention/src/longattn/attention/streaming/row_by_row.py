"""Calls of a stream whose bits depend on the row's own stream alone: each query of each kv head is one product of one shape.

The keys that a query sees are put in the order of their positions, so neither other rows of the batch, nor where a call began, nor which slots
keys lie in can change a sum's order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from longattn.attention.streaming.stream_state import StreamingState
from longattn.kernels import AttentionState
from longattn.kernels.interface import state_dtype

if TYPE_CHECKING:
    from longattn.attention.streaming.module import StreamingAttention


def attend_row_by_row(
    module: StreamingAttention, state: StreamingState, rows: list[int] | None, q: Tensor, k: Tensor, v: Tensor
) -> AttentionState:
    """Attend with the next tokens of each row, which are not taken in yet: `attend_before`, with bits that do not depend on the batch."""
    dtype = state_dtype(q.dtype)
    out = torch.zeros((*q.shape[:3], module.value_head_dim), dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)
    group = module.num_heads // module.kv_heads
    for index in range(q.shape[0]):
        row = index if rows is None else rows[index]
        table = state.tables[0 if state.uniform else row]
        for head in range(module.kv_heads):
            slots = (table.slots[head] >= 0).nonzero()[0]
            slots = slots[table.slots[head, slots].argsort()]
            held = table.slots[head, slots]
            chosen = torch.as_tensor(
                state.page_table.slots([row], np.full_like(slots, head), slots)[0], device=q.device
            )
            keys = torch.cat((state.pool.keys.read(chosen), k[index, :, head]))
            values = torch.cat((state.pool.values.read(chosen), v[index, :, head]))
            positions = np.concatenate((held, table.position + np.arange(k.shape[1])))
            heads = slice(head * group, (head + 1) * group)
            numbers = np.arange(heads.start, heads.stop)[:, None]
            for token in range(q.shape[1]):
                counts = module.pattern.count(
                    numbers, np.full((1, 1), table.position + token), positions[None], module.num_heads
                )
                seen = np.flatnonzero(counts.max(axis=0))
                if not len(seen):
                    continue
                with np.errstate(divide="ignore"):
                    bias = torch.as_tensor(np.log(counts[:, seen]), device=q.device, dtype=dtype)
                at = torch.as_tensor(seen, device=q.device)
                query = q[index, token, heads].to(dtype, copy=True)
                scores = query @ keys[at].to(dtype).t().contiguous() * module.softmax_scale + bias
                total = torch.logsumexp(scores, -1)
                weights = torch.where(total[:, None] == -torch.inf, 0.0, (scores - total[:, None]).exp())
                out[index, token, heads] = weights @ values[at].to(dtype)
                lse[index, token, heads] = total
    return AttentionState(out, lse)
