"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), with angles in float64.

In float32 an angle at position 100,000 is off by up to 4e-3; the product position * frequency is made in float64, and only its sine and
cosine are rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longattn.kernels.interface import state_dtype


def rotary_angles(positions: Tensor, head_dim: int, base: float = 10000.0) -> Tensor:
    """position * base ** (-2 i / head_dim) for i in 0 .. head_dim / 2.

    Args:
        positions: integers of any shape.
        head_dim: even.
        base: default 10000.

    Returns:
        (*positions.shape, head_dim // 2), float64, on the positions' device (on the CPU where that has no float64).

    Raises:
        ValueError: head_dim is odd.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary positions, got {head_dim}")
    if positions.device.type == "mps":
        positions = positions.cpu()
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    return positions.to(torch.float64).unsqueeze(-1) * base**-exponents


def rotate(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """x with its halves (d, d + head_dim / 2) turned by the angle of its position, as Llama and GPT-NeoX pair them.

    Args:
        x: (batch, seq, heads, head_dim).
        positions: (seq,) or (batch, seq), integers.
        base: default 10000.

    Returns:
        The shape and dtype of x; computed in float32 (float64 for float64).
    """
    dtype = state_dtype(x.dtype)
    angles = rotary_angles(positions, x.shape[-1], base).unsqueeze(-2)
    cos, sin = (turn.to(x.device, dtype) for turn in (angles.cos(), angles.sin()))
    first, second = x.to(dtype).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
