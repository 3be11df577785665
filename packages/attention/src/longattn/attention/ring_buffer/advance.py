"""One call on a state: check what only the state can tell, attend, then write. A refused call has written nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from longattn.attention.ring_buffer.config import RingBufferConfig
from longattn.attention.ring_buffer.parts import attended_before, earlier_keys
from longattn.attention.ring_buffer.requests import Request, columns_before, split_padding, whole_mask
from longattn.attention.ring_buffer.rings import Rings
from longattn.attention.ring_buffer.routes import by_parts, straight
from longattn.attention.ring_buffer.state import RingBufferState
from longattn.attention.ring_buffer.tiles import TilingProcessor
from longattn.kernels.interface import as_seed, check_sinks


class Options(NamedTuple):
    """What a call says beside its tensors; see `RingBufferAttention.forward`."""

    mask: Tensor | None
    padding: Tensor | None
    weights: bool
    dropout_p: float
    seed: Tensor | int | None
    sink_logits: Tensor | None


def advance(
    config: RingBufferConfig,
    tiling: TilingProcessor,
    state: RingBufferState,
    tensors: tuple[Tensor, Tensor, Tensor],
    decode: bool,
    options: Options,
) -> tuple[Tensor, Tensor | None]:
    """Attend with q, k, v that fit the config and the state, and put k, v (and in decode the output) into the rings.

    Returns:
        out (batch, Nq, heads, head_dim), and weights (batch, heads, Nq, Nk) if asked.
    """
    q, k, v = tensors
    causal = config.causal or decode
    before = columns_before(state, causal)
    mask = whole_mask(options.mask, q, k.shape[1], before, decode)
    earlier, own = split_padding(options.padding, k, before, decode)
    check_sinks(options.sink_logits, q)
    seed = as_seed(options.seed) if options.dropout_p or options.seed is not None else None
    if earlier is not None and bool(earlier.any()):
        _hide(state, earlier, causal)
    if own is not None:
        own = own if bool(own.any()) else None
    if own is not None:
        state.track_hidden()
        # 0 * NaN is NaN: what padding holds must not meet a product at all.
        k, v = (x.masked_fill(own[:, :, None, None], 0) for x in (k, v))
    watched = (q, k, v, mask, options.sink_logits, *(x for s in state.backward.segments for x in (s.k, s.v)))
    grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in watched)
    if (
        q.shape[1] == 1 == k.shape[1]
        and causal
        and not (grad or options.weights or options.dropout_p or mask is not None)
    ):
        state.append(k, v, own)
        out, weights = straight(config, state, q, options.sink_logits), None
    else:
        request = Request(
            q, k, v, own, mask, causal, grad, options.weights, options.dropout_p, seed, options.sink_logits
        )
        out, weights = _attend(config, tiling, state, request, before)
        state.append(k, v, own, grad)
    if decode:
        state.feed(out)
    return out, weights


def _attend(
    config: RingBufferConfig, tiling: TilingProcessor, state: RingBufferState, request: Request, before: int
) -> tuple[Tensor, Tensor | None]:
    """The call on all rows of the batch at once, or on each by itself where they stand at different positions."""
    if state.uniform:
        return by_parts(config, tiling, state, request)
    found = []
    for index in range(state.batch_size):
        row, at = state.row(index), slice(index, index + 1)
        mine = attended_before(row, request.causal) + request.k.shape[1]
        mask = request.mask
        if mask is not None and mask.dim() and mask.shape[-1] > 1:
            # Columns are counted from the newest key.
            mask = mask[..., mask.shape[-1] - mine :]
        if mask is not None and mask.dim() == 4 and mask.shape[0] > 1:
            mask = mask[at]
        hidden = None if request.hidden is None else request.hidden[at]
        part = replace(request, q=request.q[at], k=request.k[at], v=request.v[at], mask=mask, hidden=hidden, lead=index)
        out, weights = by_parts(config, tiling, row, part)
        if weights is not None:
            weights = torch.nn.functional.pad(weights, (before + request.k.shape[1] - mine, 0))
        found.append((out, weights))
    outs, weights = zip(*found, strict=True)
    return torch.cat(outs), None if not request.weights else torch.cat(weights)


def _hide(state: RingBufferState, padding: Tensor, causal: bool) -> None:
    """Mark attended tokens from before the call, (batch, before) bool, as padding."""
    state.track_hidden()
    rows: list[tuple[Rings, Tensor]] = [(state, padding)]
    if not state.uniform:
        rows = [(state.row(b), padding[b : b + 1]) for b in range(state.batch_size)]
    for rings, mine in rows:
        column = mine.shape[1] - attended_before(rings, causal)
        for start, stop in earlier_keys(rings, causal):
            for run in rings.kv.main.runs(start, stop):
                rings.hide(run, mine[:, column : column + run.length])
                column += run.length


def is_step(state: object, q: object, k: object, v: object, position: object, name: str) -> bool:
    """Whether a decoder call without options is the common one: one token in all rows, nothing hidden, no gradient, all as before."""
    if type(state) is not RingBufferState or state.owner != name or state.hidden is not None or len(state.clocks) > 1:
        return False
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return False
    if position is not None and (type(position) is not int or position != state.clocks[0].position):
        return False
    batch, kv_heads, _, head_dim = state.kv.main.planes[0].shape
    own = (batch, 1, kv_heads, head_dim)
    if k.shape != own or v.shape != own or q.shape != (batch, 1, state.geometry.num_heads, head_dim):
        return False
    dtype, device = state.dtype, state.device
    if q.dtype != dtype or k.dtype != dtype or v.dtype != dtype:
        return False
    if q.device != device or k.device != device or v.device != device:
        return False
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or state.backward.segments):
        return False
    return not torch.is_autocast_enabled(device.type)


def step(config: RingBufferConfig, state: RingBufferState, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`advance` for the common decoder call: the same rings, the same attention, nothing in between."""
    # Nothing here wants a gradient, so there is no need for no_grad, which takes as long as a copy.
    clock, main, evicted = state.clocks[0], state.kv.main, state.kv.evicted
    slot, old = main.slot(clock.position), clock.position - main.capacity
    if evicted is not None and old >= main.prefix:
        evicted.storage.select(3, old % evicted.capacity).copy_(main.storage.select(3, slot))
    keys, values = main.tokens
    keys.narrow(1, slot, 1).copy_(k)
    values.narrow(1, slot, 1).copy_(v)
    if state.backward.segments:
        state.backward.segments.clear()
    clock.position += 1
    out = straight(config, state, q, None)
    outputs = state.outputs or state.ready_outputs()
    outputs.tokens[0].narrow(1, clock.fed % main.capacity, 1).copy_(out)
    clock.decode(1, main.capacity)
    return out
