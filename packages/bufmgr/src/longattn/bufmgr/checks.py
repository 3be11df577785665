"""Checks of what users give. Every error reads "NAME must be WHAT, got VALUE".

Checks take `object`: annotations promise a type, and these functions are where a broken promise is noticed. This module
imports no torch, so that the types and policies of spec.py need none.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import SupportsIndex, cast

_MOST_CHARACTERS = 200
_MOST = 2**63 - 1
"""The system's sizes, and torch's, are int64."""


def describe(value: object) -> str:
    """Return a value for an error text: tensors and arrays by shape and dtype, and nothing longer than a line or two."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(shape, tuple) and dtype is not None:
        return f"a {type(value).__name__} of shape {tuple(cast('tuple[int, ...]', shape))}, {dtype}"
    if isinstance(value, int) and value.bit_length() > _MOST_CHARACTERS:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except ValueError:  # a number within has more digits than Python writes
        return f"a {type(value).__name__}"
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + "..."


def check_kind(name: str, value: object, kind: type, expected: str) -> None:
    """Raise TypeError unless `value` is of a kind."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {expected}, got {describe(value)}")


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless `value` is True or False."""
    check_kind(name, value, bool, "True or False")


def check_whole(name: str, value: object, least: int = 0) -> int:
    """Return a number as an int. Raises TypeError unless it is a whole number, ValueError if it is under `least`."""
    if (
        value.__class__ is int and least <= cast("int", value) <= _MOST
    ):  # what nearly always comes; the rest takes microseconds
        return cast("int", value)
    expected = f"a whole number of {least} or more"
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{name} must be {expected}, got {describe(value)}")
    try:
        whole = operator.index(value)
    except (TypeError, ValueError, RuntimeError) as error:  # a class, or a tensor that is no single integer
        raise TypeError(f"{name} must be {expected}, got {describe(value)}") from error
    if whole < least:
        raise ValueError(f"{name} must be {expected}, got {describe(value)}")
    if whole > _MOST:
        raise ValueError(f"{name} must be at most {_MOST}, got {describe(value)}")
    return whole


def check_mib(name: str, value: object, *, zero_allowed: bool) -> None:
    """Raise TypeError or ValueError unless `value` is a finite number of MiB."""
    expected = f"a finite number of MiB, {'0 or more' if zero_allowed else 'above 0'}"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be {expected}, got {describe(value)}")
    if not (0 < value < float("inf") or (zero_allowed and value == 0)):
        raise ValueError(f"{name} must be {expected}, got {describe(value)}")


def check_shape(shape: object) -> tuple[int, ...]:
    """Return a shape as ints. Raises TypeError or ValueError that names the axis."""
    is_scalar = getattr(shape, "ndim", 1) == 0  # iterable by its class, and yet not
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Iterable) or is_scalar:
        raise TypeError(f"shape must be a sequence of whole numbers, got {describe(cast('object', shape))}")
    sizes = cast("Iterable[object]", shape)
    checked = tuple(sizes)
    if all(size.__class__ is int and cast("int", size) >= 0 for size in checked):
        return cast("tuple[int, ...]", checked)
    return tuple(check_whole(f"shape[{axis}]", size) for axis, size in enumerate(checked))
