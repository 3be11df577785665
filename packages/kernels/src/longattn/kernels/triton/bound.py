"""Calls of the Triton row that are bound once: compiled kernels, grids and arguments, with everything in place but tensors and seed.

Triton's own launcher looks at each of some forty arguments again to find the compiled kernel. What it would find is the same for every
call of one signature whose tensors begin at multiples of 16 bytes, so it is kept.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from longattn.kernels.dispatch.call import Call
from longattn.kernels.dispatch.environment import TorchAllocator
from longattn.kernels.triton.availability import INTERPRETED, installed_version
from longattn.kernels.triton.launching import failed_launch, on_device, with_scratch
from longattn.kernels.triton.passes import DeviceTables, retain_for_graph

READ_VERSIONS = ("3.7.",)
"""Of triton: what its launcher does after it found the compiled kernel was read there, and is done here."""

_ALIGNMENT = 16
"""Bytes: the only property of a pointer that kernels are compiled for."""


class Launch(NamedTuple):
    """One launch, not yet made.

    Attributes:
        arguments: by the kernel's names, with num_warps and num_stages. tables: what the kernel reads its jobs from, or None.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    tables: DeviceTables | None = None


def can_bind(call: Call) -> bool:
    """Whether a call has q, k and v alone, beginning at addresses that kernels are compiled for, and triton compiles and is known."""
    if INTERPRETED or not call.q.numel() or not _launcher_was_read():
        return False
    beside = (call.mask, call.bias, call.by_distance, call.key_padding, call.prior)
    return all(x is None for x in beside) and is_aligned(call.q, call.k, call.v)


@lru_cache
def _launcher_was_read() -> bool:
    return (installed_version() or "").startswith(READ_VERSIONS)


def apart(call: Call) -> Call:
    """The call with q, k and v that are objects of their own, also where one tensor is two of them: places are found by identity."""
    return replace(call, q=call.q.detach(), k=call.k.detach(), v=call.v.detach(), allocator=TorchAllocator())


def bind_launches(
    launches: Iterable[Launch], tensors: Sequence[Tensor | None], device: torch.device
) -> list[BoundLaunch]:
    """All of them but those of an empty grid; see `BoundLaunch`."""
    return [BoundLaunch(launch, tensors, device) for launch in launches if math.prod(launch.grid)]


def is_aligned(*tensors: Tensor) -> bool:
    """Whether all of them begin at a multiple of 16 bytes."""
    address = 0
    for x in tensors:
        address |= x.data_ptr()
    return not address % _ALIGNMENT


def _specialised_alike(strides: tuple[int, ...], others: tuple[int, ...]) -> bool:
    """Whether triton compiles one variant for both: it tells apart 1, multiples of 16, and what does not fit 32 bits."""
    return all(
        a == b or (a != 1 != b and (a % 16 == 0) == (b % 16 == 0) and (a < 1 << 31) == (b < 1 << 31))
        for a, b in zip(strides, others, strict=True)
    )


class BoundLaunch:
    """A launch of which the tensors and the seed are given at each call.

    Args:
        launch: as it was made; its kernel is compiled.
        tensors: those of its arguments that change from call to call, found by identity.
        device: where it runs.
    """

    __slots__ = (
        "_arguments",
        "_device",
        "_grid",
        "_kernel",
        "_name",
        "_numbers",
        "_places",
        "_scratch",
        "_seed",
        "_table_places",
        "_tables",
    )

    def __init__(self, launch: Launch, tensors: Sequence[Tensor | None], device: torch.device) -> None:
        self._device, self._name = device, launch.kernel.__name__
        self._grid = (*launch.grid, 1, 1)[:3]
        with on_device(device):
            self._kernel = launch.kernel.warmup(grid=launch.grid, **launch.arguments)
        self._scratch = getattr(getattr(self._kernel, "metadata", None), "global_scratch_size", 0) > 0
        names = launch.kernel.arg_names
        self._numbers = {name: at for at, name in enumerate(names)}
        self._arguments = [launch.arguments[name] for name in names]
        numbers = {id(x): number for number, x in enumerate(tensors) if x is not None}
        self._places = [(at, numbers[id(x)]) for at, x in enumerate(self._arguments) if id(x) in numbers]
        self._seed = names.index("seed") if "seed" in names else None
        # Weak: tables live as long as their plan.
        self._tables = None if launch.tables is None else weakref.ref(launch.tables)
        fields = ("jobs", "entries", "weights", "rows") if launch.tables is not None else ()
        self._table_places = [(names.index(f"{field}_ptr"), field) for field in fields if f"{field}_ptr" in names]
        for at in [*(at for at, _ in self._places), *(at for at, _ in self._table_places)]:
            self._arguments[at] = None

    def changed(self, grid: tuple[int, ...], arguments: dict[str, Any], tables: DeviceTables) -> BoundLaunch | None:
        """The same kernel over another grid, tables and arguments; None where those would be compiled another variant for."""
        if not grid[0]:
            return None
        launch = object.__new__(BoundLaunch)
        for name in BoundLaunch.__slots__:
            setattr(launch, name, getattr(self, name))
        launch._grid, launch._tables, launch._arguments = (*grid, 1, 1)[:3], weakref.ref(tables), self._arguments.copy()
        for name, value in arguments.items():
            at = self._numbers[name]
            before = self._arguments[at]
            if isinstance(value, tuple) and not _specialised_alike(value, before):
                return None
            if name.isupper() and value != before:
                return None
            launch._arguments[at] = value
        return launch

    def tables(self) -> DeviceTables | None:
        """What the kernel reads its jobs from; None: it has none, or they are gone."""
        return None if self._tables is None else self._tables()

    @property
    def outlived(self) -> bool:
        """Whether its tables are gone."""
        return self._tables is not None and self._tables() is None

    def __call__(self, tensors: Sequence[Tensor | None], seed: int, stream: int, capturing: bool) -> None:
        """Launch on a stream of the current device; capturing: a CUDA graph records it.

        Raises:
            RuntimeError: the driver refused; what was launched, and what the driver said.
        """
        arguments = self._arguments.copy()
        for at, number in self._places:
            arguments[at] = tensors[number]
        tables = self.tables()
        for at, field in self._table_places:
            arguments[at] = getattr(tables, field)
        if self._seed is not None:
            arguments[self._seed] = seed
        if tables is not None:
            # Inside a capture nothing waits for what was recorded before it; a capture begins when the device is idle.
            if capturing:
                retain_for_graph(tables)
            else:
                tables.use_on(stream)
        kernel, runtime = self._kernel, knobs.runtime
        metadata = kernel.launch_metadata(self._grid, stream, *arguments)
        launched = (
            *self._grid, stream, kernel.function, kernel.packed_metadata, metadata,
            runtime.launch_enter_hook, runtime.launch_exit_hook, *arguments,
        )  # fmt: skip
        try:
            if self._scratch:
                with_scratch(self._device, partial(kernel.run, *launched))
            else:
                kernel.run(*launched)
        except RuntimeError as error:
            raise failed_launch(self._name, {}, self._device, self._grid, error) from error


def launch_bound(
    launches: Iterable[BoundLaunch], tensors: Sequence[Tensor | None], seed: int, device: torch.device
) -> None:
    """All of them, in order, on the device of the tensors, whichever is current."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    with on_device(device):
        active: Any = driver.active
        stream = active.get_current_stream(active.get_current_device())
        for launch in launches:
            launch(tensors, seed, stream, capturing)
