"""Peers of `benchmarks.gpu`, by name: torch's SDPA as it chooses, the same pinned to cuDNN, and the two styles of dilated attention."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers.flex_permuted import flex_permuted_attention
from benchmarks.peers.torchscale_style import torchscale_style_attention
from longattn.patterncache import Dilated, Full, Pattern


def peer_forward(name: str, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Callable[[], Tensor] | None:
    """The forward of a peer over (batch, seq, heads, head_dim); None: no peer of that name for this pattern.

    The call raises RuntimeError, with torch's reason, where cuDNN or FlexAttention does not serve these tensors.
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
