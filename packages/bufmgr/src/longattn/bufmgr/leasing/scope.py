"""Scopes: what was allocated inside is given back at the end, where nothing else saw it."""

from __future__ import annotations

import sys
import weakref
from contextvars import ContextVar, Token
from types import TracebackType

import torch

from longattn.bufmgr.leasing.lease import Lease
from longattn.bufmgr.leasing.slots import SlotTable
from longattn.bufmgr.request import describe

_OPEN: ContextVar[tuple[BufferScope, ...]] = ContextVar("longattn.bufmgr open scopes", default=())


class BufferScope:
    """Deallocates at its end what was allocated inside, also when an exception ends it.

        with manager.scope() as scope:
            scores = manager.allocate(BufferType.SCORES, (8, 128, 128))
            out = scope.keep(manager.allocate(BufferType.OUTPUT, (128, 64)))
        # scores is empty now, out is not

    The rule is that of `deallocate`: a handle that nothing but one name sees is emptied; what a view, a second name, a
    numpy array or autograd sees is not touched, and returns when the last of them dies. Scopes nest; a buffer belongs
    to the innermost one of its manager, in the thread (or asyncio task) that opened it.
    """

    def __init__(self, table: SlotTable) -> None:
        self._table = table
        self._entries: list[tuple[weakref.ref[torch.Tensor], Lease]] = []
        self._token: Token[tuple[BufferScope, ...]] | None = None

    def __reduce__(self) -> tuple[type[BufferScope], tuple[SlotTable]]:
        if self._token is not None:
            raise TypeError("scope: expected one that is not open, got an open one, which cannot be copied")
        return type(self), (self._table,)

    def __enter__(self) -> BufferScope:
        if self._token is not None:
            raise RuntimeError("scope: expected one that is not open, got one that is open already")
        self._token = _OPEN.set((*_OPEN.get(), self))
        self._table.open_scope()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._token is not None
        self._table.open_scopes -= 1
        _OPEN.reset(self._token)
        self._token = None
        while self._entries:
            reference, lease = self._entries.pop()
            tensor = reference()
            if tensor is not None and lease.handle_id == id(tensor):
                self._table._book.release(tensor, lease.kind, sys.getrefcount(tensor))

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Leave this buffer to the caller at the end; return it. Raises ValueError if it is not of this scope."""
        for index, (reference, _) in enumerate(self._entries):
            if reference() is tensor:
                del self._entries[index]
                return tensor
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"tensor: expected a buffer of this scope, got {tensor!r}")
        raise ValueError(f"tensor: expected a buffer of this scope, got {describe(tensor)}")

    def add(self, tensor: torch.Tensor, lease: Lease) -> None:
        """Note a new buffer."""
        self._entries.append((weakref.ref(tensor), lease))


def innermost_scope(table: SlotTable) -> BufferScope | None:
    """Return the innermost open scope of this thread or task over a manager."""
    return next((scope for scope in reversed(_OPEN.get()) if scope._table is table), None)
