"""In which order the axes of q, k and v stand: (batch, seq, heads, head_dim), or with `layout="bhnd"` (batch, heads, seq, head_dim)."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from longattn.patterncache.spans import shortened

Layout = Literal["bnhd", "bhnd"]
"""n is the sequence, h the heads; torch's own attention has "bhnd"."""

LAYOUTS = ("bnhd", "bhnd")


def exchanged(x: Any) -> Any:
    """A view of a tensor with its axes 1 and 2 exchanged: of q, k, v and out, and of lse. What is no such tensor is itself, to be refused later."""
    return x.transpose(1, 2) if isinstance(x, Tensor) and x.dim() > 2 else x


def in_order(layout: object, *tensors: Any) -> tuple[Any, ...]:
    """The tensors as (batch, seq, heads, ...), as views.

    Raises:
        ValueError: layout is none of the two.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {shortened(layout)}")
    return tensors if layout == "bnhd" else tuple(map(exchanged, tensors))
