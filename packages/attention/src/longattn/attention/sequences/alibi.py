"""ALiBi (Press et al. 2022, arXiv:2108.12409): its slopes, and, for who needs one, a dense bias.

`longattn.kernels.Alibi(alibi_slopes(heads).to(q))` as `score_terms` is the same without O(heads * Nq * Nk) memory, at any positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longattn.attention.validate import check_size


def alibi_slopes(num_heads: int) -> Tensor:
    """(num_heads,) float64: 2 ** (-8 h / H) for h = 1 .. H where H is a power of two; else as the paper's code goes on from there."""
    heads = check_size("num_heads", num_heads)
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * h / power) for h in range(1, power + 1)]
    # The next power's slopes, every second one.
    slopes += [2.0 ** (-4.0 * h / power) for h in range(1, 2 * (heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float64)


def alibi_bias(
    num_heads: int,
    query_length: int,
    key_length: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """-slope * |i - j|, to be given as `attention_mask`; queries are the last of the keys' positions.

    Args:
        num_heads, query_length: integers >= 1. key_length: default query_length.
        dtype: default torch's. Distances are exact in it before they are rounded once.
        device: default the current one.

    Returns:
        (1, num_heads, query_length, key_length).
    """
    nq = check_size("query_length", query_length)
    nk = nq if key_length is None else check_size("key_length", key_length)
    distance = (torch.arange(nk - nq, nk)[:, None] - torch.arange(nk)[None]).abs()
    bias = -alibi_slopes(num_heads)[:, None, None] * distance
    return bias[None].to(device=device, dtype=torch.get_default_dtype() if dtype is None else dtype)
