"""FlexAttention on a causal window: a block mask of 128, compiled where tensors are many; mask and compilation are not timed."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from benchmarks.peers.flex_permuted import attend


@lru_cache(maxsize=2)
def _blocks(length: int, size: int, device: torch.device) -> BlockMask:
    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < size)

    return create_block_mask(mask, None, None, length, length, device=str(device))


def flex_window_attention(q: Tensor, k: Tensor, v: Tensor, *, size: int) -> Tensor:
    """Softmax attention to the last `size` keys; forward only on CPUs.

    Args:
        q, k, v: (batch, seq, heads, head_dim).
        size: width of the window.

    Returns:
        (batch, seq, heads, head_dim), the dtype of q.
    """
    length = q.shape[1]
    call = attend(length)
    return call(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=_blocks(length, size, q.device)).transpose(1, 2)
