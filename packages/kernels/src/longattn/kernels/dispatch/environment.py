"""Where a call finds its plans and its memory: a (cache, allocator) pair under a name.

The op can carry neither object, so it carries a name. '' is the global pattern cache and plain torch. Names are weak: an environment
lives as long as the module that holds it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from longattn.patterncache import Plan, Rectangle, Span, get_global_pattern_cache, parse_pattern
from longattn.patterncache.spans import shortened

T = TypeVar("T")


class ScratchAllocator(Protocol):
    """Who owns scratch and outputs. `longattn.bufmgr`'s manager and global pool are two."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, role: str) -> Tensor:
        """A contiguous tensor with any content. `role` is what it is for: "output", "scores", "temp", ..."""
        ...

    def release(self, tensor: Tensor, role: str) -> None:
        """Hand back a tensor of `empty` that nobody else sees."""
        ...


class PlanCache(Protocol):
    """Who keeps plans: a `PatternCache`, or a view of one."""

    def get_or_build(self, key: Hashable, build: Callable[[], T]) -> T:
        """The value of `key`, built where it is missing."""
        ...


class TorchAllocator:
    """Plain torch: torch.empty, and nothing to hand back."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, role: str) -> Tensor:
        """torch.empty."""
        # torch takes shape, dtype and device from a tensor in two thirds of the time that arguments take.
        key = (tuple(shape), dtype, device)
        like = _LIKE.get(key)
        if like is None:
            if device.type != "cpu" or math.prod(shape) < 2:
                return torch.empty(shape, dtype=dtype, device=device)
            if len(_LIKE) >= _MOST_LIKE:
                _LIKE.clear()
            with torch.inference_mode(False):
                like = _LIKE[key] = torch.empty((), dtype=dtype, device=device).expand(key[0])
        return torch.empty_like(like)

    def release(self, tensor: Tensor, role: str) -> None:
        """Nothing: the tensor dies with its last reference."""


_MOST_LIKE = 1024
_LIKE: dict[tuple[tuple[int, ...], torch.dtype, torch.device], Tensor] = {}
"""Tensors of one number, expanded to a shape, by (shape, dtype, device)."""


class Environment:
    """A pair under a name of its own, for as long as somebody holds this object.

    Args:
        cache: default the global pattern cache.
        allocator: default plain torch.
    """

    def __init__(self, cache: PlanCache | None = None, allocator: ScratchAllocator | None = None) -> None:
        self.cache: PlanCache = get_global_pattern_cache() if cache is None else cache
        self.allocator: ScratchAllocator = TorchAllocator() if allocator is None else allocator
        self.name = f"environment {next(_COUNTER)}"
        _ENVIRONMENTS[self.name] = self

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy, also one in another process, has a name of its own.
        return Environment, (self.cache, self.allocator)


_COUNTER = itertools.count(1)
_ENVIRONMENTS: WeakValueDictionary[str, Environment] = WeakValueDictionary()
DEFAULT_ENVIRONMENT = Environment()
"""The global pattern cache and plain torch, under the name ''."""


def find_environment(name: str, *, may_be_gone: bool = False) -> Environment:
    """The environment of that name; '' is the default one.

    Args:
        may_be_gone: take the default one where nobody holds that name any more. A backward may come after its module is gone.

    Raises:
        ValueError: nobody holds an environment of that name any more.
    """
    if not name:
        return DEFAULT_ENVIRONMENT
    environment = _ENVIRONMENTS.get(name)
    if environment is not None:
        return environment
    if may_be_gone:
        return DEFAULT_ENVIRONMENT
    raise ValueError(f"env must name a living environment, got {shortened(name)}: the module that held it is gone")


def find_plan_of(key: tuple[Any, ...], environment: Environment) -> Plan:
    """The plan under a `plan_key`, from the environment's cache."""
    return environment.cache.get_or_build(key, lambda: _build_plan(*key))


def _build_plan(pattern: str, q_spans: tuple[int, ...], k_spans: tuple[int, ...], heads: tuple[int, ...]) -> Plan:
    queries, keys = (tuple(Span(*flat[i : i + 3]) for i in range(0, len(flat), 3)) for flat in (q_spans, k_spans))
    return parse_pattern(pattern).plan(Rectangle(heads[0], queries, keys, Span(*heads[1:])))
