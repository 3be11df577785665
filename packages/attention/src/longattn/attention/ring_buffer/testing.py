"""For tests of ring buffers: `StreamModel`, which remembers everything and attends by definition."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from longattn.attention.ring_buffer.config import RingBufferConfig
from longattn.attention.ring_buffer.linear_ring import LinearRing
from longattn.attention.ring_buffer.positions import rotate_features
from longattn.kernels import reference_attention
from longattn.kernels.interface import ScoreTerms


@dataclass
class Row:
    """One row of the batch: every token so far, none forgotten.

    Attributes:
        k, v: (1, n, kv_heads, head_dim), float64. hidden: (n,) bool. fed: decoded outputs with the position of their token.
        lost: of these, so many were overwritten.
    """

    k: Tensor
    v: Tensor
    hidden: Tensor
    fed: list[tuple[int, Tensor]] = field(default_factory=list[tuple[int, Tensor]])
    lost: int = 0

    @property
    def position(self) -> int:
        """Tokens so far."""
        return self.k.shape[1]


@dataclass
class StreamModel:
    """What a `RingBufferState` should be: a plain list of tokens for each row of the batch, and the oracle over it."""

    config: RingBufferConfig
    rows: list[Row]

    @classmethod
    def begin(cls, config: RingBufferConfig, batch: int, kv_heads: int) -> StreamModel:
        """Nothing so far."""
        k, v = (torch.empty(1, 0, kv_heads, n, dtype=torch.float64) for n in (config.head_dim, config.value_width))
        return cls(config, [Row(k, v, torch.empty(0, dtype=torch.bool)) for _ in range(batch)])

    def call(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, decode: bool, **options: Any) -> Tensor:
        """Take tokens (batch, n, ...), hidden (batch, n), and return the true output (batch, Nq, heads, head_dim), float64."""
        outs: list[Tensor] = []
        for index, row in enumerate(self.rows):
            before = row.position
            own = torch.zeros(k.shape[1], dtype=torch.bool) if hidden is None else hidden[index]
            row.k = torch.cat([row.k, k[index : index + 1].double()], 1)
            row.v = torch.cat([row.v, v[index : index + 1].double()], 1)
            row.hidden = torch.cat([row.hidden, own])
            out = self._attend(row, q[index : index + 1], before, self.config.causal or decode, **options)
            if decode:
                row.fed += [(before + i, out[:, i]) for i in range(out.shape[1])]
                row.lost = max(row.lost, len(row.fed) - self.config.buffer_size)
            outs.append(out)
        return torch.cat(outs)

    def seen(self, row: Row, position: int, before: int, causal: bool) -> list[int]:
        """Positions that the query at `position` sees, in order, padding included; `before` tokens came before its call."""
        size, sinks = self.config.buffer_size, self.config.sinks
        if causal:
            return [j for j in range(position + 1) if j < sinks or j > position - size]
        return [j for j in range(row.position) if j < sinks or j >= max(sinks, before - size)]

    def _attend(
        self,
        row: Row,
        q: Tensor,
        before: int,
        causal: bool,
        sink_logits: Tensor | None = None,
        score_terms: ScoreTerms = None,
    ) -> Tensor:
        outs: list[Tensor] = []
        for index in range(q.shape[1]):
            position = row.position - q.shape[1] + index
            seen = self.seen(row, position, before, causal)
            k, query = row.k[:, seen], q[:, index : index + 1].double()
            if self.config.positions == "cache":
                # Back to where nothing was rotated, then to places in the cache.
                k = rotate_features(k, torch.arange(len(seen)) - torch.tensor(seen), self.config)
                query = rotate_features(query, torch.tensor([len(seen) - 1 - position]), self.config)
            counts = (~row.hidden[seen]).long().expand(self.config.num_heads, 1, -1)
            padding = row.hidden[seen][None]
            options: dict[str, Any] = {
                "score_terms": score_terms,
                "distance": torch.tensor([seen], dtype=torch.int64) - position,
            }
            state = reference_attention(
                query, k, row.v[:, seen], counts, self.config.scale, key_padding_mask=padding, **options
            )
            out = state.out
            if sink_logits is not None:
                out = out * torch.sigmoid(state.lse - sink_logits.double()).nan_to_num(nan=0.0).unsqueeze(-1)
            outs.append(out)
        return torch.cat([*outs, q.new_zeros((1, 0, q.shape[2], self.config.value_width)).double()], 1)

    def rewind(self, amounts: list[int]) -> None:
        """Forget the last tokens of each row."""
        for row, n in zip(self.rows, amounts, strict=True):
            stays = row.position - n
            row.k, row.v, row.hidden = row.k[:, :stays], row.v[:, :stays], row.hidden[:stays]
            row.fed = [(p, out) for p, out in row.fed if p < stays]

    def taken(self, index: list[int]) -> StreamModel:
        """A model of its own whose row b is row index[b] of this one."""
        rows = [self.rows[i] for i in index]
        return StreamModel(self.config, [Row(r.k, r.v, r.hidden, list(r.fed), r.lost) for r in rows])


@contextmanager
def stale_slots_hold_nan() -> Generator[None, None, None]:
    """Slots of new rings hold NaN until they are written."""
    make = LinearRing.__init__

    def poisoned(ring: LinearRing, *args: Any, **options: Any) -> None:
        make(ring, *args, **options)
        # A ring over a storage that is there already has nine arguments.
        fresh = len(args) < 9 and options.get("storage") is None
        if fresh and ring.storage.dtype.is_floating_point:
            ring.storage.fill_(torch.nan)

    with mock.patch.object(LinearRing, "__init__", poisoned):
        yield
