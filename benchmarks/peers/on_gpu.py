"""Peers of `benchmarks.gpu`, by name.

torch's SDPA as it chooses ("dense") and pinned to cuDNN, FlashAttention 3 and 4 where their packages are importable ("fa3", "fa4"), compiled FlexAttention by
default and autotuned ("flex", "flex-max-autotune"), and the two styles of dilated attention.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.peers.flex_permuted import flex_permuted_attention
from benchmarks.peers.torchscale_style import torchscale_style_attention
from longattn.patterncache import Dilated, Full, Pattern

_FLASH = {"fa3": "flash_attn_interface", "fa4": "flash_attn.cute.interface"}


def _flash_attention(name: str, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """FlashAttention 3 or 4 from its own package, in our layout."""
    out = import_module(_FLASH[name]).flash_attn_func(q, k, v, causal=causal)
    return out[0] if isinstance(out, tuple) else out


@lru_cache
def _flex(name: str) -> Callable[..., Tensor]:
    options = {"mode": "max-autotune-no-cudagraphs"} if name == "flex-max-autotune" else {}
    return torch.compile(flex_attention, dynamic=False, **options)  # type: ignore[return-value]


def _causal_blocks(q: Tensor, pattern: Full) -> BlockMask | None:
    """FlexAttention's mask of blocks for causal attention; none where every pair is seen."""
    if not pattern.causal:
        return None
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[1], q.shape[1], device=str(q.device))


def peer_forward(name: str, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Callable[[], Tensor] | None:
    """The forward of a peer over (batch, seq, heads, head_dim); None: no peer of that name for this pattern.

    The call raises RuntimeError, with torch's reason, where a peer does not serve these tensors, or ImportError where it is not installed.
    """
    if name in ("dense", "cudnn") and isinstance(pattern, Full):

        def dense() -> Tensor:
            turned = [x.transpose(1, 2) for x in (q, k, v)]
            return F.scaled_dot_product_attention(turned[0], turned[1], turned[2], is_causal=pattern.causal).transpose(
                1, 2
            )

        def pinned() -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return dense()

        return dense if name == "dense" else pinned
    if name in _FLASH and isinstance(pattern, Full):
        return lambda: _flash_attention(name, q, k, v, pattern.causal)
    if name in ("flex", "flex-max-autotune") and isinstance(pattern, Full):
        return lambda: _flex(name)(
            *(x.transpose(1, 2) for x in (q, k, v)), block_mask=_causal_blocks(q, pattern)
        ).transpose(1, 2)
    if not isinstance(pattern, Dilated):
        return None
    styles: dict[str, Callable[..., Tensor]] = {
        "torchscale-style": torchscale_style_attention,
        "flex-permuted": flex_permuted_attention,
    }
    if name not in styles:
        return None
    branches = (pattern.segment_lengths, pattern.dilation_rates)
    return lambda: styles[name](q, k, v, *branches, causal=pattern.causal)
