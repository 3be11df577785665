"""Poisoned memory, for tests: floating memory that is read before it is written holds NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor


@contextmanager  # pyright: ignore[reportDeprecated]
def poisoned_memory() -> Iterator[None]:
    """Inside this context torch.empty and its relatives return NaN, so that a read before the first write shows in the result."""
    names = {torch: ("empty", "empty_like", "empty_strided"), torch.Tensor: ("new_empty", "new_empty_strided")}
    originals = [(owner, name, getattr(owner, name)) for owner in names for name in names[owner]]
    for owner, name, allocate in originals:
        setattr(owner, name, _poisoned(allocate))
    try:
        yield
    finally:
        for owner, name, allocate in originals:
            setattr(owner, name, allocate)


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(allocate)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        fresh = allocate(*args, **kwargs)
        return (
            fresh.detach().fill_(torch.nan).requires_grad_(fresh.requires_grad) if fresh.is_floating_point() else fresh
        )

    return call
