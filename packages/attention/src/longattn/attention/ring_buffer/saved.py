"""What a saved state holds, and the checks that it does: a file may come from anywhere, and decoding reads what it says is there."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from longattn.attention.ring_buffer.cursor import Cursor
from longattn.attention.ring_buffer.rings import Geometry
from longattn.attention.saved_fields import (
    MOST_BYTES,
    check_dtype,
    check_fields,
    check_format,
    check_integer,
    check_tensor,
    entries_of,
    items_of,
    shown,
)

FORMAT = 1
"""Of the dictionary; a later one may read earlier ones."""

_LINE = 64


@dataclass(frozen=True)
class SavedState:
    """The fields of a saved state, checked."""

    geometry: Geometry
    batch_size: int
    dtype: torch.dtype
    clocks: list[Cursor]
    rings: dict[str, Tensor]


def used_slots(geometry: Geometry, clocks: list[Cursor]) -> dict[str, int]:
    """How many slots of each ring are saved, by the ring's name: the first so many."""
    kv_slots = min(geometry.sinks + geometry.buffer_size, max(c.position for c in clocks))
    overwritten = any(c.fed_restorable for c in clocks)
    outputs = geometry.buffer_size if overwritten else min(geometry.buffer_size, max(c.fed for c in clocks))
    evicts = any(c.position > geometry.buffer_size or c.restorable for c in clocks)
    evicted = geometry.max_rewind if evicts else 0
    return {"kv": kv_slots, "kv_evicted": evicted, "outputs": outputs, "hidden": kv_slots, "hidden_evicted": evicted}


def clear_unused(name: str, slots: Tensor, geometry: Geometry, clocks: list[Cursor]) -> None:
    """Zero what no call can read of a ring's saved slots, in place: it was never written, or belongs to tokens that are gone.

    slots: (planes, batch, heads, slots, head_dim).
    """
    g, count = geometry, slots.shape[3]
    if slots.is_meta:
        return
    for index, clock in enumerate(clocks):
        rows = slots if len(clocks) == 1 else slots[:, index : index + 1]
        if name in ("kv", "hidden"):
            rows[:, :, :, min(clock.position, count) :].zero_()
            continue
        if name == "outputs":
            start, stop, size = max(clock.fed_restorable, clock.fed - g.buffer_size), clock.fed, g.buffer_size
        else:
            stop, size = clock.position - g.buffer_size, g.max_rewind
            start = max(g.sinks, clock.restorable, stop - g.max_rewind)
        if count:
            unused = torch.ones(count, dtype=torch.bool, device=slots.device)
            unused[torch.arange(start, max(start, stop), device=slots.device) % size] = False
            rows.masked_fill_(unused[:, None], 0)


def check_saved(saved: object) -> SavedState:
    """The fields of a dictionary from `state_dict()`.

    Raises:
        ValueError: a field is missing, unknown, of another type, out of range, or a tensor of another shape, dtype or device.
    """
    check_format(saved, FORMAT)
    values = check_fields("saved", saved, ("format", "geometry", "batch_size", "dtype", "clocks", "rings"))
    geometry = _geometry(values["geometry"])
    batch_size = check_integer("saved.batch_size", values["batch_size"])
    dtype = check_dtype("saved.dtype", values["dtype"])
    size = _nbytes(geometry, batch_size, dtype)
    if size > MOST_BYTES:
        raise ValueError(f"saved must describe rings of at most {MOST_BYTES} bytes, got {shown(size)}")
    clocks = _cursors(values["clocks"], geometry, batch_size)
    return SavedState(geometry, batch_size, dtype, clocks, _rings(values["rings"], geometry, batch_size, dtype, clocks))


def saved_geometry(geometry: Geometry) -> dict[str, int]:
    """The geometry as it is saved: value_head_dim only where it is not head_dim."""
    saved = asdict(geometry)
    if geometry.value_head_dim == geometry.head_dim:
        del saved["value_head_dim"]
    return saved


def _geometry(saved: object) -> Geometry:
    names = [field.name for field in fields(Geometry)]
    # Not written where it is head_dim.
    entries = entries_of(saved)
    if entries is not None and "head_dim" in entries and "value_head_dim" not in entries:
        saved = entries | {"value_head_dim": entries["head_dim"]}
    values = check_fields("saved.geometry", saved, names)
    minimum = {"sinks": 0, "max_rewind": 0, "bptt_calls": 0}
    geometry = Geometry(*(check_integer(f"saved.geometry.{n}", values[n], minimum.get(n, 1)) for n in names))
    if geometry.num_heads % geometry.kv_heads:
        raise ValueError(f"saved.geometry.kv_heads must divide num_heads={geometry.num_heads}, got {geometry.kv_heads}")
    return geometry


def _nbytes(geometry: Geometry, batch_size: int, dtype: torch.dtype) -> int:
    g = geometry
    row = -(-max(g.head_dim, g.value_head_dim) * dtype.itemsize // _LINE) * _LINE
    kv_rows = 2 * g.kv_heads * (g.sinks + g.buffer_size + g.max_rewind)
    return max(1, batch_size) * row * (kv_rows + g.num_heads * g.buffer_size)


def _cursors(saved: object, geometry: Geometry, batch_size: int) -> list[Cursor]:
    cursors = items_of(saved)
    if cursors is None or len(cursors) not in (1, batch_size) or not cursors:
        raise ValueError(f"saved.clocks must list one clock, or one for each of {batch_size} rows, got {shown(saved)}")
    return [_cursor(f"saved.clocks[{index}]", clock, geometry) for index, clock in enumerate(cursors)]


def _cursor(name: str, saved: object, geometry: Geometry) -> Cursor:
    counters = ("position", "restorable", "fed", "fed_restorable")
    values = check_fields(name, saved, (*counters, "decoded"))
    position, restorable, fed, fed_restorable = (check_integer(f"{name}.{n}", values[n]) for n in counters)
    oldest = max(geometry.sinks, position - geometry.buffer_size)
    if restorable > oldest:
        raise ValueError(
            f"{name}.restorable must be at most {oldest}, the oldest token in the window at position={position}, got {restorable}"
        )
    stretches = items_of(values["decoded"])
    if stretches is None or len(stretches) > geometry.buffer_size:
        raise ValueError(
            f"{name}.decoded must list at most buffer_size={geometry.buffer_size} stretches, got {shown(values['decoded'])}"
        )
    decoded: list[list[int]] = []
    for stretch in stretches:
        pair = items_of(stretch)
        if pair is None or len(pair) != 2:
            raise ValueError(f"{name}.decoded must hold pairs [first position, count], got {shown(stretch)}")
        decoded.append([check_integer(f"{name}.decoded", n) for n in pair])
    if any(first + count > next_first for (first, count), (next_first, _) in pairwise([*decoded, [position, 0]])):
        raise ValueError(f"{name}.decoded must rise and end at position={position} at the latest, got {shown(decoded)}")
    total = sum(count for _, count in decoded)
    if total > fed:
        raise ValueError(f"{name}.decoded must count at most fed={fed} tokens, got {total}")
    return Cursor(position, restorable, fed, fed_restorable, decoded)


def _rings(
    saved: object, geometry: Geometry, batch_size: int, dtype: torch.dtype, clocks: list[Cursor]
) -> dict[str, Tensor]:
    g, names = geometry, ["kv"]
    # Padding is known only where some call gave it, outputs where something was decoded.
    stored = entries_of(saved) or {}
    if "hidden" in stored:
        names.append("hidden")
    if g.max_rewind:
        names += [f"{name}_evicted" for name in names]
    if "outputs" in stored or any(c.fed or c.fed_restorable for c in clocks):
        names.append("outputs")
    tensors = check_fields("saved.rings", saved, names)
    slots = used_slots(g, clocks)
    heads = {
        "kv": (2, g.kv_heads, max(g.head_dim, g.value_head_dim)),
        "outputs": (1, g.num_heads, g.value_head_dim),
        "hidden": (1, 1, 1),
    }
    for name in names:
        kind = name.removesuffix("_evicted")
        planes, count, width = heads[kind]
        shape = (planes, batch_size, count, slots[name], width)
        check_tensor(f"saved.rings.{name}", tensors[name], shape, torch.bool if kind == "hidden" else dtype)
        if tensors[name].device != tensors["kv"].device:
            raise ValueError(
                f"saved.rings.{name} must be on the device of kv, {tensors['kv'].device}, got {tensors[name].device}"
            )
    return {name: tensors[name] for name in names}
