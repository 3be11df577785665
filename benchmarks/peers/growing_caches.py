"""Peers of decode that keep keys and values in tensors which grow: torch.cat, and transformers' DynamicCache."""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Step = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v of one token, (batch, 1, heads, head_dim), to its output."""


def cat_growth(k: Tensor, v: Tensor) -> Step:
    """torch.cat at every step, then torch's attention over everything; begins with k and v (batch, n, heads, head_dim)."""
    cache = [x.transpose(1, 2).contiguous() for x in (k, v)]

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (torch.cat((old, new.transpose(1, 2)), 2) for old, new in zip(cache, (k, v), strict=True))
        cache[:] = keys, values
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values).transpose(1, 2)

    return step


def dynamic_cache(k: Tensor, v: Tensor) -> Step:
    """transformers' DynamicCache as a model's layer uses it, then torch's attention."""
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(k.transpose(1, 2), v.transpose(1, 2), 0)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache.update(k.transpose(1, 2), v.transpose(1, 2), 0)
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values).transpose(1, 2)

    return step


def installed() -> dict[str, Callable[[Tensor, Tensor], Step]]:
    """The peers that this environment has, by name."""
    caches = {"torch.cat": cat_growth}
    if importlib.util.find_spec("transformers") is not None:
        caches["DynamicCache"] = dynamic_cache
    return caches
