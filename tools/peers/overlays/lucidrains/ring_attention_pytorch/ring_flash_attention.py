"""The function that lucidrains' layers call for every attention, over our ring."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from longattn.attention import Local, Ring, pattern_attention
from longattn.kernels import Softcap
from longattn.patterncache import Full


def ring_flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    bucket_size: int = 1024,
    ring_reduce_col: bool = False,
    striped_ring_attn: bool = False,
    max_lookback_seq_len: int | None = None,
    ring_size: int | None = None,
    softclamp_qk_sim: bool = False,
    softclamp_value: float = 50.0,
) -> Tensor:
    """(batch, seq, heads, head_dim). Their groups of query heads take turns with the key heads; ours stand side by side."""
    k, v = (x.repeat(1, 1, q.shape[2] // x.shape[2], 1) for x in (k, v))
    layout = "striped" if striped_ring_attn else "contiguous"
    schedule = Ring(dist.group.WORLD, layout=layout) if ring_reduce_col and dist.is_initialized() else Local()
    terms = Softcap(softclamp_value) if softclamp_qk_sim else None
    hidden = None if mask is None else ~mask
    return pattern_attention(  # type: ignore[return-value]
        q, k, v, Full(causal=causal), key_padding_mask=hidden, score_terms=terms, schedule=schedule
    )
