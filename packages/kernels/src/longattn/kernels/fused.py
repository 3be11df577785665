"""`fused_attention`: dense attention in the (batch, heads, seq, head_dim) layout of the Triton tutorial."""

from __future__ import annotations

from torch import Tensor

from longattn.kernels.check import check_flag, check_qkv, check_scale
from longattn.kernels.entry import attend, autocast
from longattn.patterncache import Full

_FULL, _CAUSAL = Full(), Full(causal=True)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, sm_scale: float | None = None) -> Tensor:
    """softmax(sm_scale * q k^T) v, without the scores ever standing in memory whole.

    Args:
        q: (batch, heads, Nq, head_dim). k, v: (batch, kv_heads, Nk, head_dim), kv_heads dividing heads; v may have its own head_dim.
        causal: query i of Nq sees keys up to i + Nk - Nq (bottom-right). Default False.
        sm_scale: default head_dim ** -0.5.

    Returns:
        (batch, heads, Nq, v's head_dim) in q's dtype, a view of (batch, Nq, heads, head_dim) memory.

    Raises:
        TypeError, ValueError: a bad argument, by name; shapes are named in the (batch, seq, heads, head_dim) order of `attend`.
    """
    if check_flag("causal", causal) is None:
        raise TypeError("causal must be True or False, got None")
    check_scale(sm_scale, "sm_scale")
    q, k, v = (x.transpose(1, 2) if isinstance(x, Tensor) and x.dim() == 4 else x for x in (q, k, v))  # pyright: ignore[reportUnnecessaryIsInstance]
    q, k, v = autocast(q, k, v)
    whole = isinstance(q, Tensor) and isinstance(k, Tensor) and q.dim() == k.dim() == 4  # pyright: ignore[reportUnnecessaryIsInstance]
    if causal and whole and q.shape[1] > k.shape[1]:
        check_qkv(q, k, v)
        raise ValueError(
            f"causal must be False where queries outnumber keys, got Nq={q.shape[1]}, Nk={k.shape[1]}: "
            "longattn.kernels.attend takes q_spans, which say where such queries stand"
        )
    dtype = q.dtype if isinstance(q, Tensor) else None  # pyright: ignore[reportUnnecessaryIsInstance]
    return attend(q, k, v, _CAUSAL if causal else _FULL, softmax_scale=sm_scale, out_dtype=dtype).out.transpose(1, 2)
