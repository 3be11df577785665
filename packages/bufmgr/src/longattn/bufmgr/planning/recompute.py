"""Keeps no activation that one cheap operation makes again from a tensor which is kept in any case.

GELU, SiLU and layer norm need their input in their backward, so autograd keeps it; their output is kept, too, because the next
operation needs it as an input. Inside `Recompute` such an output is not kept. Backward makes it again by the same operation
from the same input, so gradients have the same bits. This is activation recomputation of single operations, as in Korthikanti et
al., "Reducing Activation Recomputation in Large Transformer Models", 2022, arXiv 2205.05198, where whole parts are chosen.
"""

# Versions of tensors and addresses of storages have private names in torch.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from longattn.bufmgr.planning.recording import storages

_CHEAP = frozenset({torch.ops.aten.gelu.default, torch.ops.aten.silu.default, torch.ops.aten.native_layer_norm.default})
"""Deterministic operations whose backward keeps their first input, and whose first result has no other source."""


@dataclass(frozen=True)
class _Kept:
    """A tensor and the version that it had."""

    tensor: torch.Tensor
    version: int

    def value(self) -> torch.Tensor:
        """Return the tensor. Raises RuntimeError if it was changed in place meanwhile, as autograd does."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a tensor of shape {tuple(self.tensor.shape)} is at version {self.tensor._version}, expected {self.version}"
            )
        return self.tensor


@dataclass(frozen=True)
class _Recipe:
    """How to make one result again: an operation and its arguments, tensors among them as `_Kept` or as recipes."""

    operation: Callable[..., Any]
    arguments: Any

    def value(self) -> torch.Tensor:
        """Make it."""
        args, kwargs = tree_map(_value, self.arguments)
        return self.operation(*args, **kwargs)[0] if _has_several(self.operation) else self.operation(*args, **kwargs)


def _value(leaf: Any) -> Any:
    return leaf.value() if isinstance(leaf, (_Kept, _Recipe)) else leaf


@dataclass(frozen=True)
class _View:
    """A view of a result that is made again."""

    recipe: _Recipe
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def value(self) -> torch.Tensor:
        """Make the result, and the view of it."""
        return self.recipe.value().as_strided(self.size, self.stride, self.offset)


class Recompute:
    """A context for a forward pass; its backward may run inside or outside.

    recomputed: how many kept tensors were replaced by recipes so far.
    """

    def __init__(self) -> None:
        self.recomputed = 0
        self._watch = _Watch()
        self._stack = ExitStack()

    def __enter__(self) -> Recompute:
        self._stack.enter_context(self._watch)
        self._stack.enter_context(saved_tensors_hooks(self._pack, _unpack))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _View:
        recipe = self._watch.recipe_of(tensor)
        if recipe is None:
            return tensor
        self.recomputed += 1
        return _View(recipe, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def _unpack(kept: torch.Tensor | _View) -> torch.Tensor:
    if isinstance(kept, torch.Tensor):
        return kept
    with torch.no_grad():
        return kept.value()


class _Watch(TorchDispatchMode):
    """Remembers, as long as the result of a cheap operation lives, how it was made."""

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self._recipes: dict[int, tuple[_Recipe, int, torch.dtype]] = {}  # address of the result's storage

    def recipe_of(self, tensor: torch.Tensor) -> _Recipe | None:
        """Return how the tensor's memory was made, or None if not here, or if it was changed in place since."""
        if tensor.layout is not torch.strided:
            return None
        recipe, version, dtype = self._recipes.get(_address(tensor), (None, 0, None))
        return recipe if (tensor._version, tensor.dtype) == (version, dtype) else None

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operation; if it is a cheap one, remember it."""
        result = func(*args, **(kwargs or {}))
        if func in _CHEAP:
            made = result[0] if _has_several(func) else result
            if made.is_contiguous() and made.numel():
                self._remember(made, _Recipe(func, tree_map(self._keep, (tuple(args), dict(kwargs or {})))))
        return result

    def _keep(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return self.recipe_of(leaf) or _Kept(leaf, leaf._version)

    def _remember(self, made: torch.Tensor, recipe: _Recipe) -> None:
        address, storage = _address(made), made.untyped_storage()
        self._recipes[address] = (recipe, made._version, made.dtype)
        weakref.finalize(storage, self._recipes.pop, address, None).atexit = False


def _address(tensor: torch.Tensor) -> int:
    return next(storages(tensor))._cdata


def _has_several(operation: Callable[..., Any]) -> bool:
    return operation is torch.ops.aten.native_layer_norm.default
