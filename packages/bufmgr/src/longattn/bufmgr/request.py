"""One checked request for a buffer: what shape, dtype, device and size. Nothing below this file checks users again."""

from __future__ import annotations

import functools
import math
import operator
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import SupportsIndex, cast

import torch

_CPU = torch.device("cpu")
_META = torch.device("meta")
# A quantized tensor is made by a quantizer; torch 2.13 crashes on laying one over plain memory.
_QUANTIZED = frozenset(
    getattr(torch, name) for name in ("qint8", "quint8", "qint32", "quint4x2", "quint2x4") if hasattr(torch, name)
)

function_modes: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
"""Number of torch-function modes (device contexts are such) active in this thread."""


@dataclass(frozen=True, slots=True)
class BufferRequest:
    """A buffer that can be asked for. `nbytes` is exact; `device` has an index wherever devices are numbered."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    nbytes: int

    def describe(self) -> str:
        """Return the request in words, for error texts."""
        return f"shape {self.shape}, {self.dtype}, {self.nbytes} bytes ({self.nbytes / 2**30:.2f} GiB) on {self.device}"


def resolve_request(
    shape: Sequence[int], dtype: torch.dtype | None = None, device: torch.device | str | int | None = None
) -> BufferRequest:
    """Check a request and fill in what was left open.

    shape: whole numbers of 0 or more. dtype None is torch's default dtype. device None is the device of the current
    `with torch.device(...)` or `torch.set_default_device`, else CPU; "cuda", "cuda:0", 0 and torch.device("cuda") become
    one device.

    Raises TypeError or ValueError naming the parameter, and MemoryError for sizes that no machine of this kind holds.
    """
    sizes = _check_shape(shape)
    if dtype is None:
        dtype = torch.get_default_dtype()
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype or None, got {dtype!r}")
    if dtype in _QUANTIZED:
        raise TypeError(f"dtype: expected a dtype that is not quantized, got {dtype}")
    target = resolve_device(device)
    request = BufferRequest(sizes, dtype, target, math.prod(sizes) * dtype.itemsize)
    if request.nbytes > sys.maxsize:
        raise MemoryError(f"a buffer of {request.describe()} is more than can be addressed")
    if target.type == "cpu" and request.nbytes > physical_memory():
        # Overcommit might promise it; the first writes would then end the process instead of raising here.
        raise MemoryError(f"a buffer of {request.describe()}: this machine has {physical_memory()} bytes of memory")
    return request


def _check_shape(shape: object) -> tuple[int, ...]:
    is_scalar = isinstance(shape, torch.Tensor) and shape.dim() == 0
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Iterable) or is_scalar:
        raise TypeError(f"shape: expected a sequence of whole numbers, got {describe(shape)}")
    sizes = cast("Iterable[object]", shape)
    return tuple(check_size(f"shape[{axis}]", size) for axis, size in enumerate(sizes))


def check_size(name: str, size: object) -> int:
    """Return a size as an int. Raises TypeError or ValueError that begins with `name`."""
    expected = f"{name}: expected a whole number of 0 or more, got "
    if isinstance(size, bool) or not isinstance(size, SupportsIndex):
        raise TypeError(expected + describe(size))
    try:
        whole = operator.index(size)
    except (TypeError, ValueError, RuntimeError) as error:  # a class, or a tensor that is no single integer
        raise TypeError(expected + describe(size)) from error
    if whole < 0:
        raise ValueError(expected + describe(size))
    return whole


def describe(value: object) -> str:
    """Return what came, for error texts; a tensor by shape, dtype and layout, because its content may be large."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, {value.layout}"
    return repr(value)


def resolve_device(device: torch.device | str | int | None) -> torch.device:
    """Return the one name of a device. Raises TypeError or ValueError for what is no device or is not here."""
    if device is None:
        # A device context is a mode; looking for it costs microseconds, seeing that there is no mode at all does not.
        found = torch.get_default_device() if function_modes() else _CPU
    else:
        found = _parse_device(device)
    if found.type == "cpu":
        return _CPU
    if found.type == "meta":
        return _META
    return _resolve_accelerator(found)


def _parse_device(device: object) -> torch.device:
    if isinstance(device, torch.device):
        return device
    if isinstance(device, bool) or not isinstance(device, (str, int)):
        raise TypeError(f"device: expected a torch.device, str, int or None, got {device!r}")
    try:
        return torch.device(device)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise ValueError(f"device: expected a device that torch knows, got {device!r}: {error}") from error


def _resolve_accelerator(device: torch.device) -> torch.device:
    here = torch.accelerator.current_accelerator(check_available=True)
    if here is None or here.type != device.type:
        known = "'cpu' or 'meta'" + (f" or '{here.type}'" if here else "")
        raise ValueError(f"device: expected {known} on this machine, got {str(device)!r}")
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    count = torch.accelerator.device_count()
    if index >= count:
        raise ValueError(f"device: expected an index below {count} for {device.type}, got {str(device)!r}")
    return torch.device(device.type, index)


@functools.cache
def physical_memory() -> int:
    """Return this machine's memory in bytes, or the largest address where the system does not tell."""
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return sys.maxsize
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
