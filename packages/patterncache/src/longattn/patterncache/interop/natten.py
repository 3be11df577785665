"""`from_natten`: NATTEN's neighborhood attention, from its arguments (as NATTEN 0.21 defines them). NATTEN is not imported."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, cast

import numpy as np

from longattn.patterncache.interop.masks import from_mask_mod
from longattn.patterncache.pattern import Pattern
from longattn.patterncache.patterns.window import Window
from longattn.patterncache.spans import Rows, check_flag, check_int, shortened


def from_natten(
    shape: int | Sequence[int],
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> Pattern:
    """NATTEN's neighborhood attention over a token layout of one to three axes, tokens in row-major order.

    On an axis without causality a query sees `kernel_size` keys of its residue modulo the dilation, with itself in the middle where there
    is room; at the borders the neighborhood is moved inside. A causal axis shows the last `kernel_size`, fewer at the border. With a
    stride s, queries of s neighbours see what one of them would.

    Args:
        shape: tokens of each axis.
        kernel_size, stride, dilation, is_causal: as NATTEN's na1d, na2d and na3d take them: one for all axes, or one for each.

    Raises:
        TypeError, ValueError: not such values, kernel_size times dilation above an axis, stride above kernel_size, or more than 2 ** 28
            pairs (a causal axis alone, with neither stride nor dilation, is a `Window` and may be of any length).
    """
    given = (shape,) if isinstance(shape, (int, np.integer)) else _sequence("shape", shape)
    sizes = tuple(check_int("shape", s, minimum=1) for s in given)
    if not 1 <= len(sizes) <= 3:
        raise ValueError(f"shape must have one to three axes, got {sizes}")
    kernels, strides, dilations = (
        tuple(check_int(name, entry, minimum=1) for entry in _of_axes(name, value, len(sizes)))
        for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
    )
    causals = tuple(check_flag("is_causal", entry) for entry in _of_axes("is_causal", is_causal, len(sizes)))
    for size, kernel, step, apart in zip(sizes, kernels, strides, dilations, strict=True):
        if kernel * apart > size or step > kernel:
            raise ValueError(
                f"kernel_size must be at least its stride, and at most the axis over the dilation; got kernel_size={kernel}, "
                f"stride={step}, dilation={apart} on {size} tokens"
            )
    if len(sizes) == 1 and causals[0] and strides == dilations == (1,):
        return Window(kernels[0])

    def shown(b: Any, h: Any, q: Any, k: Any) -> Any:
        axes = zip(
            _coordinates(q, sizes),
            _coordinates(k, sizes),
            sizes,
            kernels,
            strides,
            dilations,
            causals,
            strict=True,
        )
        near = np.ones(np.broadcast_shapes(q.shape, k.shape), bool)
        for axis in axes:
            near &= _neighbours(*axis)
        return near

    return from_mask_mod(shown, prod(sizes))


def _coordinates(tokens: Rows, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    """Where tokens stand on each axis, in row-major order."""
    return np.unravel_index(tokens, sizes)


def _neighbours(q: Any, k: Any, size: int, kernel: int, stride: int, dilation: int, causal: bool) -> Any:
    """Whether q sees k on one axis."""
    residue = q % dilation
    members = (size - 1 - residue) // dilation + 1
    at, other = q // dilation, k // dilation
    group = at // stride * stride
    if causal:
        leader = np.minimum(group + stride - 1, members - 1)
        near = (other <= at) & (leader - other < kernel)
    else:
        begin = np.clip(np.minimum(group + stride // 2, members - 1) - kernel // 2, 0, members - kernel)
        near = (other >= begin) & (other < begin + kernel)
    return near & (k % dilation == residue)


def _sequence(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be one value or a tuple of one for each axis, got {shortened(value)}")
    return cast("Sequence[Any]", value)


def _of_axes(name: str, value: Any, axes: int) -> tuple[Any, ...]:
    single = isinstance(cast("object", value), (bool, int, np.integer, np.bool_))
    values: tuple[Any, ...] = (value,) * axes if single else tuple(_sequence(name, value))
    if len(values) != axes:
        raise ValueError(f"{name} must be one value, or one for each of {axes} axes, got {shortened(value)}")
    return values
