"""One call on a state: check the arguments against it, attend, then write. A refused call has written nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from longattn.attention.ring_buffer.config import RingBufferConfig
from longattn.attention.ring_buffer.decode import decode_step
from longattn.attention.ring_buffer.parts import attended_before, earlier_keys
from longattn.attention.ring_buffer.prefill import prefill
from longattn.attention.ring_buffer.requests import (
    Request,
    check_score_terms,
    columns_before,
    split_padding,
    whole_mask,
)
from longattn.attention.ring_buffer.rings import Rings
from longattn.attention.ring_buffer.state import RingBufferState
from longattn.attention.ring_buffer.tiles import TilingProcessor
from longattn.kernels.interface import ScoreTerms, as_seed, check_sinks, tensors_in


class StreamOptions(NamedTuple):
    """A call's arguments beside q, k and v; see `RingBufferAttention.forward`."""

    mask: Tensor | None
    padding: Tensor | None
    weights: bool
    dropout_p: float
    seed: Tensor | int | None
    sink_logits: Tensor | None
    score_terms: ScoreTerms = None


def advance(
    config: RingBufferConfig,
    tiling: TilingProcessor,
    state: RingBufferState,
    tensors: tuple[Tensor, Tensor, Tensor],
    decode: bool,
    options: StreamOptions,
) -> tuple[Tensor, Tensor | None]:
    """Attend with q, k, v that fit the config and the state, and put k, v (and in decode the output) into the rings.

    Returns:
        out (batch, Nq, heads, head_dim), and weights (batch, heads, Nq, Nk) if asked.
    """
    q, k, v = tensors
    causal = config.causal or decode
    num_earlier = columns_before(state, causal)
    mask = whole_mask(options.mask, q, k.shape[1], num_earlier, decode)
    earlier_padding, call_padding = split_padding(options.padding, k, num_earlier, decode)
    check_sinks(options.sink_logits, q)
    terms = check_score_terms(config, options.score_terms, q)
    seed = as_seed(options.seed) if options.dropout_p or options.seed is not None else None
    if earlier_padding is not None and bool(earlier_padding.any()):
        _hide(state, earlier_padding, causal)
    if call_padding is not None:
        call_padding = call_padding if bool(call_padding.any()) else None
    if call_padding is not None:
        state.track_hidden()
        # 0 * NaN is NaN: the content of padding must not enter a product.
        k, v = (x.masked_fill(call_padding[:, :, None, None], 0) for x in (k, v))
    segments = (x for s in state.backward.segments for x in (s.k, s.v))
    watched = (q, k, v, mask, options.sink_logits, *tensors_in(terms), *segments)
    grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in watched)
    if (
        q.shape[1] == 1 == k.shape[1]
        and causal
        and not (grad or options.weights or options.dropout_p or mask is not None)
    ):
        state.append(k, v, call_padding)
        out, weights = decode_step(config, state, q, options.sink_logits, terms), None
    else:
        request = Request(
            q,
            k,
            v,
            call_padding,
            mask,
            causal,
            grad,
            options.weights,
            options.dropout_p,
            seed,
            options.sink_logits,
            terms,
        )
        out, weights = _attend(config, tiling, state, request, num_earlier)
        state.append(k, v, call_padding, grad)
    if decode:
        state.feed(out)
    return out, weights


def _attend(
    config: RingBufferConfig, tiling: TilingProcessor, state: RingBufferState, request: Request, num_earlier: int
) -> tuple[Tensor, Tensor | None]:
    """Attend with all rows of the batch at once, or with each by itself where their positions differ."""
    if state.uniform:
        return prefill(config, tiling, state, request)
    outs: list[Tensor] = []
    weights_by_row: list[Tensor] = []
    for index in range(state.batch_size):
        row, rows = state.row(index), slice(index, index + 1)
        num_attended = attended_before(row, request.causal) + request.k.shape[1]
        mask = request.mask
        if mask is not None and mask.dim() and mask.shape[-1] > 1:
            # Columns are counted from the newest key.
            mask = mask[..., mask.shape[-1] - num_attended :]
        if mask is not None and mask.dim() == 4 and mask.shape[0] > 1:
            mask = mask[rows]
        hidden = None if request.hidden is None else request.hidden[rows]
        row_request = replace(
            request, q=request.q[rows], k=request.k[rows], v=request.v[rows], mask=mask, hidden=hidden, lead=index
        )
        out, weights = prefill(config, tiling, row, row_request)
        outs.append(out)
        if weights is not None:
            num_unseen = num_earlier + request.k.shape[1] - num_attended
            weights_by_row.append(torch.nn.functional.pad(weights, (num_unseen, 0)))
    return torch.cat(outs), torch.cat(weights_by_row) if request.weights else None


def _hide(state: RingBufferState, padding: Tensor, causal: bool) -> None:
    """Mark attended tokens from before the call, (batch, before) bool, as padding."""
    state.track_hidden()
    rows: list[tuple[Rings, Tensor]] = [(state, padding)]
    if not state.uniform:
        rows = [(state.row(b), padding[b : b + 1]) for b in range(state.batch_size)]
    for rings, row_padding in rows:
        column = row_padding.shape[1] - attended_before(rings, causal)
        for start, stop in earlier_keys(rings, causal):
            for run in rings.kv.main.runs(start, stop):
                rings.hide(run, row_padding[:, column : column + run.length])
                column += run.length
