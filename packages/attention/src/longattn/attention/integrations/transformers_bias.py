"""T5's relative attention bias without a dense table: the bucket table itself goes from layer to layer, and each reads it by position.

A layer of the T5 family makes its bias once and hands it to the others as `position_bias`. `use_pattern` gives such a layer a `compute_bias`
that returns its bucket table, (num_buckets, heads), instead of (1, heads, Nq, Nk) numbers; our attention function knows it by its two axes.
A layer gets one where its own bias was compared with ours and is the same at every distance, and where its code hands the bias on as it is.
"""

from __future__ import annotations

import inspect
import re
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from longattn.attention.integrations import transformers_saved as saved
from longattn.kernels import RelativeBias
from longattn.kernels.interface import at_distances, by_distance_of

_CHANGED = re.compile(r"position_bias\s*[\[+*]|[+*]\s*position_bias")


def compute_bias(self: Any, *args: Any, **options: Any) -> Tensor:
    """A layer's bucket table while the model has a pattern; under another implementation the layer's own dense bias."""
    if self.config._attn_implementation == saved.IMPLEMENTATION:
        return self.relative_attention_bias.weight
    return self.__class__.compute_bias(self, *args, **options)


def declare_bias(layer: torch.nn.Module) -> None:
    """Let a layer hand on its bucket table, where that says all that its own bias does; else leave it as it is."""
    if "compute_bias" not in vars(layer) and _is_declared(layer):
        layer.compute_bias = MethodType(compute_bias, layer)  # type: ignore[assignment]


def withdraw_bias(layer: torch.nn.Module) -> None:
    """Undo `declare_bias`."""
    vars(layer).pop("compute_bias", None)


def relative_bias(module: Any, table: Tensor) -> RelativeBias:
    """The score term of a layer for a bucket table that it was handed."""
    return RelativeBias(table, not module.is_decoder, module.relative_attention_max_distance)


def dense_bias(term: RelativeBias, q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """(1, heads, Nq, Nk) of a term at positions that only the mask knows."""
    by_distance = by_distance_of((term,), term.table.dtype)
    assert by_distance is not None
    return at_distances(by_distance, k_positions[None] - q_positions[:, None]).unsqueeze(0)


def _is_declared(layer: Any) -> bool:
    names = ("compute_bias", "relative_attention_bias", "relative_attention_max_distance", "is_decoder", "config")
    if not all(hasattr(layer, name) for name in names):
        return False
    table, most = layer.relative_attention_bias.weight, layer.relative_attention_max_distance
    if table.device.type == "meta" or not hasattr(layer.config, "_attn_implementation"):
        return False
    try:
        source = inspect.getsource(layer.__class__.forward)
        term = relative_bias(layer, table.detach())
    except (OSError, ValueError):
        return False  # code without a source; buckets that are no T5's
    if _CHANGED.search(source):
        return False
    length = most + 8
    with torch.no_grad():
        own = layer.compute_bias(length, length, device=table.device)
        rows = torch.arange(length, device=table.device)
        return own.dim() == 4 and torch.equal(own, dense_bias(term, rows, rows).to(own.dtype))
