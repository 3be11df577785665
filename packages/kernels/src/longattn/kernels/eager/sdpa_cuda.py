"""Rows "sdpa_views" and "sdpa_views_cudnn": strided branches through torch's own CUDA kernels, each pinned by name, and a merge.

Tiles are strided views, walked, merged and differentiated as in the row "sdpa" of the CPU. Dense and causal tiles go to FlashAttention or
to cuDNN; masked strips (a window's edge, an attention mask, padding) go to the memory-efficient kernel, the one that takes a mask and
returns an lse. torch's math kernel returns none, so nothing is ever sent to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longattn.kernels.dispatch.call import Call
from longattn.kernels.dispatch.capability import ROUNDED_WITHIN, Capability
from longattn.kernels.eager.sdpa import backward_through, forward_through
from longattn.kernels.eager.second_order import second_gradients
from longattn.kernels.far_rows import exact_backward, exact_forward

_DTYPES = (torch.float16, torch.bfloat16)

WITH_FLASH = Capability(
    devices=("cuda",),
    dtypes={"cuda": _DTYPES},
    tolerance={dtype: ROUNDED_WITHIN[dtype] for dtype in _DTYPES},
    max_head_dim=256,
    # Its backward kernels add with atomics.
    deterministic=("cpu",),
    by_distance=True,
    architectures=("sm_8?*", "sm_9?*", "sm_1??*", "gfx90a", "gfx94?", "gfx950"),
)
_WIDTH = 8
"""What head_dim must be a multiple of in all these kernels; torch pads before it calls them."""

_FLASH_WIDTH = 256
"""The largest head_dim of FlashAttention; the memory-efficient kernel has no bound."""

_MASK_ALIGNMENT = 16
"""Columns that a row of a mask is padded to in memory: the memory-efficient kernel reads whole vectors of it."""


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    results = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return results[0], results[1]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    results = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    # Some versions of cuDNN keep the axis that they reduced.
    return results[0], results[1].reshape(results[0].shape[:3])


def _aligned(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mask in full, each row starting at an aligned address."""
    width = shape[-1]
    room = mask.new_empty((*shape[:-1], -(-width // _MASK_ALIGNMENT) * _MASK_ALIGNMENT))[..., :width]
    return room.copy_(mask.expand(shape))


def _efficient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    bias = _aligned(mask.to(q.dtype), (*q.shape[:3], k.shape[2]))
    results = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=scale)
    # What it leaves in rows that see nothing is undefined; our state is zero there.
    blind = (mask == -torch.inf).all(-1, keepdim=True)
    # It pads its lse to whole blocks of rows.
    return results[0].masked_fill(blind, 0), results[1][..., : q.shape[2]]


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """It needs out and the merged lse, and no dropout state."""
    nothing = torch.zeros((), dtype=torch.int64, device=q.device)
    lengths = (None, None, q.shape[2], k.shape[2])
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_backward
    return kernel(grad, q, k, v, out, lse.contiguous(), *lengths, 0.0, causal, nothing, nothing, scale=scale)


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = -(-q.shape[2] // 32) * 32
    padded = torch.nn.functional.pad(lse, (0, rows - q.shape[2]), value=torch.inf)
    nothing = torch.zeros((), dtype=torch.int64, device=q.device)
    wants_gradient = (True, True, True, False)
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention_backward
    dq, dk, dv, _ = kernel(grad, q, k, v, bias, out, padded, nothing, nothing, 0.0, wants_gradient, causal, scale=scale)
    return dq, dk, dv


@dataclass(frozen=True)
class DenseKernel:
    """What takes the tiles without a mask, (tiles, heads, count, d) each.

    Attributes:
        forward: (q, k, v, causal, scale) -> (out, lse). backward: (grad, q, k, v, out, lse, causal, scale) -> (dq, dk, dv).
        widest: the largest head_dim of the backward, where a column of an lse cotangent stands beside it.
        groups: whether k and v may have fewer heads than q.
    """

    forward: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = _flash_backward
    widest: int = _FLASH_WIDTH
    groups: bool = False


@dataclass(frozen=True)
class ViewsRow:
    """One of the rows: which kernel takes the tiles without a mask."""

    CAPABILITY: Capability
    kernel: DenseKernel
    second_backward = staticmethod(second_gradients)

    @exact_forward
    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """out (batch, Nq, heads, head_dim) in out_dtype, lse (batch, Nq, heads)."""
        return forward_through(self._forward, call)

    @exact_backward
    def backward(
        self, call: Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """(dq, dk, dv, None) in the dtypes of q, k, v; summed in float32."""
        return backward_through(self._backward, call, grad_out, grad_lse, out, lse)

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        width, repeated = q.shape[-1], mask is not None or not self.kernel.groups
        q, k, v = (_padded(x) for x in (q, *(_shared(x, q.shape[1]) if repeated else x for x in (k, v))))
        if mask is None:
            out, lse = self.kernel.forward(q, k, v, causal, scale)
        else:
            out, lse = _efficient(q, k, v, mask, scale)
        return out[..., :width], lse

    def _backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Masked tiles, and those that are wider than the kernel goes once the column of an lse cotangent stands beside them, take the
        memory-efficient kernel.
        """
        kv_heads, width = k.shape[1], q.shape[-1]
        grad, q, k, v, out = (_padded(x) for x in (grad, q, k, v, out))
        dense = mask is None and q.shape[-1] <= self.kernel.widest
        if not (dense and self.kernel.groups):
            k, v = (_shared(x, q.shape[1]) for x in (k, v))
        if dense:
            dq, dk, dv = self.kernel.backward(grad, q, k, v, out, lse, causal, scale)
        else:
            bias = None if mask is None else _aligned(mask.to(q.dtype), (*q.shape[:3], k.shape[2]))
            dq, dk, dv = _efficient_backward(grad, q, k, v, out, lse, causal, bias, scale)
        # Rounded once, after heads that share keys were added.
        dk, dv = (x.reshape(len(x), kv_heads, -1, *x.shape[2:]).sum(2, dtype=torch.float32) for x in (dk, dv))
        return dq[..., :width], dk[..., :width], dv[..., :width]


def _shared(x: Tensor, heads: int) -> Tensor:
    """Keys or values (tiles, kv_heads, count, d) for as many query heads: repeated, for not all of these kernels group them."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _padded(x: Tensor) -> Tensor:
    """Columns of zeros up to a width that the kernels take; itself where it has one."""
    missing = -x.shape[-1] % _WIDTH
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


FLASH = ViewsRow(WITH_FLASH, DenseKernel(_flash))
CUDNN = ViewsRow(
    replace(WITH_FLASH, max_head_dim=128, architectures=("sm_8?*", "sm_9?*", "sm_1??*")), DenseKernel(_cudnn)
)
