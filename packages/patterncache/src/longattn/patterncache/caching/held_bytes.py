"""`held_bytes`: the memory that a value keeps, object by object. `nbytes` is index data alone, without branches and what is derived."""

from __future__ import annotations

import gc
import sys
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ReferenceType

import numpy as np

_SHARED = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, CodeType, ReferenceType, np.dtype)
"""Types whose objects the whole process shares, or that hold no data of their own."""

_LONGEST_NAME = 64
"""Characters of the longest text that is taken for an attribute's name, which Python keeps once for all objects."""

_WRITTEN_IN_PYTHON = 1 << 9
"""Py_TPFLAGS_HEAPTYPE."""


def held_bytes(value: object) -> int:
    """Bytes of the objects that are reachable from `value` and belong to it, each once; of tensors, those in host memory."""
    counted: set[int] = set()
    storages: dict[int, int] = {}
    total, left = 0, [value]
    while left:
        one: Any = left.pop()
        kind: Any = type(one)  # pyright: ignore[reportUnknownVariableType]
        if kind is int or kind is str:
            if not _is_everywhere(one) and id(one) not in counted:
                counted.add(id(one))
                total += sys.getsizeof(one)
            continue
        if id(one) in counted or one is None or kind is bool or isinstance(one, _SHARED):
            continue
        counted.add(id(one))
        total += sys.getsizeof(one)
        if isinstance(one, np.ndarray):
            left.append(one.base)
        elif hasattr(kind, "untyped_storage"):
            if one.device.type == "cpu":
                storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        else:
            inside = gc.get_referents(one)
            left += inside
            total += _beside(one, inside)
    return total + sum(storages.values())


def _is_everywhere(one: object) -> bool:
    """Whether Python keeps one object for all users: small integers and names."""
    return (isinstance(one, int) and -5 <= one <= 256) or (isinstance(one, str) and len(one) <= _LONGEST_NAME)


def _beside(one: Any, inside: list[Any]) -> int:
    """Bytes of an object that `sys.getsizeof` leaves out."""
    if not inside and not isinstance(one, memoryview):
        nbytes = getattr(one, "nbytes", 0)
        return nbytes if isinstance(nbytes, int) else 0
    kind: Any = type(one)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    has_attributes = kind.__flags__ & _WRITTEN_IN_PYTHON and getattr(kind, "__dictoffset__", 0)
    # Attribute values are stored inline, uncounted, until `__dict__` is read.
    return 16 + 8 * max(len(inside), 6) if has_attributes and not any(type(part) is dict for part in inside) else 0
