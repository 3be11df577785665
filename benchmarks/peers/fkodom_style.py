"""Split-heads dilated attention: the sequence of tensor operations of fkodom's dilated-attention-pytorch.

The order and number of passes over memory follow fkodom/dilated-attention-pytorch,
`dilated_attention_pytorch/dilated_attention.py` (MIT); the code here is our own and needs no einops and no xformers:

    for each branch, which owns one contiguous group of the heads:
    slice      fold positions into segments, take rows `offset::rate` of the branch's heads, fold segments into the
               batch (a copy for each of q, k, v)
    attend     one call of memory-efficient attention; torch's SDPA stands in for xformers' operator here
    normalize  divide by the sum of the outputs over all selected positions
    scatter    add into a zero-filled tensor of full length
    and at the end divide by the number of branches.

Both divisions act on outputs, so its numbers are not attention: a sum near zero blows them up. They are timed, being
two of its passes, but `normalize=False` leaves them out, and then outputs and gradients are those of
`Dilated(..., heads="split")`: that is what the gate compares.

What differs otherwise. Where groups of heads differ in size, the original takes group i from `i * size`, so that some
heads are served twice and others never; here boundaries are a running sum: the same amount of work on every head once.
A segment longer than the text is the whole text, where the original raises.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


def fkodom_style_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    causal: bool = False,
    normalize: bool = True,
) -> Tensor:
    """Split-heads dilated attention by slicing and adding, forward and (through autograd) backward.

    Args:
        q, k, v: (batch, seq, heads, head_dim), one dtype, equal shapes.
        segment_lengths: one length per branch, in positions; each divides seq, or is longer.
        dilation_rates: one rate per branch.
        causal: query i sees keys up to i. Default False.
        normalize: divide by sums and by the number of branches, as the original. Default True.

    Returns:
        (batch, seq, heads, head_dim) in the dtype of q; a position that a head's branch does not select is zero.
    """
    batch, seq, num_heads, _ = q.shape
    branches = len(dilation_rates)
    sizes = [num_heads // branches + (i < num_heads % branches) for i in range(branches)]
    ends = list(accumulate(sizes))
    out = torch.zeros_like(q)
    for i, (segment, rate) in enumerate(zip(segment_lengths, dilation_rates, strict=True)):
        segment = min(segment, seq)
        rows, heads = slice(i % rate, None, rate), slice(ends[i] - sizes[i], ends[i])
        qi, ki, vi = (x.unflatten(1, (-1, segment))[:, :, rows, heads].flatten(0, 1) for x in (q, k, v))
        x = F.scaled_dot_product_attention(
            qi.transpose(1, 2), ki.transpose(1, 2), vi.transpose(1, 2), is_causal=causal
        ).transpose(1, 2)
        x = x.unflatten(0, (batch, -1))
        if normalize:
            x = x / x.sum(dim=(1, 2), keepdim=True)
        out = out.unflatten(1, (-1, segment))
        out[:, :, rows, heads].add_(x)
        out = out.flatten(1, 2)
    return out / branches if normalize else out
