"""Records which operation makes each tensor's memory, and when nothing references it any more."""

# The address of a storage has a private name in torch.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longattn.bufmgr.planning.lifetimes import Lifetime


class LifetimeRecorder(TorchDispatchMode):
    """A context that sees every operation below autograd, with real tensors or fake ones.

    Memory that an operation takes and gives back inside itself is not seen, nor is what was there before. The end of a
    tensor is its storage's: the moment at which Python's and torch's own reference counts free it.
    """

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self._step = 0
        self._made: list[tuple[int, int, str]] = []  # nbytes, step, name
        self._ends: dict[int, int] = {}  # number -> step
        self._numbers: dict[int, int] = {}  # address of a living storage -> number

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operation and note the storages that are new afterwards."""
        self._step += 1
        given = {storage._cdata for storage in storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in storages(result):
            address = storage._cdata
            if address in given or address in self._numbers or not storage.nbytes():
                continue
            number = len(self._made)
            self._made.append((storage.nbytes(), self._step, str(func)))
            self._numbers[address] = number
            weakref.finalize(storage, self._note_end, number, address).atexit = False
        return result

    @property
    def operations(self) -> int:
        """How many operations there were so far; lifetimes are told in their numbers, from 1."""
        return self._step

    def _note_end(self, number: int, address: int) -> None:
        self._ends[number] = self._step
        if self._numbers.get(address) == number:
            del self._numbers[address]

    def lifetimes(self) -> list[Lifetime]:
        """Return what was recorded; what lives on lives until the last operation."""
        return [
            Lifetime(nbytes, first, self._ends.get(number, self._step), name)
            for number, (nbytes, first, name) in enumerate(self._made)
        ]


def storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of the tensors in a nest of containers."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            try:
                yield leaf.untyped_storage()
            except (RuntimeError, NotImplementedError):  # a sparse tensor has none
                continue
