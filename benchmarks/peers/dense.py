"""Dense attention through torch's own `scaled_dot_product_attention`: every query sees every (earlier) key."""

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """Softmax attention over the whole sequence, differentiable.

    Args:
        q: (batch, seq, heads, head_dim), any floating dtype that SDPA takes on that device.
        k, v: as q.
        causal: whether query i sees only keys up to i. Default False.

    Returns:
        (batch, seq, heads, head_dim), the dtype of q; a transposed view of what SDPA stored, without a copy.
    """
    out: Tensor = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal
    )
    return out.transpose(1, 2)


def forward_flops(q: Tensor, causal: bool) -> float:
    """Floating point operations of the forward's two products: 4 N^2 D per head, half of it when causal."""
    batch, seq, heads, head_dim = q.shape
    return 4.0 * batch * heads * head_dim * seq * seq / (2 if causal else 1)


def flash_with_lse(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """One flash call that also returns its log-sum-exp, as flash-attention's own function does.

    Args:
        q, k, v: (batch, heads, seq, head_dim), possibly strided.
        causal: top-left causal mask.

    Returns:
        out (batch, heads, seq, head_dim) in the dtype of q, lse (batch, heads, seq) float32, natural log (float64 for
        float64 inputs). Only out carries a gradient; torch marks the lse as not differentiable.
    """
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    if q.dtype in (torch.float16, torch.bfloat16):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    else:
        # CUDA's flash kernels are half precision only; the memory-efficient one takes float32 and pads its lse.
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)
    return out, lse[..., : q.shape[-2]]
