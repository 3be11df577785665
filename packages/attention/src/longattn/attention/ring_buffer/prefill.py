"""Prefill: a call with any number of queries, over the parts of its keys, under the scheduler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longattn.attention.ring_buffer.config import RingBufferConfig, TileOrder
from longattn.attention.ring_buffer.parts import Part, gather_parts
from longattn.attention.ring_buffer.positions import rotate_features, rotate_for_sinks
from longattn.attention.ring_buffer.requests import Request
from longattn.attention.ring_buffer.rings import Rings
from longattn.attention.ring_buffer.tiles import TileWork, TilingProcessor
from longattn.attention.weights import attention_weights
from longattn.kernels import AttentionState, attend, merge
from longattn.kernels.interface import add_sink, of_heads
from longattn.patterncache import Band, Full, Pattern, Span, Window

_FULL = Full()


def prefill(
    config: RingBufferConfig, tiling: TilingProcessor, rings: Rings, request: Request
) -> tuple[Tensor, Tensor | None]:
    """Attend with the queries of a call, whose own tokens are not in the rings yet; rings are uniform.

    Returns:
        out (batch, Nq, heads, v's head_dim) in q's dtype, and weights (batch, heads, Nq, Nk) if asked.
    """
    q, position = request.q, rings.cursors[0].position + request.k.shape[1] - request.q.shape[1]
    parts = gather_parts(rings, request.k, request.v, request.causal, request.grad)
    rotated = q
    if config.positions == "cache" and config.sinks:
        rotated = rotate_for_sinks(q, position + torch.arange(q.shape[1], device=q.device), config)
    mask = _mask_with_padding(rings, request, parts)
    calls = _PartAttention(config, tiling, request, position, rotated, mask)
    if request.grad and parts:
        state = calls.whole(parts[0])
        for part in parts[1:]:
            state = merge(state, calls.whole(part))
        state = state if request.sink_logits is None else add_sink(state, request.sink_logits)
        out = state.finalize(q.dtype)
    else:
        out = tiling.run(q, position, parts, calls.attend, request.sink_logits, request.v.shape[-1])
    return out, calls.weights(parts) if request.weights else None


def _mask_with_padding(rings: Rings, request: Request, parts: list[Part]) -> Tensor | None:
    """The call's mask combined with padding, over all attended keys."""
    num_earlier = sum(p.length for p in parts) - request.k.shape[1]
    hidden: list[Tensor] = []
    if rings.hidden is not None:
        position = rings.cursors[0].position
        for part in parts:
            if part.start < position:
                runs = rings.hidden.main.runs(part.start, min(position, part.start + part.length))
                hidden += [rings.hidden.main.read(run)[0][:, 0, :, 0] for run in runs]
    if request.hidden is None and not hidden:
        return request.mask
    call_hidden = (
        torch.zeros(request.k.shape[:2], dtype=torch.bool, device=request.k.device)
        if request.hidden is None
        else request.hidden
    )
    if not hidden:
        hidden = [call_hidden.new_zeros(call_hidden.shape[0], num_earlier)]
    visible = ~torch.cat([*hidden, call_hidden], 1)[:, None, None, :]
    if request.mask is None:
        return visible
    if request.mask.dtype == torch.bool:
        return request.mask & visible
    return torch.where(visible, request.mask, -torch.inf)


class _PartAttention:
    """Calls of `attend` on behalf of one request."""

    def __init__(
        self,
        config: RingBufferConfig,
        tiling: TilingProcessor,
        request: Request,
        position: int,
        rotated: Tensor,
        mask: Tensor | None,
    ) -> None:
        self.config, self.request, self.position, self.rotated, self.mask = config, request, position, rotated, mask
        # "tiled" names the row of the order.
        k_major = tiling.tile_order is TileOrder.K_MAJOR
        self.backend = "tiled_k_major" if k_major and config.backend == "tiled" else config.backend

    def whole(self, part: Part) -> AttentionState:
        """All queries and a whole part, differentiable."""
        q = self.rotated if part.sink else self.request.q
        group = (0, self.config.num_heads)
        return self.attend(TileWork((0, q.shape[1]), part, (0, part.length), group, (0, part.k.shape[2]), False))

    def attend(self, work: TileWork) -> AttentionState:
        """One rectangle, differentiable."""
        request, part = self.request, work.part
        q = (self.rotated if part.sink else request.q).narrow(1, *work.queries).narrow(2, *work.heads)
        k, v = (x.narrow(1, *work.keys).narrow(2, *work.kv_heads) for x in (part.k, part.v))
        at = (self.position + work.queries[0], part.start + work.keys[0])
        if not request.dropout_p:
            # Only distances matter: equal distances share a plan.
            at = (at[0] - min(at), at[1] - min(at))
        options: dict[str, Any] = {"seed": request.seed} if request.dropout_p else {}
        lead = request.lead if request.dropout_p else 0
        if lead:
            # Dropout counts rows of the batch.
            q, k, v = (x.expand(lead + 1, -1, -1, -1) for x in (q, k, v))
        state = attend(
            q,
            k,
            v,
            _FULL if work.dense else _pattern(part.band),
            q_spans=Span(at[0], q.shape[1]),
            k_spans=Span(at[1], k.shape[1]),
            heads=Span(*work.heads),
            num_heads=self.config.num_heads,
            softmax_scale=self.config.scale,
            attention_mask=self._mask_of(work),
            score_terms=of_heads(request.terms, *work.heads) or None,
            dropout_p=request.dropout_p,
            backend=self.backend,
            **options,
        )
        return AttentionState(state.out[lead:], state.lse[lead:])

    def _mask_of(self, work: TileWork) -> Tensor | None:
        mask = self.mask
        if mask is None or mask.dim() == 0:
            return mask
        if mask.shape[-1] > 1:
            mask = mask.narrow(-1, work.part.column + work.keys[0], work.keys[1])
        if mask.dim() > 1 and mask.shape[-2] > 1:
            mask = mask.narrow(-2, *work.queries)
        if mask.dim() > 2 and mask.shape[-3] > 1:
            mask = mask.narrow(-3, *work.heads)
        return mask

    def weights(self, parts: list[Part]) -> Tensor:
        """(batch, heads, Nq, Nk), columns in position order; dense."""
        q, config = self.request.q, self.config
        if not parts:
            return q.new_zeros((q.shape[0], q.shape[2], q.shape[1], 0))
        keys = torch.cat([part.k for part in parts], 1)
        pattern = Window(config.buffer_size, config.sinks) if self.request.causal else _FULL
        # Columns are positions without the gap behind the sinks, which no window reaches across.
        if self.rotated is q:
            # Where there is a gap, terms are told what the distances are.
            columns = torch.cat([torch.arange(p.start, p.start + p.length, device="cpu") for p in parts])
            rows = torch.arange(self.position, self.position + q.shape[1], device="cpu")
            distance = columns - rows[:, None]
            beside: dict[str, Any] = {"score_terms": self.request.terms, "distance": distance}
            weights = attention_weights(q, keys, pattern, config.scale, self.mask, **beside)
        else:
            weights = self._rotated_weights(keys, pattern)
        if self.request.sink_logits is None:
            return weights
        return weights * self._softmax_share_of_keys(parts).to(weights.dtype)

    def _rotated_weights(self, keys: Tensor, pattern: Pattern) -> Tensor:
        """Weights where positions count places in the cache, so that the distance to sinks differs from query to query."""
        config, request = self.config, self.request
        rows: list[Tensor] = []
        for i in range(request.q.shape[1]):
            width = keys.shape[1] - request.q.shape[1] + i + 1
            evicted = max(0, self.position + i - (config.sinks + config.buffer_size - 1))
            sinks = min(config.sinks, width)
            offsets = torch.full((sinks,), evicted, device=keys.device)
            sink_keys = rotate_features(keys[:, :sinks], offsets, config)
            row_keys = torch.cat([sink_keys, keys[:, sinks:width]], 1)
            mask = self.mask
            if mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
                mask = mask.narrow(-2, i, 1)
            if mask is not None and mask.dim() and mask.shape[-1] > 1:
                mask = mask[..., :width]
            terms = request.terms
            row = attention_weights(request.q[:, i : i + 1], row_keys, pattern, config.scale, mask, score_terms=terms)
            rows.append(torch.nn.functional.pad(row, (0, keys.shape[1] - width)))
        return torch.cat(rows, 2)

    def _softmax_share_of_keys(self, parts: list[Part]) -> Tensor:
        """(batch, heads, Nq, 1): the part of the softmax that a learned sink leaves to the keys."""
        assert self.request.sink_logits is not None
        state = self.whole(parts[0])
        for part in parts[1:]:
            state = merge(state, self.whole(part))
        share = torch.sigmoid(state.lse - self.request.sink_logits.to(state.lse.dtype))
        return share.nan_to_num(nan=0.0).transpose(1, 2).unsqueeze(-1)


def _pattern(band: Band) -> Pattern:
    if band.high is not None:
        return Window(band.high + 1)
    return _FULL if band.low is None else Full(causal=True)
