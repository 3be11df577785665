"""Gather-and-scatter dilated attention: the sequence of tensor operations of torchscale's dilated attention.

The order and number of passes over memory follow microsoft/torchscale, `component/dilated_attention.py` (MIT); the
code here is our own and needs no einops:

    gather   pad to whole segments, fold segments into the batch, take the diagonal of (residue, head group),
             once for each of k, v, q and each branch
    attend   one flash call per branch, which also returns its lse
    scatter  place every branch into a zero-filled tensor of full length, its lse into one filled with -1e8
    merge    softmax of the stacked lse over branches, without gradient, then a weighted sum of full tensors

What differs, and why. The head assignment is an argument: `"blocks"` is torchscale's own (offset `h // ceil(H/r)`),
`"shared"` is ours (offset `h % r`); both need the same passes, and with `"shared"` outputs can be compared with
longattn's. A segment that does not divide by its rate is cropped after the scatter, where torchscale would shift
positions. Zero padding keys are kept as there: without a causal mask, at lengths that do not divide, padded rows are
seen as keys, so compare such lengths only under a causal mask.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.dense import flash_with_lse

HeadAssignment = Literal["shared", "blocks"]

# torchscale's stand-in for "this branch does not serve this position"; exp of it is an exact zero beside any real lse.
ABSENT = -1e8


def torchscale_style_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    causal: bool = False,
    heads: HeadAssignment = "shared",
    merge_grad: bool = False,
) -> Tensor:
    """Dilated attention by gathering and scattering, forward and (through autograd) backward.

    Args:
        q, k, v: (batch, seq, heads, head_dim), one dtype, equal shapes.
        segment_lengths: one length per branch, in positions.
        dilation_rates: one rate per branch.
        causal: query i sees keys up to i. Default False.
        heads: which residue a head takes in a branch of rate r: `"shared"` is `h % r`, `"blocks"` is torchscale's.
        merge_grad: torchscale computes the merge weights without gradient, so its dq and dk are not the gradients of
            its output. False (default) does as torchscale; True differentiates the weights too, with one column more
            per head, for comparing gradients and not for timing.

    Returns:
        (batch, seq, heads, head_dim) in the dtype of q. A position that no branch serves for a head is zero.
    """
    batch, seq, num_heads, head_dim = q.shape
    # As there: heads into the batch and back, which copies when there is more than one batch row.
    q, k, v = (
        x.transpose(1, 2).reshape(-1, seq, head_dim).unflatten(0, (batch, num_heads)).transpose(1, 2) for x in (q, k, v)
    )
    outs, lses = [], []
    for segment, rate in zip(segment_lengths, dilation_rates, strict=True):
        ki = _gather(k, segment, rate, heads)
        vi = _gather(v, segment, rate, heads)
        qi = _gather(q, segment, rate, heads)
        out, lse = _attend(qi, ki, vi, num_heads, causal, merge_grad)
        out, lse = _scatter(out, lse, min(segment, seq), rate, heads)
        # Segments leave the batch again: (batch * heads, seq, head_dim) is what the merge reads.
        out = out.unflatten(0, (batch, -1)).transpose(1, 2).reshape(batch * num_heads, -1, head_dim)
        lse = lse.unflatten(0, (batch, -1)).transpose(1, 2).reshape(batch * num_heads, -1, 1)
        outs.append(out[:, :seq])
        lses.append(lse[:, :seq])
    merged = _merge(outs, lses, merge_grad)
    return merged.unflatten(0, (batch, num_heads)).transpose(1, 2).reshape(batch, seq, num_heads, head_dim)


def _padding_to(length: int, multiple: int) -> int:
    return -length % multiple


def _gather(x: Tensor, segment: int, rate: int, heads: HeadAssignment) -> Tensor:
    """(batch, seq, heads, head_dim) -> (batch * segments * heads, rows, head_dim): each head's own residue only."""
    _, seq, num_heads, head_dim = x.shape
    segment = min(segment, seq)
    padding = _padding_to(seq, segment)
    if padding:
        x = F.pad(x, (0, 0, 0, 0, 0, padding))
    x = x.reshape(-1, segment, num_heads, head_dim)
    row_padding, head_padding = _padding_to(segment, rate), _padding_to(num_heads, rate)
    if row_padding or head_padding:
        x = F.pad(x, (0, 0, 0, head_padding, 0, row_padding))
    # Rows and heads are both split by the rate; the diagonal keeps, for each head, the rows of its own residue.
    x = x.unflatten(1, (-1, rate))
    if heads == "shared":
        x = x.unflatten(3, (-1, rate)).diagonal(dim1=2, dim2=4).permute(0, 1, 2, 4, 3)
    else:
        x = x.unflatten(3, (rate, -1)).diagonal(dim1=2, dim2=3).permute(0, 1, 4, 2, 3)
    # First copy: the diagonal becomes dense, heads in their order.
    x = x.flatten(2, 3)[:, :, :num_heads]
    # Second copy: heads join the batch.
    return x.transpose(1, 2).reshape(-1, x.shape[1], head_dim)


def _attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int, causal: bool, merge_grad: bool) -> tuple[Tensor, Tensor]:
    """One flash call; returns out (segments, rows, heads, head_dim) and lse (segments, heads, rows)."""
    q, k, v = (x.unflatten(0, (-1, num_heads)) for x in (q, k, v))
    if merge_grad:
        out, lse = _FlashWithLseGradient.apply(q, k, v, causal)
    else:
        out, lse = flash_with_lse(q, k, v, causal)
    return out.transpose(1, 2), lse


def _scatter(out: Tensor, lse: Tensor, segment: int, rate: int, heads: HeadAssignment) -> tuple[Tensor, Tensor]:
    """Results of one branch onto every position of its segments.

    Returns out (segments, heads, segment, head_dim), zero where the branch does not serve, and lse (segments, heads,
    segment, 1) with -1e8 there.
    """
    num_heads = out.shape[2]
    head_padding = _padding_to(num_heads, rate)
    if head_padding:
        out = F.pad(out, (0, 0, 0, head_padding))
        lse = F.pad(lse, (0, 0, 0, head_padding), value=ABSENT)
    if heads == "shared":
        out = out.unflatten(2, (-1, rate)).permute(0, 1, 2, 4, 3)
        lse = lse.unflatten(1, (-1, rate)).permute(0, 3, 1, 2)
    else:
        out = out.unflatten(2, (rate, -1)).permute(0, 1, 3, 4, 2)
        lse = lse.unflatten(1, (rate, -1)).permute(0, 3, 2, 1)
    # The embedded diagonal is the zero-filled full tensor, rate times the size of what was computed.
    out = torch.diag_embed(out, dim1=4, dim2=5)
    lse = torch.diag_embed(lse, dim1=3, dim2=4)
    lse = lse.masked_fill_(lse == 0, ABSENT)
    # (.., groups of heads, .., row residue, head residue) -> heads x rows, one more copy of the full tensor.
    if heads == "shared":
        out, lse = out.permute(0, 2, 5, 1, 4, 3), lse.permute(0, 2, 4, 1, 3)
    else:
        out, lse = out.permute(0, 5, 2, 1, 4, 3), lse.permute(0, 4, 2, 1, 3)
    out = out.flatten(3, 4).flatten(1, 2)[:, :num_heads, :segment]
    lse = lse.flatten(3, 4).flatten(1, 2)[:, :num_heads, :segment]
    return out, lse.unsqueeze(-1)


def _merge(outs: list[Tensor], lses: list[Tensor], merge_grad: bool) -> Tensor:
    """Softmax over branches of the lse, then the weighted sum of full tensors, one branch after another."""
    with torch.set_grad_enabled(merge_grad and torch.is_grad_enabled()):
        largest = torch.stack(lses).max(0)[0].detach()
        weights = [torch.exp(lse - largest) for lse in lses]
        total = torch.stack(weights).sum(0)
        weights = [weight / total for weight in weights]
    # As there, the sum starts from the number 0: one pass more than branches need.
    merged = 0 + outs[0] * weights[0].type_as(outs[0])
    for out, weight in zip(outs[1:], weights[1:], strict=True):
        merged += out * weight.type_as(out)
    return merged


class _FlashWithLseGradient(torch.autograd.Function):
    """The same flash call, with the lse differentiable.

    A cotangent of the lse enters the backward as delta - dlse. The flash backward computes delta itself, as
    rowsum(dO * O); one more column with O = 1, dO = -dlse and v = 0 makes it compute exactly that.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse = flash_with_lse(q, k, v, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal = causal
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        grad_out, grad_lse = grads
        scale = q.shape[-1] ** -0.5
        wide = [F.pad(x, (0, 1)) for x in (q, k, v)]
        wide_out = F.pad(out, (0, 1), value=1.0)
        wide_grad = torch.cat([grad_out, -grad_lse.unsqueeze(-1).type_as(grad_out)], dim=-1)
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = backward(wide_grad, *wide, wide_out, lse, 0.0, ctx.causal, scale=scale)
        return dq[..., :-1], dk[..., :-1], dv[..., :-1], None
