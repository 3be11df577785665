"""Checks of the fields of a saved state: a file may come from anywhere, and what it says is what later calls read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from longattn.kernels.interface import FLOATS, dtype_name

MOST_TOKENS = 1 << 48
"""Positions and other counts of tokens end here: no stream is so long."""

MOST_BYTES = 1 << 40
"""Of the memory that a saved state may ask for."""

_DTYPES = {dtype_name(dtype): dtype for dtype in FLOATS}


def check_format(saved: object, number: int) -> None:
    """Whatever `state_dict()` did not write, or wrote in another format, is refused."""
    entries = entries_of(saved) or {}
    if type(entries.get("format")) is not int or entries["format"] != number:
        raise ValueError(f"saved must be a dictionary of format {number} from state_dict(), got {shown(saved)}")


def check_dtype(name: str, value: object) -> torch.dtype:
    """A floating dtype by its name."""
    dtype = _DTYPES.get(value) if isinstance(value, str) else None
    if dtype is None:
        raise ValueError(f"{name} must be one of {', '.join(_DTYPES)}, got {shown(value)}")
    return dtype


def check_tensor(name: str, x: object, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A dense tensor of this shape and dtype."""
    if not isinstance(x, Tensor) or x.is_nested or x.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got {shown(x)}")
    if x.dtype != dtype:
        raise ValueError(f"{name} must have dtype {dtype_name(dtype)}, got {dtype_name(x.dtype)}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, as the other fields say, got {tuple(x.shape)}")
    # An expanded tensor is a few bytes in a file and any number of them in memory.
    if x.untyped_storage().nbytes() < x.nbytes:
        raise ValueError(f"{name} must hold each number in memory of its own, got an expanded tensor")
    return x


def items_of(value: object) -> list[Any] | None:
    """The items of a list or a tuple; None of anything else."""
    return list(cast("list[Any]", value)) if isinstance(value, (list, tuple)) else None


def entries_of(value: object) -> dict[str, Any] | None:
    """A dictionary; None for anything else."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def check_fields(name: str, saved: object, names: Sequence[str]) -> dict[str, Any]:
    """A dictionary with exactly these keys."""
    values = entries_of(saved)
    if values is None:
        raise ValueError(f"{name} must be a dictionary with {', '.join(names)}, got {shown(saved)}")
    missing = [key for key in names if key not in values]
    if missing:
        raise ValueError(f"{name} must hold {', '.join(names)}, got none of {', '.join(missing)}")
    for key in values:
        if key not in names:
            raise ValueError(f"{name} must hold {', '.join(names)} and nothing else, got {shown(key)}")
    return values


def check_integer(name: str, value: object, minimum: int = 0, maximum: int = MOST_TOKENS) -> int:
    """An integer in a range; a bool is none."""
    if type(value) is not int or not minimum <= value <= maximum:
        raise ValueError(f"{name} must be an integer from {minimum} to {maximum}, got {shown(value)}")
    return value


def shown(value: object) -> str:
    """A few words for any value: what a file holds may be of any length."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        return repr(value[:40])
    items = items_of(value)
    if items is not None:
        return f"{type(value).__name__} of {len(items)}"
    return repr(value) if value is None or isinstance(value, (bool, int, float)) else type(value).__name__
