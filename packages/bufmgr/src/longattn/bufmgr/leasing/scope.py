"""Scopes: a buffer that was allocated inside is given back at the end, unless something else references it."""

# A scope releases through its manager's own book.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import sys
import weakref
from contextvars import ContextVar, Token
from types import TracebackType

import torch

from longattn.bufmgr.checks import check_kind, describe
from longattn.bufmgr.leasing.lease import Lease
from longattn.bufmgr.leasing.slots import SlotTable

_OPEN: ContextVar[tuple[BufferScope, ...]] = ContextVar("longattn.bufmgr open scopes", default=())


class BufferScope:
    """Deallocates at its end what was allocated inside, also when an exception ends it::

        with manager.scope() as scope:
            scores = manager.allocate(BufferType.SCORES, (8, 128, 128))
            out = scope.keep(manager.allocate(BufferType.OUTPUT, (128, 64)))
        # scores is empty now, out is not

    The rules are those of `deallocate`: a handle that one name references is emptied. A buffer that a view, a second name, a
    numpy array or autograd references is left alone, and returns when the last of them dies. Scopes nest; a buffer belongs
    to its manager's innermost scope in the thread (or asyncio task) that opened it.
    """

    def __init__(self, table: SlotTable) -> None:
        self._table = table
        self._entries: list[tuple[weakref.ref[torch.Tensor], Lease]] = []
        self._token: Token[tuple[BufferScope, ...]] | None = None

    def __reduce__(self) -> tuple[type[BufferScope], tuple[SlotTable]]:
        if self._token is not None:
            raise TypeError("scope must be closed to be copied, got an open one")
        return type(self), (self._table,)

    def __enter__(self) -> BufferScope:
        if self._token is not None:
            raise RuntimeError("scope must be closed to be opened, got an open one")
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
        check_kind("tensor", tensor, torch.Tensor, "a buffer of this scope")
        raise ValueError(f"tensor must be a buffer of this scope, got {describe(tensor)}")

    def add(self, tensor: torch.Tensor, lease: Lease) -> None:
        """Add a new buffer to the scope."""
        self._entries.append((weakref.ref(tensor), lease))


def innermost_scope(table: SlotTable) -> BufferScope | None:
    """Return the innermost open scope of this thread or task over a manager."""
    return next((scope for scope in reversed(_OPEN.get()) if scope._table is table), None)
