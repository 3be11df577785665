"""In which order the axes of q, k and v stand: (batch, seq, heads, head_dim), or with `layout="bhnd"` (batch, heads, seq, head_dim)."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor

Layout = Literal["bnhd", "bhnd"]
"""n is the sequence, h the heads; torch's own attention has "bhnd"."""

LAYOUTS = ("bnhd", "bhnd")

MOST_HEADS = 128
"""No model has more heads than this; many sequences are longer."""

_warned = False


class LayoutWarning(UserWarning):
    """A tensor's axes look as if sequence and heads were exchanged. Given once in a process."""


def exchanged(x: Any) -> Any:
    """A view of a tensor with its axes 1 and 2 exchanged: of q, k, v and out, and of lse. What is no such tensor is itself, to be refused later."""
    return x.transpose(1, 2) if isinstance(x, Tensor) and x.dim() > 2 else x


def in_order(layout: object, *tensors: Any) -> tuple[Any, ...]:
    """The tensors as (batch, seq, heads, ...), as views.

    Raises:
        ValueError: layout is none of the two.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    return tensors if layout == "bnhd" else tuple(map(exchanged, tensors))


def warn_of_axes(name: str, x: Tensor, layout: str) -> None:
    """Warn, once in a process, where x has fewer positions than heads, and more heads than any model."""
    global _warned
    if _warned or layout != "bnhd" or torch.compiler.is_compiling():
        return
    length, heads = x.shape[1:3]
    if length < heads and length <= MOST_HEADS < heads:
        _warned = True
        warnings.warn(
            f"{name} has shape {tuple(x.shape)}, of which {length} is taken for the sequence and {heads} for the heads; if the heads come "
            f'first, say layout="bhnd", which takes and returns views (this is said once)',
            LayoutWarning,
            stacklevel=4,
        )
