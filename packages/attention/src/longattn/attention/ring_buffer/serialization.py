"""States as dictionaries, and back: for pickle, files, other devices and other batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longattn.attention.ring_buffer.cursor import Cursor
from longattn.attention.ring_buffer.linear_ring import LinearRing
from longattn.attention.ring_buffer.rings import Geometry

if TYPE_CHECKING:
    from longattn.attention.ring_buffer.state import RingBufferState

FORMAT = 1
"""Of the dictionary; a later one may read earlier ones. Its "clocks" are the cursors."""


def to_dict(state: RingBufferState) -> dict[str, Any]:
    """The state as numbers, lists and tensors, of slots in use only, without gradients."""
    rings = {"kv": state.kv.main, "kv_evicted": state.kv.evicted, "outputs": state.outputs}
    if state.hidden is not None:
        rings |= {"hidden": state.hidden.main, "hidden_evicted": state.hidden.evicted}
    used = {name: _used(name, ring, state) for name, ring in rings.items() if ring is not None}
    return {
        "format": FORMAT,
        "geometry": asdict(state.geometry),
        "batch_size": state.batch_size,
        "dtype": str(state.dtype).removeprefix("torch."),
        "clocks": [asdict(cursor) for cursor in state.cursors],
        "rings": used,
    }


def _used(name: str, ring: LinearRing, state: RingBufferState) -> Tensor:
    """A copy of the slots that were ever written, without the padding of rows."""
    evicted = max(
        0, *(c.position - state.geometry.buffer_size for c in state.cursors), *(c.restorable for c in state.cursors)
    )
    tokens = {
        "kv": state.held,
        "hidden": state.held,
        "outputs": max(max(c.fed, c.fed_restorable) for c in state.cursors),
    }
    count = min(ring.slots, tokens.get(name, ring.slots if evicted else 0))
    if name == "outputs" and any(c.fed_restorable for c in state.cursors):
        count = ring.slots
    return ring.storage[:, :, :, :count, : ring.head_dim].detach().clone()


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
        ValueError: something is missing or does not fit.
    """
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(f"saved must be a dictionary of format {FORMAT} from state_dict(), got {type(saved).__name__}")
    missing = {"geometry", "batch_size", "dtype", "clocks", "rings"} - saved.keys()
    if missing:
        raise ValueError(f"saved must hold {', '.join(sorted(missing))} as well")
    rings: dict[str, Tensor] = saved["rings"]
    place = rings["kv"].device if device is None else device
    state = kind(Geometry(**saved["geometry"]), saved["batch_size"], dtype or getattr(torch, saved["dtype"]), place)
    state.cursors = [Cursor(**cursor) for cursor in saved["clocks"]]
    if "hidden" in rings:
        state.track_hidden()
    if "outputs" in rings:
        state.ready_outputs()
    _fill(state, rings, slice(None))
    return state


def _fill(state: RingBufferState, rings: dict[str, Tensor], rows: slice) -> None:
    """Copy saved slots into the rings of a state, for some rows of its batch."""
    targets = {"kv": state.kv.main, "kv_evicted": state.kv.evicted, "outputs": state.outputs}
    if state.hidden is not None:
        targets |= {"hidden": state.hidden.main, "hidden_evicted": state.hidden.evicted}
    with torch.no_grad():
        for name, saved in rings.items():
            ring = targets[name]
            if ring is None or saved.shape[3] > ring.slots:
                raise ValueError(f"rings[{name!r}] does not fit the geometry, got {saved.shape[3]} slots")
            ring.storage[:, rows, :, : saved.shape[3], : ring.head_dim] = saved.to(ring.storage.device)


def cat(states: Sequence[RingBufferState]) -> RingBufferState:
    """The rows of several states as one batch; see `RingBufferState.cat`."""
    if not states:
        raise ValueError("states must hold at least one state, got none")
    first = states[0]
    for other in states[1:]:
        for name in ("geometry", "dtype", "device", "owner"):
            if getattr(other, name) != getattr(first, name):
                raise ValueError(f"states must have one {name}, {getattr(first, name)}, got {getattr(other, name)}")
    whole = type(first)(first.geometry, sum(s.batch_size for s in states), first.dtype, first.device)
    whole.owner = first.owner
    whole.cursors = [c.clone() for s in states for c in (s.cursors * s.batch_size if s.uniform else s.cursors)]
    # Slots that only some rows hold are zero in the others.
    whole.kv.main.clear(0, whole.held)
    if any(s.hidden is not None for s in states):
        whole.track_hidden()
    if any(s.outputs is not None for s in states):
        whole.ready_outputs()
    row = 0
    for state in states:
        _fill(whole, to_dict(state)["rings"], slice(row, row + state.batch_size))
        row += state.batch_size
    whole.settle()
    return whole
