"""Streaming states as dictionaries, and back: for pickle, files and other devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

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
from longattn.attention.streaming.held_keys import HeldKeys
from longattn.attention.streaming.page_pool import PagePool
from longattn.attention.streaming.slot_buffer import LARGEST, Storage
from longattn.kernels.interface import dtype_name

if TYPE_CHECKING:
    from longattn.attention.streaming.stream_state import StreamingState

FORMAT = 1
FIELDS = ("format", "widths", "kv_heads", "batch_size", "max_rewind", "dtype", "tables", "storage", "keys", "values")
MOST_ROWS = 1 << 24
"""Of all kv heads of a batch: each has a list of pages, however few slots are in use."""


def to_dict(state: StreamingState) -> dict[str, Any]:
    """Numbers, lists and tensors that hold what the state holds: slots up to the last one in use."""
    pool = state.pool
    pool.move(state.device)
    used = max(table.used for table in state.tables)
    slots, free = state.slots_to(used), free_slots(state.tables, used).to(state.device)
    return {
        "format": FORMAT,
        "widths": list(state.widths),
        "kv_heads": state.kv_heads,
        "batch_size": state.batch_size,
        "max_rewind": state.max_rewind,
        "dtype": dtype_name(state.dtype),
        "tables": [
            {
                "position": table.position,
                "restorable": table.restorable,
                "slots": torch.tensor(table.slots[:, :used]),
                "last": torch.tensor(table.last[:, :used]),
            }
            for table in state.tables
        ],
        "storage": state.storage,
        # A file must not show what other streams left in pages.
        "keys": {name: part.flatten(0, 1)[slots].masked_fill(free, 0) for name, part in pool.keys.parts.items()},
        "values": {name: part.flatten(0, 1)[slots].masked_fill(free, 0) for name, part in pool.values.parts.items()},
    }


def free_slots(tables: Sequence[HeldKeys], used: int) -> Tensor:
    """(1 or batch, kv_heads, used, 1) bool: slots among the first that hold nothing."""
    return torch.as_tensor(np.stack([table.slots[:, :used] < 0 for table in tables]))[..., None]


def from_dict(kind: type[StreamingState], saved: object) -> StreamingState:
    """The state that `to_dict` described, in a pool of its own.

    Raises:
        ValueError: a field is missing, unknown, of another type, out of range, or a tensor of another shape, dtype or device.
    """
    check_format(saved, FORMAT)
    values = check_fields("saved", saved, FIELDS)
    widths = items_of(values["widths"])
    if widths is None or len(widths) != 2:
        raise ValueError(f"saved.widths must list the head_dim of keys and of values, got {shown(values['widths'])}")
    key_width, value_width = (check_integer("saved.widths", width, 1) for width in widths)
    heads, rewind = (
        check_integer("saved.kv_heads", values["kv_heads"], 1),
        check_integer("saved.max_rewind", values["max_rewind"]),
    )
    batch = check_integer("saved.batch_size", values["batch_size"], 0, MOST_ROWS // heads)
    dtype, storage = check_dtype("saved.dtype", values["dtype"]), values["storage"]
    if storage is not None and not (isinstance(storage, str) and storage in LARGEST):
        raise ValueError(f"saved.storage must be None or one of {', '.join(LARGEST)}, got {shown(storage)}")
    numbers = (entries_of(values["keys"]) or {}).get("numbers")
    used = numbers.shape[2] if isinstance(numbers, Tensor) and numbers.dim() == 4 else 0
    nbytes = heads * used * (16 + batch * (key_width + value_width) * (dtype.itemsize if storage is None else 1))
    if nbytes > MOST_BYTES:
        raise ValueError(f"saved must describe a state of at most {MOST_BYTES} bytes, got {shown(nbytes)}")
    shape = (batch, heads, used)
    keys, held = (
        _parts(f"saved.{name}", values[name], (*shape, width), dtype, storage)
        for name, width in (("keys", key_width), ("values", value_width))
    )
    device = keys["numbers"].device
    tables = items_of(values["tables"])
    if not tables or len(tables) not in (1, batch):
        raise ValueError(
            f"saved.tables must list one table, or one for each of {batch} rows, got {shown(values['tables'])}"
        )
    checked = [_table(f"saved.tables[{index}]", table, heads, used, rewind) for index, table in enumerate(tables)]
    if device.type == "meta" or any(part.device != device for part in (*keys.values(), *held.values())):
        raise ValueError(
            f"saved.keys and saved.values must hold data on one device, got {device} and {held['numbers'].device}"
        )

    state = kind(
        PagePool((key_width, value_width), dtype, device, cast("Storage | None", storage)), heads, batch, rewind
    )
    state.tables = checked
    # What calls read of a free slot is multiplied by 0, and 0 * NaN is NaN.
    free = free_slots(checked, used).to(device)
    cleared = ({name: part.masked_fill(free, 0) for name, part in parts.items()} for parts in (keys, held))
    state.fill_slots(used, *cleared)
    return state


def _parts(
    name: str, saved: object, shape: tuple[int, ...], dtype: torch.dtype, storage: str | None
) -> dict[str, Tensor]:
    """The tensors of a `SlotBuffer`."""
    expected = {"numbers": (shape, dtype if storage is None else torch.int8)}
    if storage is not None:
        expected["scales"] = ((*shape[:3], 1), torch.float32)
    given = check_fields(name, saved, list(expected))
    return {part: check_tensor(f"{name}.{part}", given[part], *wanted) for part, wanted in expected.items()}


def _table(name: str, saved: object, kv_heads: int, used: int, max_rewind: int) -> HeldKeys:
    """A table that holds each position once in a head, below its own, and names a last query for those slots that hold one."""
    given = check_fields(name, saved, ("position", "restorable", "slots", "last"))
    table = HeldKeys(kv_heads, 0, max_rewind)
    table.position = check_integer(f"{name}.position", given["position"])
    table.restorable = check_integer(f"{name}.restorable", given["restorable"], 0, table.position)
    slots, last = (
        check_tensor(f"{name}.{part}", given[part], (kv_heads, used), torch.int64) for part in ("slots", "last")
    )
    table.slots, table.last = slots.cpu().numpy().copy(), last.cpu().numpy().copy()
    if (table.slots < -1).any() or (table.slots >= table.position).any():
        raise ValueError(f"{name}.slots must hold positions below {table.position}, or -1, got another")
    in_order = np.sort(table.slots, axis=1)
    if ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any():
        raise ValueError(f"{name}.slots must hold a position once in a head, got one twice")
    if ((table.slots < 0) != (table.last < 0)).any() or (table.last < -1).any():
        raise ValueError(
            f"{name}.last must name a query for each slot that holds a position, and -1 for the others, got another"
        )
    return table
