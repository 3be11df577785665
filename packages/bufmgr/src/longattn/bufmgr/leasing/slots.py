"""The short way to a buffer: a table of slots by what was asked for, and slots that are prepared beforehand.

A hit takes no lock, checks no argument twice and books nothing: it looks its key up, makes a new handle over the slot's
memory, and counts the owners of that memory: master and handle, nobody else. (Why that is enough, and why two threads
never both win, is told in lease.py.) Whatever is not exactly so goes the long way: other modes of torch, other forms of
arguments, a slot in use, no counts to trust. Keys hold arguments as they came, so equal values of other types (2.0 or
True in a shape) are kept out by a look at the types, once for each shape object.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from sys import getrefcount
from typing import Any, TypeVar

import torch
from torch import compiler, get_default_dtype

from longattn.bufmgr.leasing.book import LeaseBook
from longattn.bufmgr.leasing.guard import TAKEN
from longattn.bufmgr.leasing.lease import NO_SLOT, Lease
from longattn.bufmgr.request import BufferRequest, function_modes, resolve_request
from longattn.bufmgr.spec import BufferType, parse_type

_INTEGERS = {int}
_CPU_FORMS = (None, "cpu", torch.device("cpu"))


_Method = TypeVar("_Method", bound=Callable[..., Any])


def in_graphs(twin: Callable[..., Any]) -> Callable[[_Method], _Method]:
    """Have torch.compile trace `twin` in place of the method below: a graph owns its memory.

    The mark is the one by which torch.jit shows its functions to Dynamo. Asking torch.compiler.is_dynamo_compiling() at
    every hit would take a tenth of its time. Other ways of tracing set `torch.compiler._is_compiling_flag`.
    """

    def mark(method: _Method) -> _Method:
        method.__dict__["_torchdynamo_inline"] = twin
        return method

    return mark


def is_plain(shape: Sequence[int], slot: Lease) -> bool:
    """Return whether a shape equal to the slot's holds nothing but whole numbers; note it on the slot if so."""
    if {*map(type, shape)} - _INTEGERS:
        return False
    slot.seen_shape = shape
    return True


class SlotTable:
    """Buffers over a book of leases: `empty` and `release`, as kernels take them.

    The life of a key: it enters when a request that it stands for is first served by a slot, leads to that slot or,
    once that one was found in use, to another for the same request, and leaves when its slot is closed.
    long_way: every request is to be seen by `_serve_request`, so no key is used, also while a scope is open. Default
    False.
    """

    def __init__(self, book: LeaseBook, *, long_way: bool = False) -> None:
        self._book = book
        self._slots: dict[Hashable, Lease] = {}
        self.long_way = long_way
        self.open_scopes = 0
        self._prepared: weakref.WeakSet[PreparedSlot] = weakref.WeakSet()

    def _empty_in_graph(
        self, shape: Sequence[int], dtype: torch.dtype | None, device: Any = None, role: str = "temp"
    ) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def _release_in_graph(self, tensor: torch.Tensor, role: str = "temp") -> None:
        pass

    @in_graphs(_empty_in_graph)
    def empty(
        self,
        shape: Sequence[int],
        dtype: torch.dtype | None,
        device: torch.device | str | int | None = None,
        role: str = "temp",
    ) -> torch.Tensor:
        """Return an uninitialised contiguous buffer of `shape`; `role` is a BufferType's name in lower case.

        Raises TypeError or ValueError that names the parameter, and MemoryError.
        """
        if compiler._is_compiling_flag:
            return self._empty_in_graph(shape, dtype, device)
        try:
            slot = self._slots[role, shape, get_default_dtype() if dtype is None else dtype, device]
        except (KeyError, TypeError):  # not yet; or a list, or what is no shape at all
            pass
        else:
            # No device means the CPU as long as no device context is active.
            if (shape is slot.seen_shape or is_plain(shape, slot)) and (device is not None or not function_modes()):
                handle = slot.master.data
                if slot.owners.value == TAKEN or slot.has_one_handle():
                    slot.handle_id = id(handle)
                    clock = slot.clock
                    clock.now = slot.used = clock.now + 1
                    return handle
                del handle  # so that this thread does not keep the slot from others on its long way
        return self._serve(parse_type(role, "role"), role, shape, dtype, device, False)

    @in_graphs(_release_in_graph)
    def release(self, tensor: torch.Tensor, role: str = "temp") -> None:
        """Give back what `empty` returned for this role; see AttentionBufferManager.deallocate, whose rules hold."""
        if compiler._is_compiling_flag:
            return
        self._book.release(tensor, parse_type(role, "role"), getrefcount(tensor))

    def _serve(
        self,
        kind: BufferType,
        name: BufferType | str,
        shape: Sequence[int],
        dtype: torch.dtype | None,
        device: torch.device | str | int | None,
        zero: bool,
    ) -> torch.Tensor:
        """Serve a checked type the long way; `name` is how it was asked for, for the key."""
        tensor, slot = self._serve_request(resolve_request(shape, dtype, device), kind, zero)
        if slot is not None and isinstance(shape, tuple) and device in _CPU_FORMS:
            self._add_key((name, shape, slot.request.dtype, device), slot)
        return tensor

    def _serve_request(self, request: BufferRequest, kind: BufferType, zero: bool) -> tuple[torch.Tensor, Lease | None]:
        """Return a buffer, and its slot if a key may lead to that."""
        if request.device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # a graph owns its memory
            make = torch.zeros if zero else torch.empty
            return make(request.shape, dtype=request.dtype, device=request.device), None
        slot = self._book.reuse(request, kind)
        tensor = None if slot is None else slot.take()
        if tensor is None:
            tensor, slot = self._make(request, kind, zero)
        elif zero:
            tensor.zero_()
        return tensor, slot

    def _make(self, request: BufferRequest, kind: BufferType, zero: bool) -> tuple[torch.Tensor, Lease]:
        raise NotImplementedError

    def _add_key(self, key: Hashable, slot: Lease) -> None:
        if self.long_way or self.open_scopes:
            return
        slots = self._slots
        slots[key] = slot
        slot.keys[key] = slots
        if not slot.is_slot:  # it never was one, or another thread closed it between these lines
            slots.pop(key, None)

    def open_scope(self) -> None:
        """Send every request the long way until the scope is closed."""
        self.open_scopes += 1
        self._slots = {}
        for prepared in list(self._prepared):
            prepared.forget()


class PreparedSlot:
    """One place that hands out buffers of one request, from `AttentionBufferManager.prepare`.

        slot = manager.prepare(BufferType.TEMP, (8, 128, 128), torch.float32)
        scratch = slot.acquire()

    `acquire` is `manager.allocate` of that request, checked beforehand: the same buffers, the same rules.
    """

    __slots__ = ("__weakref__", "_arguments", "_slot", "_table", "_zeroes")

    def __init__(self, table: SlotTable, request: BufferRequest, kind: BufferType, zero: bool) -> None:
        self._table = table
        self._arguments = (request, kind, zero)
        self._zeroes = zero
        self._slot: Lease = NO_SLOT
        table._prepared.add(self)

    def __reduce__(self) -> tuple[type[PreparedSlot], tuple[Any, ...]]:
        return type(self), (self._table, *self._arguments)

    def forget(self) -> None:
        """Go the long way once."""
        self._slot = NO_SLOT

    def _acquire_in_graph(self) -> torch.Tensor:
        request, _, zero = self._arguments
        make = torch.zeros if zero else torch.empty
        return make(request.shape, dtype=request.dtype, device=request.device)

    @in_graphs(_acquire_in_graph)
    def acquire(self) -> torch.Tensor:
        """Return a buffer. Raises MemoryError."""
        if compiler._is_compiling_flag:
            return self._acquire_in_graph()
        slot = self._slot
        handle = slot.master.data
        if slot.owners.value == TAKEN or slot.has_one_handle():
            slot.handle_id = id(handle)
            clock = slot.clock
            clock.now = slot.used = clock.now + 1
            if self._zeroes:
                handle.zero_()
            return handle
        del handle
        return self._acquire_elsewhere()

    def _acquire_elsewhere(self) -> torch.Tensor:
        request, kind, zero = self._arguments
        tensor, slot = self._table._serve_request(request, kind, zero)
        long_way = self._table.long_way or self._table.open_scopes
        self._slot = slot if slot is not None and slot.is_slot and not long_way else NO_SLOT
        return tensor
