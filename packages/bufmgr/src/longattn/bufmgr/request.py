"""One checked request for a buffer: shape, dtype, device and size. Leases and caches do not check it again."""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch

from longattn.bufmgr.checks import check_kind, check_shape, describe

_CPU = torch.device("cpu")
_META = torch.device("meta")
# A quantizer makes quantized tensors; torch 2.13 crashes where one is made over plain memory.
_QUANTIZED = frozenset(
    getattr(torch, name) for name in ("qint8", "quint8", "qint32", "quint4x2", "quint2x4") if hasattr(torch, name)
)

function_modes: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", lambda: 1)  # pyright: ignore[reportPrivateUsage]
"""Number of torch-function modes (device contexts are such) active in this thread."""


class BufferRequest(NamedTuple):
    """A buffer that can be allocated. `nbytes` is exact; `device` has an index wherever devices are numbered."""

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
    """Check a request and fill in the defaults.

    shape: whole numbers of 0 or more. dtype None is torch's default dtype. device None is the device of the current
    `with torch.device(...)` or `torch.set_default_device`, else CPU; "cuda", "cuda:0", 0 and torch.device("cuda") become
    one device.

    Raises TypeError or ValueError naming the parameter, and MemoryError for sizes that no machine of this kind holds.
    """
    sizes = check_shape(shape)
    if dtype is None:
        dtype = torch.get_default_dtype()
    check_kind("dtype", dtype, torch.dtype, "a torch.dtype or None")
    if dtype in _QUANTIZED:
        raise TypeError(f"dtype must be one that is not quantized, got {dtype}")
    target = resolve_device(device)
    request = BufferRequest(sizes, dtype, target, math.prod(sizes) * dtype.itemsize)
    if request.nbytes > sys.maxsize:
        raise MemoryError(f"a buffer of {request.describe()} is more than can be addressed")
    if target.type == "cpu" and request.nbytes > physical_memory():
        # The system may promise more than it has (overcommit); the first writes would then kill the process.
        raise MemoryError(f"a buffer of {request.describe()}: this machine has {physical_memory()} bytes of memory")
    return request


def resolve_device(device: torch.device | str | int | None) -> torch.device:
    """Return the one name of a device. Raises TypeError or ValueError for what is no device of this machine."""
    if device is None:
        # A device context is a torch-function mode. Asking for the default device takes microseconds; counting the active
        # modes does not.
        named = torch.get_default_device() if function_modes() else _CPU
    else:
        named = _parse_device(device)
    if named.type == "cpu":
        return _CPU
    if named.type == "meta":
        return _META
    return _resolve_accelerator(named)


def _parse_device(device: object) -> torch.device:
    if isinstance(device, torch.device):
        return device
    if isinstance(device, bool) or not isinstance(device, (str, int)):
        raise TypeError(f"device must be a torch.device, str, int or None, got {describe(device)}")
    try:
        return torch.device(device)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"device must be a device that torch knows, got {describe(device)}: {str(error)[:200]}"
        ) from error


def _resolve_accelerator(device: torch.device) -> torch.device:
    here = torch.accelerator.current_accelerator(check_available=True)
    if here is None or here.type != device.type:
        known = "'cpu' or 'meta'" + (f" or '{here.type}'" if here else "")
        raise ValueError(f"device must be {known} on this machine, got {str(device)!r}")
    index = cast("int | None", device.index)  # torch's annotation leaves None out
    if index is None:
        index = torch.accelerator.current_device_index()
    count = torch.accelerator.device_count()
    if index >= count:
        raise ValueError(f"device must have an index below {count} for {device.type}, got {str(device)!r}")
    return torch.device(device.type, index)


@functools.cache
def physical_memory() -> int:
    """Return this machine's memory in bytes, or the largest address where the system does not report it."""
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return sys.maxsize
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
