"""States as plain data, and back: what pickle, files, other devices and other batches see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longattn.attention.ring_buffer.clock import Clock
from longattn.attention.ring_buffer.linear_ring import LinearRing
from longattn.attention.ring_buffer.rings import Geometry

if TYPE_CHECKING:
    from longattn.attention.ring_buffer.state import RingBufferState

FORMAT = 1
"""Of the dictionary; a later one may read earlier ones."""


def to_plain(state: RingBufferState) -> dict[str, Any]:
    """Numbers, lists and tensors that hold what the state holds, slots in use only. Gradients stay behind."""
    rings = {"kv": state.kv.main, "kv_evicted": state.kv.evicted, "outputs": state.outputs}
    if state.hidden is not None:
        rings |= {"hidden": state.hidden.main, "hidden_evicted": state.hidden.evicted}
    used = {name: _used(name, ring, state) for name, ring in rings.items() if ring is not None}
    return {
        "format": FORMAT,
        "geometry": asdict(state.geometry),
        "batch_size": state.batch_size,
        "dtype": str(state.dtype).removeprefix("torch."),
        "clocks": [asdict(clock) for clock in state.clocks],
        "rings": used,
    }


def _used(name: str, ring: LinearRing, state: RingBufferState) -> Tensor:
    """A copy of the slots that were ever written, without the padding of rows."""
    evicted = max(
        0, *(c.position - state.geometry.buffer_size for c in state.clocks), *(c.restorable for c in state.clocks)
    )
    tokens = {
        "kv": state.held,
        "hidden": state.held,
        "outputs": max(max(c.fed, c.fed_restorable) for c in state.clocks),
    }
    count = min(ring.slots, tokens.get(name, ring.slots if evicted else 0))
    if name == "outputs" and any(c.fed_restorable for c in state.clocks):
        count = ring.slots
    return ring.storage[:, :, :, :count, : ring.head_dim].detach().clone()


def from_plain(
    kind: type[RingBufferState],
    saved: dict[str, Any],
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> RingBufferState:
    """The state that `to_plain` described, in memory of its own.

    Args:
        saved: from `to_plain`, its tensors on any device. device, dtype: default those of `saved`.

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
    state.clocks = [Clock(**clock) for clock in saved["clocks"]]
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
        for name in ("geometry", "dtype", "device"):
            if getattr(other, name) != getattr(first, name):
                raise ValueError(f"states must have one {name}, {getattr(first, name)}, got {getattr(other, name)}")
    # A state that was loaded belongs to no module yet; it joins those of any.
    owners = [s.owner for s in states if s.owner is not None]
    if any(owner != owners[0] for owner in owners):
        raise ValueError("states must be of one module, or of none yet, got states that different modules have used")
    whole = type(first)(first.geometry, sum(s.batch_size for s in states), first.dtype, first.device)
    whole.owner = owners[0] if owners else None
    whole.clocks = [c.clone() for s in states for c in (s.clocks * s.batch_size if s.uniform else s.clocks)]
    # Slots that only some rows hold are zero in the others.
    whole.kv.main.clear(0, whole.held)
    if any(s.hidden is not None for s in states):
        whole.track_hidden()
    if any(s.outputs is not None for s in states):
        whole.ready_outputs()
    row = 0
    for state in states:
        _fill(whole, to_plain(state)["rings"], slice(row, row + state.batch_size))
        row += state.batch_size
    whole.settle()
    return whole
