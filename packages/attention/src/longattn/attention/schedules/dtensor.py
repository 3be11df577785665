"""DTensors sharded on the sequence: each rank's part is attended under a ring over that dimension of their mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from longattn.attention.schedules.ring import Ring

Attention = Callable[..., tuple[Tensor, Tensor]]
"""(q, k, v, **options) to (out, lse)."""


def sharded_attention(whole: Attention, q: Any, k: Any, v: Any, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """out and lse as DTensors placed as q, differentiable. Masks in `options` are plain tensors: this rank's part, as for a `Ring`.

    Args:
        whole: attends to this rank's part.
        q, k, v: DTensors with equal placements: the sequence sharded over at most one mesh dimension, the batch over any others.
        options: of `pattern_attention`; a schedule of None is a contiguous Ring over the mesh dimension of the sequence, or Local().

    Raises:
        TypeError, ValueError: not all DTensors, other placements, or different ones, by name.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, DTensor):
            raise TypeError(f"{name} must be a DTensor where another of q, k and v is one, got {type(x).__name__}")
        if x.placements != q.placements or x.device_mesh != q.device_mesh:
            raise ValueError(f"{name} must have the placements of q, {q.placements}, got {x.placements}")
    along = _sequence_dimension(q)
    if options["schedule"] is None and along is not None:
        options = options | {"schedule": _ring_over(q, k, along)}
    out, lse = whole(q.to_local(), k.to_local(), v.to_local(), **options)
    return _placed(out, q, q.shape), _placed(lse, q, q.shape[:3])


def _sequence_dimension(q: DTensor) -> int | None:
    """The mesh dimension over which the sequence is sharded, or None."""
    found = None
    for dimension, placement in enumerate(q.placements):
        if placement == Shard(1) and found is None:
            found = dimension
        elif placement not in (Replicate(), Shard(0)):
            raise ValueError(
                f"q must have its sequence sharded over one mesh dimension at most, and its batch over others, got {q.placements}"
            )
    return found


def _ring_over(q: DTensor, k: DTensor, along: int) -> Ring:
    mesh = q.device_mesh
    lengths = None
    if q.shape[1] == k.shape[1]:
        # DTensor cuts as torch.chunk does: equal chunks, rounded up, and what is left.
        chunk = -(-q.shape[1] // mesh.size(along))
        lengths = [max(0, min(chunk, q.shape[1] - chunk * rank)) for rank in range(mesh.size(along))]
    return Ring(mesh.get_group(along), lengths=lengths)


def _placed(x: Tensor, like: DTensor, shape: Any) -> Tensor:
    stride = [1]
    for size in reversed(shape[1:]):
        stride.insert(0, stride[0] * size)
    return DTensor.from_local(
        x, like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
    )
