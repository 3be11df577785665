"""A decoder step through the Triton row: one query for each head over the first slots of a cache, split over programs by keys.

Rows of the cache are the batch, the query heads of a row share its keys, and every key is seen, so that the plan is that of `Full`. Its
tables follow from the number of slots in use alone; a cache that is full has the same step each time, which is bound once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from longattn.kernels.dispatch.call import Call
from longattn.kernels.dispatch.capability import Capability
from longattn.kernels.dispatch.environment import TorchAllocator
from longattn.kernels.problem import AttentionProblem, architecture_of
from longattn.kernels.triton import row
from longattn.patterncache import Full, Plan, Rectangle, Span

CAPABILITY = Capability(
    devices=row.CAPABILITY.devices,
    dtypes=row.CAPABILITY.dtypes,
    tolerance=row.CAPABILITY.tolerance,
    max_head_dim=row.CAPABILITY.max_head_dim,
    architectures=row.CAPABILITY.architectures,
    softcap=True,
    by_distance=True,
    decode=True,
    bias=False,
    backward=False,
)

_ALLOCATOR = TorchAllocator()


@lru_cache(maxsize=1024)
def _plan(group: int, held: int) -> Plan:
    return Full().plan(Rectangle(group, Span(held - 1, 1), Span(0, held)))


class TritonCache:
    """Keys and values of a cache that the row can serve: (rows, slots, head_dim), each with its own head_dim."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        # (batch, seq, kv_heads, head_dim)
        self._keys, self._values = keys.unsqueeze(2), values.unsqueeze(2)
        self._bound: tuple[int, int, float, Any] | None = None

    @staticmethod
    def serves(keys: Tensor, values: Tensor) -> bool:
        """Whether the row has steps over such a cache: what it declares, triton is here, and the kernel was right on this device."""
        architecture = architecture_of(keys.device) if keys.is_cuda else ""
        problem = AttentionProblem(
            keys.device.type, keys.dtype, 1, 1, keys.shape[-1], decode=True, architecture=architecture, value_head_dim=values.shape[-1]
        )  # fmt: skip
        if row.refusal() is not None or CAPABILITY.reasons(problem):
            return False
        return not row.standing(problem, True).startswith("failed")

    def attend(
        self,
        q: Tensor,
        held: int,
        scale: float,
        *,
        hidden: Tensor | None = None,
        first: tuple[Tensor, int] | None = None,
        sink_logits: Tensor | None = None,
        softcap: float = 0.0,
        added: Tensor | None = None,
    ) -> Tensor:
        """(rows, 1, group, head_dim of values) in q's dtype; see `decode_attention`."""
        rows, _, _, dim = self._keys.shape
        queries = q.reshape(rows, 1, -1, dim)
        group = queries.shape[2]
        if self._bound is not None and self._bound[:3] == (held, group, scale):
            beside = (hidden, first, sink_logits, added)
            if all(x is None for x in beside) and not softcap:
                computed = self._bound[3](queries, self._keys, self._values, None, _ALLOCATOR)
                if computed is not None:
                    return computed[0]
        prior = None if sink_logits is None else self._sinks(sink_logits, queries)
        parts = [(queries, 0, held)]
        if first is not None:
            parts = [(first[0].reshape(queries.shape), 0, first[1]), (queries, first[1], held)]
        call, state = None, prior
        for part_queries, begin, end in parts:
            if begin == end:
                continue
            mask = None if hidden is None else ~hidden.expand(rows, 1, held)[:, None, :, begin:end]
            bias = None if added is None else added[:, :, None, begin:end]
            call = Call(
                part_queries, self._keys[:, begin:end], self._values[:, begin:end], _plan(group, end - begin), scale=scale, mask=mask,
                bias=bias, key_padding=None, prior=state, dropout_p=0.0, seed=0, deterministic=False, allocator=_ALLOCATOR,
                out_dtype=q.dtype if end == held else torch.float32, softcap=softcap,
            )  # fmt: skip
            state = row.forward(call)
        assert state is not None and call is not None
        if len(parts) == 1:
            bound = row.bind(call, *state)
            self._bound = None if bound is None else (held, group, scale, bound)
        return state[0].to(q.dtype)

    def _sinks(self, sink_logits: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """A state of nothing but sinks: a zero in every out."""
        rows, _, group, _ = queries.shape
        zero = torch.zeros((), dtype=torch.float32, device=queries.device)
        lse = sink_logits.to(torch.float32).expand(rows, group, 1).reshape(rows, 1, group)
        return zero.expand(rows, 1, group, self._values.shape[-1]), lse
