"""Tensors whose elements share memory: harmless to read by strides, not to kernels that shape their results like their inputs.

torch's fused attention kernels allocate like q. Where q's windows overlap (`unfold` with a hop of 1) no such memory exists; what they get
then has its head_dim elsewhere, and they write past it. Their matrix products also want rows at least a row apart.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from longattn.kernels.dispatch.call import Call


def overlaps(x: Tensor, axes: tuple[int, ...] | None = None) -> bool:
    """Whether two elements of x, apart along `axes` (default all), may lie at one address. Judged from strides; True where in doubt."""
    reach = 0
    checked = range(x.dim()) if axes is None else axes
    for stride, size in sorted((x.stride(axis), x.shape[axis]) for axis in checked if x.shape[axis] > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def separated(x: Tensor, axes: tuple[int, ...] | None = None) -> Tensor:
    """x, or a contiguous copy where its elements overlap along `axes`."""
    return x.clone(memory_format=torch.contiguous_format) if overlaps(x, axes) else x


def separated_call(call: Call) -> Call:
    """The call with q whose elements lie apart, and k and v whose rows do; a head or batch that is expanded stays so."""
    q, k, v = separated(call.q), separated(call.k, (1, 3)), separated(call.v, (1, 3))
    return call if q is call.q and k is call.k and v is call.v else replace(call, q=q, k=k, v=v)
