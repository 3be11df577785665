"""States as dictionaries, and back: for pickle, files, other devices and other batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longattn.attention.ring_buffer.linear_ring import LinearRing
from longattn.attention.ring_buffer.saved import FORMAT, check_saved, clear_unused, saved_geometry, used_slots
from longattn.kernels.interface import FLOATS, dtype_name
from longattn.patterncache.spans import shortened

if TYPE_CHECKING:
    from longattn.attention.ring_buffer.state import RingBufferState


def to_dict(state: RingBufferState) -> dict[str, Any]:
    """Numbers, lists and tensors that hold what the state holds, slots in use only. Gradients stay behind."""
    count = used_slots(state.geometry, state.cursors)
    used: dict[str, Tensor] = {}
    for name, ring in _by_name(state).items():
        used[name] = ring.storage[:, :, :, : count[name], : ring.head_dim].detach().clone()
        # A file must not show what others left in memory that this state never wrote.
        clear_unused(name, used[name], state.geometry, state.cursors)
        for plane, width in enumerate(ring.widths):
            used[name][plane, ..., width:] = 0
    return {
        "format": FORMAT,
        "geometry": saved_geometry(state.geometry),
        "batch_size": state.batch_size,
        "dtype": dtype_name(state.dtype),
        "clocks": [asdict(cursor) for cursor in state.cursors],
        "rings": used,
    }


def _by_name(state: RingBufferState) -> dict[str, LinearRing]:
    """The rings that a state has, but the backward one."""
    rings = {"kv": state.kv.main, "kv_evicted": state.kv.evicted, "outputs": state.outputs}
    if state.hidden is not None:
        rings |= {"hidden": state.hidden.main, "hidden_evicted": state.hidden.evicted}
    return {name: ring for name, ring in rings.items() if ring is not None}


def from_dict(
    kind: type[RingBufferState],
    saved: dict[str, Any],
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> RingBufferState:
    """The state that `to_dict` described, in memory of its own.

    Args:
        saved: from `to_dict`, its tensors on any device. device, dtype: default those of `saved`.

    Raises:
        ValueError: something is missing, unknown or does not fit.
    """
    checked = check_saved(saved)
    rings = checked.rings
    target_device = rings["kv"].device if device is None else device
    if rings["kv"].device.type == "meta" != target_device.type:
        raise ValueError(f"saved.rings must hold data to go to {target_device}, got tensors on meta")
    if dtype is not None and dtype not in FLOATS:
        got = dtype_name(dtype) if isinstance(dtype, torch.dtype) else shortened(dtype)  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"dtype must be one of {', '.join(map(dtype_name, FLOATS))}, got {got}")
    state = kind(checked.geometry, checked.batch_size, dtype or checked.dtype, target_device)
    state.cursors = checked.clocks
    if "hidden" in rings:
        state.track_hidden()
    if "outputs" in rings:
        state.ready_outputs()
    if target_device.type != "meta":
        _fill(state, rings, slice(None))
        _restore_zeros(state, rings)
    return state


@torch.no_grad()
def _restore_zeros(state: RingBufferState, rings: dict[str, Tensor]) -> None:
    """What calls rely on to be zero is zero, whatever was saved there: slots that hold nothing, and tokens that are padding."""
    targets = _by_name(state)
    for name, saved in rings.items():
        clear_unused(name, targets[name].storage[:, :, :, : saved.shape[3]], state.geometry, state.cursors)
    for name, hidden in (("kv", "hidden"), ("kv_evicted", "hidden_evicted")):
        if hidden in rings:
            count = rings[hidden].shape[3]
            padding = targets[hidden].planes[0][:, :, :count]
            targets[name].storage[:, :, :, :count].masked_fill_(padding, 0)


def _fill(state: RingBufferState, rings: dict[str, Tensor], rows: slice) -> None:
    """Copy saved slots into the rings of a state, for some rows of its batch."""
    targets = _by_name(state)
    with torch.no_grad():
        for name, saved in rings.items():
            ring = targets[name]
            ring.storage[:, rows, :, : saved.shape[3], : ring.head_dim] = saved.to(ring.storage.device)


def cat(states: Sequence[RingBufferState]) -> RingBufferState:
    """The rows of several states as one batch; see `RingBufferState.cat`."""
    if not isinstance(states, (tuple, list)) or not all(hasattr(state, "cursors") for state in states):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"states must be a sequence of RingBufferStates, got {shortened(states)} ({type(states).__name__})"
        )
    if not states:
        raise ValueError("states must hold at least one state, got none")
    first = states[0]
    for other in states[1:]:
        for name in ("geometry", "dtype", "device"):
            if getattr(other, name) != getattr(first, name):
                raise ValueError(f"states must have one {name}, {getattr(first, name)}, got {getattr(other, name)}")
    # A state that was loaded belongs to no module yet; it joins those of any.
    owners = [s.owner for s in states if s.owner is not None]
    if any(owner != owners[0] for owner in owners):
        raise ValueError("states must be of one module, or of none yet, got states that different modules have used")
    joined = type(first)(first.geometry, sum(s.batch_size for s in states), first.dtype, first.device)
    joined.owner = owners[0] if owners else None
    cursors = [c for s in states for c in (s.cursors * s.batch_size if s.uniform else s.cursors)]
    joined.cursors = [c.clone() for c in cursors or first.cursors]
    # Slots that only some rows hold are zero in the others.
    joined.kv.main.clear(0, joined.held)
    if any(s.hidden is not None for s in states):
        joined.track_hidden()
    if any(s.outputs is not None for s in states):
        joined.ready_outputs()
    row = 0
    for state in states:
        _fill(joined, to_dict(state)["rings"], slice(row, row + state.batch_size))
        row += state.batch_size
    joined.settle()
    return joined
