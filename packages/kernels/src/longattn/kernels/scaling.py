"""A softmax scale that is a tensor: folded into q, in differentiable code, before anything else is computed."""

from __future__ import annotations

from torch import Tensor

from longattn.kernels.check import check_device
from longattn.kernels.dispatch.capability import dtype_name
from longattn.kernels.state import FLOATS, state_dtype


def fold_scale(q: Tensor, scale: object) -> tuple[Tensor, float | None]:
    """q and a scale of the scores that is a number: where `scale` is a tensor, scale * q and 1.0; else as they are.

    Gradients flow to the scale through q. The product is made in float32 (float64) and rounded to q's dtype once, so that in float16 and
    bfloat16 scores have one rounding more than under the same number as a float. Nothing is read from the device.

    Args:
        q: (batch, Nq, heads, head_dim). scale: None, a number, or floating () or (heads,), on the device of q; 0-dim ones also on the CPU.

    Raises:
        TypeError, ValueError: scale is a tensor of another dtype, shape or device.
    """
    if not isinstance(scale, Tensor):
        return q, scale  # type: ignore[return-value]
    if scale.dtype not in FLOATS:
        raise TypeError(f"softmax_scale must be None, a number or a floating tensor, got {dtype_name(scale.dtype)}")
    if not isinstance(q, Tensor) or q.dim() != 4 or q.dtype not in FLOATS:  # pyright: ignore[reportUnnecessaryIsInstance]
        return q, 1.0  # refused by name with the other tensors
    if scale.shape not in ((), (q.shape[2],)):
        raise ValueError(
            f"softmax_scale must be a number or a tensor () or (heads,) = {(q.shape[2],)}, got {tuple(scale.shape)}"
        )
    if scale.dim() or scale.device.type != "cpu":
        check_device("softmax_scale", scale, q)
    wide = state_dtype(q.dtype)
    return (q.to(wide) * scale.to(wide).unsqueeze(-1)).to(q.dtype), 1.0
