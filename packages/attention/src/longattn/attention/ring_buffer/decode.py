"""Decode: one query for each head over all slots of the ring, and the common decoder call around it."""

from __future__ import annotations

import torch
from torch import Tensor

from longattn.attention.ring_buffer.config import RingBufferConfig
from longattn.attention.ring_buffer.positions import rotate_for_sinks
from longattn.attention.ring_buffer.rings import Rings
from longattn.attention.ring_buffer.state import RingBufferState
from longattn.kernels.interface import ScoreTerm, at_distances, by_distance_of, decode_attention, softcap_of


def decode_step(
    config: RingBufferConfig,
    rings: Rings,
    q: Tensor,
    sink_logits: Tensor | None,
    terms: tuple[ScoreTerm, ...] = (),
) -> Tensor:
    """Attend with the query of the last token that was written, (batch, 1, heads, head_dim), to all slots in use, in the order of slots."""
    main, num_slots = rings.kv.main, rings.held
    kv_heads = rings.geometry.kv_heads
    sink_query = None
    if config.positions == "cache" and config.sinks and num_slots > config.sinks:
        at = torch.tensor([[c.position - 1] for c in rings.cursors], device=q.device)
        sink_query = (rotate_for_sinks(q, at, config), config.sinks)
    return decode_attention(
        q,
        main.cache,
        num_slots,
        config.scale,
        hidden=None if rings.hidden is None and rings.uniform else _hidden_slots(rings, num_slots, kv_heads),
        first=sink_query,
        sink_logits=None if sink_logits is None else sink_logits.view(kv_heads, -1, 1).repeat(q.shape[0], 1, 1),
        softcap=softcap_of(terms),
        added=_added_by_terms(rings, num_slots, terms, q),
    )


def _added_by_terms(rings: Rings, num_slots: int, terms: tuple[ScoreTerm, ...], q: Tensor) -> Tensor | None:
    """(batch * kv_heads, group, num_slots): what terms add for each slot, by the position of what it holds; None: nothing."""
    by_distance = by_distance_of(terms, q.dtype)
    if by_distance is None:
        return None
    main, kv_heads = rings.kv.main, rings.geometry.kv_heads
    slots = torch.arange(num_slots, device=q.device)
    newest = torch.tensor([[c.position - 1] for c in rings.cursors], device=q.device)
    # Past the prefix the newest token is at distance 0, and each slot before it, around the ring, one further away.
    around = -((newest - slots) % max(1, main.capacity))
    distance = torch.where(slots < main.prefix, slots - newest, around)
    flat = at_distances(by_distance, distance)
    added = flat.reshape(kv_heads, -1, *flat.shape[1:])
    shape = (q.shape[0], kv_heads, added.shape[1], num_slots)
    return added.permute(2, 0, 1, 3).expand(shape).reshape(-1, *shape[2:])


def _hidden_slots(rings: Rings, num_slots: int, kv_heads: int) -> Tensor | None:
    """(batch * kv_heads, 1, held) bool: slots that are padding, or empty in some rows of the batch; None: none."""
    hidden = None if rings.hidden is None else rings.hidden.main.planes[0][:, 0, :num_slots, 0]
    if not rings.uniform:
        used = torch.tensor([[rings.kv.main.held(c.position)] for c in rings.cursors], device=rings.device)
        empty = torch.arange(num_slots, device=rings.device) >= used
        hidden = empty if hidden is None else hidden | empty
    return None if hidden is None else hidden.repeat_interleave(kv_heads, 0).unsqueeze(1)


def fits_append_and_decode(state: object, q: object, k: object, v: object, position: object, name: str) -> bool:
    """Whether a decoder call without options is the common one, which `append_and_decode` serves.

    One token in all rows, at one position, without padding or gradients, in the state's own shapes, dtype and device.
    """
    if type(state) is not RingBufferState or state.owner != name or state.hidden is not None or len(state.cursors) > 1:
        return False
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return False
    if position is not None and (type(position) is not int or position != state.cursors[0].position):
        return False
    batch, kv_heads, _, head_dim = state.kv.main.planes[0].shape
    geometry, tokens = state.geometry, (batch, 1, kv_heads)
    if k.shape != (*tokens, head_dim) or v.shape != (*tokens, geometry.value_head_dim):
        return False
    if q.shape != (batch, 1, geometry.num_heads, head_dim):
        return False
    dtype, device = state.dtype, state.device
    if q.dtype != dtype or k.dtype != dtype or v.dtype != dtype:
        return False
    if q.device != device or k.device != device or v.device != device:
        return False
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or state.backward.segments):
        return False
    return not torch.is_autocast_enabled(device.type)


def append_and_decode(config: RingBufferConfig, state: RingBufferState, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`advance` for the common decoder call: the same rings and the same attention, without checks in between."""
    # Nothing here wants a gradient, so there is no need for no_grad, which takes as long as a copy.
    cursor, main, evicted = state.cursors[0], state.kv.main, state.kv.evicted
    slot, old = main.slot(cursor.position), cursor.position - main.capacity
    if evicted is not None and old >= main.prefix:
        evicted.storage.select(3, old % evicted.capacity).copy_(main.storage.select(3, slot))
    keys, values = main.tokens
    keys.narrow(1, slot, 1).copy_(k)
    values.narrow(1, slot, 1).copy_(v)
    if state.backward.segments:
        state.backward.segments.clear()
    cursor.position += 1
    out = decode_step(config, state, q, None)
    outputs = state.outputs or state.ready_outputs()
    outputs.tokens[0].narrow(1, cursor.fed % main.capacity, 1).copy_(out)
    cursor.decode(1, main.capacity)
    return out
