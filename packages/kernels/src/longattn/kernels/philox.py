"""Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), in torch integer operations.

Dropout's mask is a function of (seed, batch, head, query, key) alone, so every row of the table, every schedule and rank, and backward
make the same one, tile by tile, without storing it. 64-bit products wrap, and their halves are taken by shift and mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longattn.patterncache.spans import shortened

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, seed: int) -> Words:
    """Four 32-bit words, in int64, for each counter of four broadcastable int64 tensors; key = the seed's low and high 32 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _WORD) ^ c1 ^ k0,
            second & _WORD,
            ((first >> 32) & _WORD) ^ c3 ^ k1,
            first & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def keep_scale(seed: int, p: float, batch: Tensor, head: Tensor, i: Tensor, j: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / (1 - p) where (batch, head, i, j) is kept, else 0; broadcast over int64 tensors, in `dtype`.

    counter = (j // 4, i, head, batch), lane j % 4, keep iff word >= floor(p * 2^32).
    """
    words = philox((j // 4, i, head, batch), seed)
    lane = j % 4
    word = torch.where(lane == 0, words[0], words[1])
    word = torch.where(lane == 2, words[2], word)
    word = torch.where(lane == 3, words[3], word)
    return (word >= int(p * 2**32)).to(dtype).mul_(1 / (1 - p))


def draw_seed() -> Tensor:
    """A 0-dim int64 seed on the CPU from torch's generator."""
    # Said, because torch.device may be a context of another device.
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")


def as_seed(seed: Tensor | int | None) -> Tensor:
    """A 0-dim int64 tensor on the CPU; None draws one from torch's generator."""
    if seed is None:
        return draw_seed()
    if isinstance(seed, bool) or not isinstance(seed, (int, Tensor)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"seed must be None, an integer or a 0-dim int64 tensor, got {shortened(seed)} ({type(seed).__name__})"
        )
    if isinstance(seed, int) and not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit 64 bits, -2^63 <= seed < 2^63, got {shortened(seed)}")
    if isinstance(seed, Tensor) and (seed.dim() or seed.dtype != torch.int64 or seed.device.type != "cpu"):
        raise ValueError(
            f"seed must be a 0-dim int64 tensor on the CPU, got shape {tuple(seed.shape)}, {seed.dtype}, on {seed.device}"
        )
    return torch.as_tensor(seed, dtype=torch.int64, device="cpu")
