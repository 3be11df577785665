"""How much weight each key received from all queries: the column sums of the attention weights, without the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from longattn.attention.schedules import op  # noqa: F401  # pyright: ignore[reportUnusedImport]  Registers the op.
from longattn.kernels.interface import OpArguments, OpTensors


def key_weights(tensors: OpTensors, arguments: OpArguments, lse: Tensor) -> Tensor:
    """(batch, kv_heads, Nk) float32 (float64): the sum over queries, and over the query heads that share a kv head, of exp(score - lse).

    That sum is P^T 1: the gradient of a v of head_dim 1 where the gradient of out is 1. So it is one backward under the call's schedule, with
    its masks, made by the row that serves. Undropped; rounded to q's dtype once; not differentiable.

    Args:
        tensors, arguments: of the `scheduled_attend` that gave `lse`. lse: (batch, Nq, heads), a learned sink included if there is one.
    """
    q, k = tensors.q.detach(), tensors.k.detach()
    mask_only = tensors._replace(q=q, k=k, v=k.new_zeros((*k.shape[:3], 1)), seed=None)
    bias = tensors.bias
    by_distance = tensors.by_distance
    mask_only = mask_only._replace(bias=None if bias is None else bias.detach())
    mask_only = mask_only._replace(by_distance=None if by_distance is None else by_distance.detach())
    ones, zeros = q.new_ones((*q.shape[:3], 1)), q.new_zeros((*q.shape[:3], 1))
    arguments = arguments._replace(
        dropout_p=0.0, needs_grad=True, bias_grad=False, by_distance_grad=False, out_dtype=q.dtype
    )
    backward = torch.ops.longattn.scheduled_attend_backward
    sums = backward(ones, None, zeros, lse.detach(), *mask_only, *arguments)[2]
    return sums.squeeze(-1).transpose(1, 2).to(lse.dtype)
