"""The fast path to a buffer: a table of slots by request, and slots that are prepared beforehand.

A hit takes no lock, checks no argument again and records no lease. It looks up its key, makes a new handle over the slot's
memory and counts the owners of that memory, which must be the master and the handle. (lease.py says why that is enough, and
why two threads never both succeed.) Where the slot is in use, another slot for the same request may be free, and the key leads
there from then on. Everything else takes the slow path: active modes of torch, other forms of the arguments, slots that are all
in use, counts that cannot be trusted. Keys hold arguments as they came, so an equal value of another type
(2.0 or True in a shape) would match; the types are checked once for each shape object.
"""

# The table, its prepared slots and torch's compiling flag are read at every hit, where a property would cost a call.
# pyright: reportPrivateUsage=false

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


def traced_as(twin: Callable[..., Any]) -> Callable[[_Method], _Method]:
    """Make torch.compile trace `twin` instead of the decorated method, because a graph owns its memory.

    The mark is the one with which torch.jit marks its functions for Dynamo. Calling torch.compiler.is_dynamo_compiling() at
    every hit would take a tenth of its time. Other tracers set `torch.compiler._is_compiling_flag`.
    """

    def mark(method: _Method) -> _Method:
        method.__dict__["_torchdynamo_inline"] = twin
        return method

    return mark


def has_only_ints(shape: Sequence[int], slot: Lease) -> bool:
    """Return whether a shape that equals the slot's holds ints only; the slot then remembers the shape object."""
    if {*map(type, shape)} - _INTEGERS:
        return False
    slot.seen_shape = shape
    return True


class SlotTable:
    """Buffers over a book of leases, through the two methods that kernels use: `empty` and `release`.

    The life of a key: a key enters the table when a slot first serves its request. It leads to that slot or, after a request
    that met the slot in use, to another slot for the same request. It leaves the table when its slot is closed.
    slow_path_only: `_serve_request` must see every request, so there are no keys; the same holds while a scope is open.
    Default False.
    """

    def __init__(self, book: LeaseBook, *, slow_path_only: bool = False) -> None:
        self._book = book
        self._slots: dict[Hashable, Lease] = {}
        self.slow_path_only = slow_path_only
        self.open_scopes = 0
        self._prepared: weakref.WeakSet[PreparedSlot] = weakref.WeakSet()

    def _empty_in_graph(
        self, shape: Sequence[int], dtype: torch.dtype | None, device: Any = None, role: str = "temp"
    ) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def _release_in_graph(self, tensor: torch.Tensor, role: str = "temp") -> None:
        pass

    @traced_as(_empty_in_graph)
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
        key = (role, shape, get_default_dtype() if dtype is None else dtype, device)
        try:
            slot = self._slots[key]
        except (KeyError, TypeError):  # no such key; a list, or no shape at all, cannot be hashed
            pass
        else:
            # No device means the CPU as long as no device context is active.
            if (shape is slot.seen_shape or has_only_ints(shape, slot)) and (
                device is not None or not function_modes()
            ):
                handle = slot.master.data
                if slot.owners.value == TAKEN or slot.has_one_handle():
                    slot.handle_id = id(handle)
                    clock = slot.clock
                    clock.now = slot.used = clock.now + 1
                    return handle
                del handle  # or this thread would keep the slot in use while it looks for another
                sibling = self._take_sibling(slot, key)
                if sibling is not None:
                    return sibling
        return self._serve(parse_type(role, "role"), role, shape, dtype, device, False)

    @traced_as(_release_in_graph)
    def release(self, tensor: torch.Tensor, role: str = "temp") -> None:
        """Give back what `empty` returned for this role; the rules are those of AttentionBufferManager.deallocate."""
        if compiler._is_compiling_flag:
            return
        self._book.release(tensor, parse_type(role, "role"), getrefcount(tensor))

    def _take_sibling(self, slot: Lease, key: Hashable) -> torch.Tensor | None:
        """Return a handle of a slot for the same request as this one, which is in use; the key leads to that slot now."""
        found = slot.take_sibling()
        if found is None:
            return None
        handle, sibling = found
        self._book.counts[sibling.kind].slots_in_use += 1
        self._slots[key] = sibling
        if sibling.keys.get(key) is not self._slots:
            self._add_key(key, sibling)
        return handle

    def _serve(
        self,
        kind: BufferType,
        name: BufferType | str,
        shape: Sequence[int],
        dtype: torch.dtype | None,
        device: torch.device | str | int | None,
        zero: bool,
    ) -> torch.Tensor:
        """Serve a checked type on the slow path; `name` is the type as the caller gave it, for the key."""
        request = self._known_request(name, shape, dtype, device)
        self._book.count_slow_request(kind, slot_in_use=request is not None)
        if request is None:
            request = resolve_request(shape, dtype, device)
        tensor, slot = self._serve_request(request, kind, zero)
        if slot is not None and isinstance(shape, tuple) and device in _CPU_FORMS:
            self._add_key((name, shape, slot.request.dtype, device), slot)
        return tensor

    def _known_request(
        self, name: BufferType | str, shape: Sequence[int], dtype: torch.dtype | None, device: Any
    ) -> BufferRequest | None:
        """Return the checked request of a key whose slot is in use, so that it need not be checked again."""
        if not isinstance(shape, tuple) or (device is None and function_modes()):
            return None
        try:
            slot = self._slots.get((name, shape, get_default_dtype() if dtype is None else dtype, device))
        except TypeError:  # something in it cannot be hashed; the check says what
            return None
        if slot is None or {*map(type, shape)} - _INTEGERS:
            return None
        return slot.request

    def _serve_request(self, request: BufferRequest, kind: BufferType, zero: bool) -> tuple[torch.Tensor, Lease | None]:
        """Return a buffer, and its slot if a key may lead to that slot."""
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
        if self.slow_path_only or self.open_scopes:
            return
        slots = self._slots
        slots[key] = slot
        slot.keys[key] = slots
        if not slot.is_slot:  # it never was open, or another thread closed it between these lines
            slots.pop(key, None)

    def open_scope(self) -> None:
        """Make every request take the slow path until the scope is closed, so that the scope can note it."""
        self.open_scopes += 1
        self._slots = {}
        for prepared in list(self._prepared):
            prepared.forget()


class PreparedSlot:
    """Hands out buffers for one request; `AttentionBufferManager.prepare` makes it.

        slot = manager.prepare(BufferType.TEMP, (8, 128, 128), torch.float32)
        scratch = slot.acquire()

    `acquire` is `manager.allocate` of that request, checked beforehand: the same buffers under the same rules.
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
        """Take the slow path at the next `acquire`."""
        self._slot = NO_SLOT

    def _acquire_in_graph(self) -> torch.Tensor:
        request, _, zero = self._arguments
        make = torch.zeros if zero else torch.empty
        return make(request.shape, dtype=request.dtype, device=request.device)

    @traced_as(_acquire_in_graph)
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
        found = slot.take_sibling()
        if found is None:
            return self._acquire_slowly()
        handle, self._slot = found
        self._table._book.counts[self._slot.kind].slots_in_use += 1
        if self._zeroes:
            handle.zero_()
        return handle

    def _acquire_slowly(self) -> torch.Tensor:
        request, kind, zero = self._arguments
        self._table._book.count_slow_request(kind, slot_in_use=self._slot is not NO_SLOT)
        tensor, slot = self._table._serve_request(request, kind, zero)
        keeps_none = self._table.slow_path_only or self._table.open_scopes
        self._slot = slot if slot is not None and slot.is_slot and not keeps_none else NO_SLOT
        return tensor
