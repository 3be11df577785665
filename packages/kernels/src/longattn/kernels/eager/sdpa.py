"""Row "sdpa": strided branches through torch's own flash kernel for CPU, merged in place on the selected rows only.

Every tile is a strided view; torch's kernel reads it without a copy and returns (out, lse). It takes one head_dim for q, k and v, so where
v has another, the narrower side of each tile is filled up with zeros, which change nothing. Backward gives each tile the merged out
and lse, so that its gradient is exact by itself: P = exp(s - lse), and the kernel's own delta = rowsum(dO * O). Where every query sees every
key, or those up to its own, torch's kernel is called once, on the tensors as they are, and what it returns is the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from longattn.kernels.dispatch.call import Call
from longattn.kernels.dispatch.capability import ROUNDED_WITHIN, Capability
from longattn.kernels.dispatch.environment import TorchAllocator
from longattn.kernels.eager.second_order import second_gradients
from longattn.kernels.eager.strides import separated, separated_call
from longattn.kernels.eager.tile_walk import finish, new_gradients, new_state, walk
from longattn.kernels.eager.tiles import Tile
from longattn.kernels.far_rows import bounded, exact_backward, exact_forward
from longattn.kernels.state import FLOATS, state_dtype
from longattn.patterncache.indices import Affine

CAPABILITY = Capability(
    devices=("cpu",),
    dtypes={"cpu": FLOATS},
    tolerance=ROUNDED_WITHIN,
    # As a bias, made tile by tile.
    by_distance=True,
)

_CELLS = (1 << 18, 1 << 22)
"""Least and most output numbers (or, under a mask, scores) that one call of torch's kernel may make: 1 to 16 MiB in float32."""


TorchKernel = Callable[[Tensor, Tensor, Tensor, bool, "Tensor | None", float], tuple[Tensor, Tensor]]
"""A kernel of torch: (q, k, v, causal, additive mask, scale) to (out, lse), on (tiles, heads, rows, head_dim) views."""

TorchGradient = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""Its gradient: (grad_out, q, k, v, out, lse, causal, additive mask, scale) to (dq, dk, dv), given the merged out and lse."""


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = kernel(q, k, v, is_causal=causal, attn_mask=mask, scale=scale)
    # Where scores are infinite torch's kernel says one thing or another: an lse of 0 for a row of -inf, of inf or 0 for one with +inf.
    usual = bool(lse.all()) and math.isfinite(lse.sum())  # two reductions, which every call pays
    if not usual and not _are_finite(q, k, lse.dtype, scale):
        scores = q.to(lse.dtype) @ k.to(lse.dtype).repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT * scale
        scores = scores if mask is None else scores + mask
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
        most = scores.amax(-1)
        wrong = ~(most < torch.inf)
        lse = lse.masked_fill(most == -torch.inf, -torch.inf).masked_fill(wrong, torch.nan)
        out = out.masked_fill(wrong.unsqueeze(-1), torch.nan)
    return out, lse


def _are_finite(q: Tensor, k: Tensor, dtype: torch.dtype, scale: float) -> bool:
    """Whether no score of theirs can be beyond the type."""
    most = [max(abs(float(end)) for end in x.aminmax()) for x in (q, k)]
    return most[0] * most[1] * q.shape[-1] * max(1.0, abs(scale)) < torch.finfo(dtype).max


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return kernel(grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)


second_backward = second_gradients


@exact_forward
def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out (batch, Nq, heads, head_dim) in out_dtype, lse (batch, Nq, heads)."""
    if not _is_whole(call) or type(call.allocator) is not TorchAllocator:  # torch's kernel makes its own output
        return forward_through(_cpu_forward, call)
    call = separated_call(call)
    q, k, v = (_dense(x.transpose(1, 2)) for x in (call.q, call.k, call.v))
    out, lse = _cpu_forward(q, k, v, call.plan.branches[0].triangle, None, call.scale)
    # As the op's fake says: torch's kernel lays its output out like q.
    return out.transpose(1, 2).to(call.out_dtype).contiguous(), lse.transpose(1, 2).contiguous()


@exact_backward
def backward(
    call: Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, None]:
    """(dq, dk, dv, None) in the dtypes of q, k, v; summed in float32 (float64). torch's kernel has no gradient of a bias."""
    if grad_lse is not None or not _is_whole(call):
        return backward_through(_cpu_backward, call, grad_out, grad_lse, out, lse)
    call = separated_call(call)
    grad_out, out = separated(grad_out.to(call.q.dtype)), separated(out.to(call.q.dtype))
    grad, q, k, v, out = (_dense(x.transpose(1, 2)) for x in (grad_out, call.q, call.k, call.v, out))
    triangle = call.plan.branches[0].triangle
    dq, dk, dv = _cpu_backward(grad, q, k, v, out, lse.transpose(1, 2), triangle, None, call.scale)
    dq, dk, dv = (
        x.transpose(1, 2).to(dtype).contiguous() for x, dtype in zip((dq, dk, dv), call.gradient_dtypes, strict=True)
    )
    return dq, dk, dv, None


def _is_whole(call: Call) -> bool:
    """Whether one call of torch's kernel on the whole tensors will do: every query sees every key, or those up to its own."""
    if len(call.plan.branches) != 1 or not call.q.numel() or call.prior is not None or call.dropout_p:
        return False
    if call.q.shape[-1] != call.v.shape[-1]:
        return False
    if any(x is not None for x in (call.mask, call.bias, call.by_distance, call.key_padding)):
        return False
    branch, (heads, queries, keys) = call.plan.branches[0], call.plan.rectangle.shape
    every = all(
        isinstance(i, Affine) and (i.start, i.tiles, i.count) == (0, 1, n) and (i.step == 1 or n == 1)
        for i, n in ((branch.q, queries), (branch.k, keys))
    )
    # torch's kernel scales its causal mask with the scores: see `tile_walk`.
    seen = branch.band is None or (branch.triangle and call.scale > 0)
    return every and seen and (branch.heads.start, branch.heads.step, branch.heads.length) == (0, 1, heads)


def forward_through(kernel: TorchKernel, call: Call) -> tuple[Tensor, Tensor]:
    """`forward` tile by tile through one of torch's kernels."""
    call = separated_call(call)
    out, lse = new_state(call, triangles=True)
    for tile in walk(call, triangles=True, cells=_cells(call)):
        q, k, v = map(_dense, alike(tile.queries(call.q), tile.keys(call.k), tile.keys(call.v)))
        tile_out, tile_lse = kernel(q, k, v, tile.causal, _additive(tile, call.q.dtype), call.scale)
        if tile.seen is not None:
            # torch reports 0 where every key is hidden.
            tile_lse = tile_lse.masked_fill(~tile.seen.any(-1), -torch.inf)
        tile.merge(out, lse, tile_out[..., : out.shape[-1]], tile_lse)
        del tile_out  # before the next call makes its own: one at a time in memory
    return finish(call, out), lse


def backward_through(
    kernel: TorchGradient, call: Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, None]:
    """`backward` tile by tile through the gradient of one of torch's kernels."""
    call = separated_call(call)
    width, value_width = call.q.shape[-1], call.v.shape[-1]
    dq, dk, dv = new_gradients(call)
    grad_out, out = separated(grad_out.to(call.q.dtype)), separated(out.to(call.q.dtype))
    # A finite pivot for rows that saw nothing: their scores are all -inf, so P stays 0.
    lse = lse.masked_fill(lse == -torch.inf, 0)
    others = (grad_out, out, lse) if grad_lse is None else (grad_out, out, lse, grad_lse)
    for tile in walk(call, triangles=True, cells=_cells(call), others=others, at_once=_at_once()):
        parts = (tile.queries(grad_out), tile.queries(call.q), tile.keys(call.k), tile.keys(call.v), tile.queries(out))
        if grad_lse is not None:
            parts = _with_lse_column(*parts, tile.queries(grad_lse))
        mask = _additive(tile, call.q.dtype)
        grads = kernel(*map(_dense, alike(*parts)), tile.queries(lse), tile.causal, mask, call.scale)
        tile.add_queries(dq, grads[0][..., :width])
        tile.add_keys(dk, grads[1][..., :width])
        tile.add_keys(dv, grads[2][..., :value_width])
        del grads  # before the next call makes its own: one set at a time in memory
    dq, dk, dv = (x.to(dtype) for x, dtype in zip((dq, dk, dv), call.gradient_dtypes, strict=True))
    return dq, dk, dv, None


def _cells(call: Call) -> int:
    """A sixteenth of q, within bounds: larger calls spread better over threads, and what they make stays small beside the result."""
    least, most = _CELLS
    return max(least, min(most, call.q.numel() // 16))


def _at_once() -> int:
    """Heads x tiles of a call: torch's backward spreads over these alone, and four a thread keep the last one from waiting long."""
    return 4 * torch.get_num_threads()


def _dense(x: Tensor) -> Tensor:
    """torch's kernel reads head_dim as neighbours in memory, whatever the stride says."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _additive(tile: Tile, dtype: torch.dtype) -> Tensor | None:
    # A float32 bias of a bfloat16 q stays float32: -100 is not the same as -100.5.
    bias = None if tile.bias is None else bounded(tile.bias).to(state_dtype(dtype))
    if tile.seen is None:
        return bias
    none = torch.zeros((), dtype=dtype, device=tile.seen.device)
    return torch.where(tile.seen, none if bias is None else bias, -torch.inf)


def _with_lse_column(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad_lse: Tensor
) -> tuple[Tensor, ...]:
    """Fold an lse cotangent in: with v' = [v, 1], dO' = [dO, dlse] and O' = [O, 0], dP = dO v + dlse and delta is unchanged."""
    pad = torch.nn.functional.pad
    column = grad_lse.to(grad_out.dtype).unsqueeze(-1)
    return torch.cat([grad_out, column], -1), q, k, pad(v, (0, 1), value=1.0), pad(out, (0, 1))


def alike(*parts: Tensor) -> tuple[Tensor, ...]:
    """Tiles (..., head_dim) of one head_dim, the largest: narrower ones get columns of zeros."""
    width = max(x.shape[-1] for x in parts)
    return tuple(x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in parts)
