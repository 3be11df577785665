"""Dilated attention one operation at a time, every intermediate result in a tensor of its own: how the seeds' modules work.

    for each branch, which owns one contiguous group of the heads, and each of its segments:
    gather     the segment's rows `offset::rate` of q, k and v, one copy each
    scores     q k^T into a tensor of scores, scaled in place
    weights    softmax into another
    attend     weights v into a third
    scatter    copy into the zero-filled output

The result is `Dilated(..., heads="split")`. Lengths that vary make all of these tensors vary; `empty` says where they
come from, and dropping them is all that gives them back.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

Empty = Callable[[Sequence[int], torch.dtype, torch.device, str], Tensor]
"""shape, dtype, device and role (query, key, value, scores, weights, temp, output) to an uninitialised tensor."""


def from_torch(shape: Sequence[int], dtype: torch.dtype, device: torch.device, role: str) -> Tensor:
    """torch.empty, whatever the role."""
    return torch.empty(shape, dtype=dtype, device=device)


def op_for_op_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    empty: Empty = from_torch,
) -> Tensor:
    """Split-heads dilated attention, forward only.

    Args:
        q, k, v: (batch, seq, heads, head_dim).
        segment_lengths: one length per branch, in positions; the last segment may be short.
        dilation_rates: one rate per branch.
        empty: where temporaries and the output come from. Default torch.empty.

    Returns:
        (batch, seq, heads, head_dim) in the dtype of q; a position that a head's branch does not select is zero.
    """
    seq, num_heads = q.shape[1:3]
    branches = len(dilation_rates)
    sizes = [num_heads // branches + (i < num_heads % branches) for i in range(branches)]
    ends = list(accumulate(sizes))
    out = empty(tuple(q.shape), q.dtype, q.device, "output").zero_()
    for i, (segment, rate) in enumerate(zip(segment_lengths, dilation_rates, strict=True)):
        heads = slice(ends[i] - sizes[i], ends[i])
        for start in range(0, seq, segment):
            rows = slice(start + i % rate, min(start + segment, seq), rate)
            if rows.start < rows.stop:
                qs, ks, vs = (x[:, rows, heads].transpose(1, 2) for x in (q, k, v))
                out[:, rows, heads] = _segment(qs, ks, vs, empty).unflatten(0, qs.shape[:2]).transpose(1, 2)
    return out


def _segment(q: Tensor, k: Tensor, v: Tensor, empty: Empty) -> Tensor:
    """One segment of one branch: (batch, heads, rows, head_dim) to (batch * heads, rows, head_dim)."""
    batch, heads, rows, head_dim = q.shape

    def make(role: str, *shape: int) -> Tensor:
        return empty((batch * heads, *shape), q.dtype, q.device, role)

    def gathered(x: Tensor, role: str) -> Tensor:
        copy = make(role, rows, head_dim)
        copy.view(x.shape).copy_(x)
        return copy

    scores = torch.bmm(gathered(q, "query"), gathered(k, "key").mT, out=make("scores", rows, rows))
    weights = torch.softmax(scores.mul_(head_dim**-0.5), -1, out=make("weights", rows, rows))
    return torch.bmm(weights, gathered(v, "value"), out=make("temp", rows, head_dim))
