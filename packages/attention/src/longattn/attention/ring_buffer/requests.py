"""The arguments of a call of `RingBufferAttention`, checked once against its config and state. A refused call has changed nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longattn.attention.ring_buffer.config import RingBufferConfig
from longattn.attention.ring_buffer.parts import attended_before
from longattn.attention.ring_buffer.rings import Geometry
from longattn.attention.ring_buffer.state import RingBufferState
from longattn.attention.validate import integers
from longattn.kernels.interface import FLOATS, ScoreTerm, check_qkv, check_terms, dtype_name, tensors_in
from longattn.patterncache.spans import shortened


@dataclass(frozen=True)
class Request:
    """One call, for rows of the batch at one position.

    Attributes:
        q: (batch, Nq, heads, head_dim). k, v: (batch, n, kv_heads, head_dim), zero where hidden.
        hidden: (batch, n) bool, True = padding, or None. mask: broadcastable to (batch, heads, Nq, Nk), or None.
        causal: whether queries see a window, or everything.
        grad: whether gradients are wanted. weights: whether weights are.
        dropout_p, seed: as in `attend`. sink_logits: (heads,) or None. terms: score terms for all heads.
        lead: rows of a batch that this call's first row stands behind, for dropout.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor | None
    mask: Tensor | None
    causal: bool
    grad: bool
    weights: bool
    dropout_p: float
    seed: Tensor | None
    sink_logits: Tensor | None
    terms: tuple[ScoreTerm, ...] = ()
    lead: int = 0


def check_tensors(config: RingBufferConfig, q: Tensor, k: Tensor, v: Tensor, decode: bool) -> None:
    """q, k and v fit each other and the config."""
    check_qkv(q, k, v)
    if q.shape[2:] != (config.num_heads, config.head_dim):
        raise ValueError(
            f"q must have (heads, head_dim) = {(config.num_heads, config.head_dim)} of the config, got {tuple(q.shape[2:])}"
        )
    if v.shape[3] != config.value_width:
        raise ValueError(f"v must have value_head_dim={config.value_width} of the config, got {v.shape[3]}")
    if config.kv_heads is not None and k.shape[2] != config.kv_heads:
        raise ValueError(f"k must have kv_heads={config.kv_heads} of the config, got {k.shape[2]}")
    if decode and q.shape[1] != k.shape[1]:
        raise ValueError(f"q must have the length of k in decode, {k.shape[1]}, got {q.shape[1]}")
    if config.causal and q.shape[1] > k.shape[1]:
        raise ValueError(f"q must not be longer than k where causal, {k.shape[1]}, got {q.shape[1]}")


def check_score_terms(config: RingBufferConfig, terms: object, q: Tensor) -> tuple[ScoreTerm, ...]:
    """Score terms, as `attend` takes them; where positions are places in the cache, those that read no distance."""
    checked = check_terms(terms, q)
    if config.positions == "cache" and config.sinks and tensors_in(checked):
        kinds = ", ".join(type(term).__name__ for term in checked)
        raise ValueError(
            f"score_terms must be a Softcap where positions='cache' and there are sinks, whose distance differs from query to query, got {kinds}"
        )
    return checked


def geometry_of(config: RingBufferConfig, kv_heads: int) -> Geometry:
    """The sizes of a state for this config."""
    return Geometry(
        config.num_heads,
        kv_heads,
        config.head_dim,
        config.buffer_size,
        config.sinks,
        config.max_rewind,
        config.bptt_calls,
        config.value_width,
    )


def check_state(state: object, owner: str, geometry: Geometry) -> RingBufferState:
    """A state of this module, or of none yet."""
    if not isinstance(state, RingBufferState):
        raise TypeError(f"buffer_state must be None or a RingBufferState, got {type(state).__name__}")
    if state.owner is not None and state.owner != owner:
        raise ValueError("buffer_state must be a state of this module, got one that another module has used")
    for name in (
        "num_heads",
        "head_dim",
        "buffer_size",
        "sinks",
        "max_rewind",
        "bptt_calls",
        "kv_heads",
        "value_head_dim",
    ):
        expected, got = getattr(geometry, name), getattr(state.geometry, name)
        if expected != got:
            source = "k" if name == "kv_heads" else "this module"
            raise ValueError(f"buffer_state must have {name}={expected} of {source}, got {name}={got}")
    return state


def check_fit(state: RingBufferState, k: Tensor) -> None:
    """The tensors of the call fit the state: batch size, dtype and device do not change mid-stream."""
    for name, expected, got in (
        ("batch size", state.batch_size, k.shape[0]),
        ("dtype", dtype_name(state.dtype), dtype_name(k.dtype)),
        ("device", state.device, k.device),
    ):
        if expected != got:
            raise ValueError(f"q, k and v must have the {name} of buffer_state, {expected}, got {got}")


def check_position(position: object, positions: list[int], scope: str) -> None:
    """None, or the number of tokens written so far: one for all rows of the batch, or one for each."""
    if position is None:
        return
    value: Any = position
    if isinstance(position, Tensor) and not position.is_floating_point():
        value = integers(position) if position.dim() else int(position)
    listed: list[Any] = [*value] if isinstance(value, (list, tuple)) else [value] * max(1, len(positions))
    if any(isinstance(p, bool) or not isinstance(p, int) for p in listed):
        raise TypeError(
            f"position must be None, an integer, or one for each row of the batch, got {shortened(position)}"
        )
    if positions and listed != positions:
        uniform = len(set(positions)) == 1
        raise ValueError(
            f"position must be {positions[0] if uniform else positions}, the number of tokens written {scope}, got {shortened(position)}"
        )


def whole_mask(mask: object, q: Tensor, num_new: int, num_earlier: int, decode: bool) -> Tensor | None:
    """An attention mask over all attended keys: Nk = num_earlier + num_new wide, or 1.

    In an encoder call a mask may be `num_new` wide: earlier keys are then visible.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"att_mask must be a bool or floating torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and mask.dtype not in FLOATS:
        raise TypeError(
            f"att_mask must be bool, True = may see, or floating, added to the scores, got {dtype_name(mask.dtype)}"
        )
    if mask.device != q.device:
        raise ValueError(f"att_mask must be on the device of q, {q.device}, got {mask.device}")
    width = num_earlier + num_new
    narrow = not decode and mask.dim() > 0 and mask.shape[-1] == num_new and num_new not in (1, width)
    full = (q.shape[0], q.shape[2], q.shape[1], num_new if narrow else width)
    if mask.dim() > 4 or not all(n in (1, m) for n, m in zip(mask.shape[::-1], full[::-1], strict=False)):
        raise ValueError(
            f"att_mask must be broadcastable to (batch, heads, Nq, Nk) = {(*full[:3], width)}, where Nk counts the attended keys in "
            f"position order, got {tuple(mask.shape)}"
        )
    if narrow:
        fill = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
        mask = torch.cat([fill((*mask.shape[:-1], num_earlier)), mask], -1)
    return mask


def split_padding(mask: object, k: Tensor, num_earlier: int, decode: bool) -> tuple[Tensor | None, Tensor | None]:
    """(padding of earlier attended keys, padding of the call's own), each (batch, n) bool or None.

    In decode the mask covers all attended keys; in an encoder call it may cover the call's own keys only.
    """
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor):
        raise TypeError(f"key_padding_mask must be a bool torch.Tensor (batch, Nk), got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask must be bool, True = padding, got {dtype_name(mask.dtype)}")
    if mask.device != k.device:
        raise ValueError(f"key_padding_mask must be on the device of k, {k.device}, got {mask.device}")
    batch, num_new = k.shape[:2]
    if tuple(mask.shape) == (batch, num_earlier + num_new):
        return mask[:, :num_earlier], mask[:, num_earlier:]
    if not decode and tuple(mask.shape) == (batch, num_new):
        return None, mask
    raise ValueError(
        f"key_padding_mask must have shape (batch, Nk) = {(batch, num_earlier + num_new)}, where Nk counts the attended keys in position order, "
        f"got {tuple(mask.shape)}"
    )


def columns_before(state: RingBufferState, causal: bool) -> int:
    """Attended keys from before the call, in the row of the batch that has most."""
    if state.uniform:
        return attended_before(state, causal)
    return max(attended_before(state.row(b), causal) for b in range(state.batch_size))
