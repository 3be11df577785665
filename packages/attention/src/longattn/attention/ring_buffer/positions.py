"""Rotary positions under positions="cache", where the distance to sinks is bounded.

With positions="cache" (StreamingLLM, Xiao et al. 2023, section 3.2) positions count places in the cache. Between tokens of the window
they differ by what their absolute positions differ by, so absolute rotary positions serve: only to sinks, which stay while the window
moves on, the distance stops growing. Rotating a query back by the number of evicted tokens equals rotating the sinks forward by it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longattn.attention.ring_buffer.config import RingBufferConfig
from longattn.attention.sequences.rotary import rotate


def rotate_features(x: Tensor, positions: Tensor, config: RingBufferConfig) -> Tensor:
    """x (batch, seq, heads, head_dim) rotated by `positions`, (seq,) or (batch, seq), negative ones back, as `config` pairs features."""
    dim = x.shape[-1] if config.rotary_dim is None else config.rotary_dim
    rotated, unrotated = x[..., :dim], x[..., dim:]
    if config.rotary_interleaved:
        rotated = torch.cat((rotated[..., 0::2], rotated[..., 1::2]), -1)
    rotated = rotate(rotated, positions, config.rotary_base)
    if config.rotary_interleaved:
        rotated = torch.stack(rotated.chunk(2, -1), -1).flatten(-2)
    return torch.cat((rotated, unrotated), -1) if unrotated.shape[-1] else rotated


def rotate_for_sinks(q: Tensor, positions: Tensor, config: RingBufferConfig) -> Tensor:
    """Queries (batch, seq, heads, head_dim) at absolute `positions` (seq,) or (batch, seq) as sinks see them under positions="cache"."""
    evicted = (positions - (config.sinks + config.buffer_size - 1)).clamp_min(0)
    return rotate_features(q, -evicted, config)
