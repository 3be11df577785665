"""FlexAttention on residue-permuted tokens: its best form for dilated attention.

In natural order a dilated branch touches every block of the mask, so blocks of it cost as if it were dense. Sorted by residue, for each
head, the rows of a branch lie together and its tiles are dense blocks; how often a key counts becomes a score modification. The
permutation is a gather of q, k and v and a scatter of the result, and is timed; masks and compilation are not.

Only for `heads="shared"`, whose offset is head % rate, and lengths that the longest segment divides. FlexAttention has no backward on CPUs.
Compiled where tensors are many; a few hundred tokens are not worth a compiler's minute.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Prepared = tuple[Tensor, Any, Callable[..., Tensor]]


_WORTH_COMPILING = 1024
_MOST_FORMS = 64
"""Lengths, dtypes and masks that one process compiles FlexAttention for."""


@lru_cache
def attend(length: int) -> Callable[..., Tensor]:
    """FlexAttention for sequences of that length. Where torch would stop compiling it anew, and run its slow form, it raises."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_FORMS)
    return (
        torch.compile(flex_attention, dynamic=False, fullgraph=True) if length >= _WORTH_COMPILING else flex_attention
    )  # type: ignore[return-value]


@lru_cache(maxsize=2)
def _prepare(
    length: int, heads: int, segments: tuple[int, ...], rates: tuple[int, ...], causal: bool, device: torch.device
) -> Prepared:
    """(order (heads, length), block mask, score modification)."""
    shortest, position = min(segments), torch.arange(length, device=device)

    def rank(h: int) -> Tensor:
        # Within each shortest segment: first the rows that most branches hold, residue by residue.
        branches = torch.stack([(position - h) % r == 0 for r in rates]).sum(0)
        residue = (position - h) % max(rates)
        return (position // shortest * (len(rates) + 1) + len(rates) - branches) * max(rates) + residue

    order = torch.stack([torch.argsort(rank(h), stable=True) for h in range(heads)])

    def times(h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        total = torch.zeros_like(i + j)
        for s, r in zip(segments, rates, strict=True):
            seen = (i // s == j // s) & (i % r == h % r) & (j % r == h % r)
            total = total + (seen & ((j <= i) | (not causal)))
        return total

    def mask(b: Tensor, h: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return times(h, order[h, x], order[h, y]) > 0

    def score(value: Tensor, b: Tensor, h: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return value + times(h, order[h, x], order[h, y]).clamp(min=1).log()

    return order, _blocks(mask, heads, length, device), score


def _blocks(mask: Callable[..., Tensor], heads: int, length: int, device: torch.device) -> BlockMask:
    """The block mask, head by head: its making goes through every pair, and all heads at once do not fit."""

    def of(head: int) -> BlockMask:
        only = torch.tensor(head, device=device)
        return create_block_mask(
            lambda b, h, x, y: mask(b, only, x, y), None, None, length, length, device=str(device), BLOCK_SIZE=128
        )

    of_heads = [of(head) for head in range(heads)]
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    parts = (torch.cat([getattr(one, name) for one in of_heads], 1) for name in names)
    return BlockMask.from_kv_blocks(*parts, BLOCK_SIZE=128, mask_mod=mask, seq_lengths=(length, length))


def flex_permuted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    causal: bool = False,
) -> Tensor:
    """Dilated attention by FlexAttention on permuted tokens.

    Args:
        q, k, v: (batch, seq, heads, head_dim), one dtype, equal shapes.
        segment_lengths, dilation_rates: one of each per branch; each rate divides its segment, and each segment seq.
        causal: query i sees keys up to i. Default False.

    Returns:
        (batch, seq, heads, head_dim) in the dtype of q.
    """
    _, length, heads, _ = q.shape
    order, blocks, score = _prepare(length, heads, tuple(segment_lengths), tuple(dilation_rates), causal, q.device)
    index = order.T[None, :, :, None].expand_as(q)
    mine = [x.gather(1, index).transpose(1, 2) for x in (q, k, v)]
    out = attend(length)(*mine, score_mod=score, block_mask=blocks).transpose(1, 2)
    return torch.empty_like(q).scatter_(1, index, out)
