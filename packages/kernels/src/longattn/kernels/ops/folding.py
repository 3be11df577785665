"""vmap's rules of the ops: the mapped axis is folded into the batch.

What cannot be folded runs one by one: a wanted gradient of a bias, which is a sum per mapped element; dropout, which counts batch elements
within one; and a mapped tensor that has no batch axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longattn.kernels.ops.arguments import GRADED, OPTIONAL_GRADED, TENSORS, Cotangents, OpArguments, OpTensors

Dims = tuple[int | None, ...]
_BESIDE = len(Cotangents._fields)
_BATCHED = ("q", "k", "v", "key_padding")
_BROADCAST = ("bias", "mask")


def map_forward(call: Callable[..., Any], size: int, in_dims: Dims, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    """vmap of an op's forward over (*OpTensors, *OpArguments): its results, and along which axes they are mapped."""
    tensors, arguments = OpTensors(*inputs[:TENSORS]), OpArguments(*inputs[TENSORS:])
    if tensors.prior_out is not None:
        raise NotImplementedError("the op has no vmap rule with a prior; call longattn.kernels.attend, which merges")
    if arguments.dropout_p or not _folds(in_dims):
        return one_by_one(call, size, in_dims, inputs), (0, 0)
    batch = _batch_of(tensors.q, in_dims[0])
    out = call(*_fold_tensors(tensors, in_dims, size, batch), *arguments)
    return tuple(x.unflatten(0, (size, batch)) for x in out), (0, 0)


def map_backward(call: Callable[..., Any], size: int, in_dims: Dims, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    """vmap of an op's backward over (*Cotangents, *OpTensors, *OpArguments): the same."""
    beside, dims = inputs[:_BESIDE], in_dims[_BESIDE:]
    tensors, arguments = OpTensors(*inputs[_BESIDE:][:TENSORS]), OpArguments(*inputs[_BESIDE:][TENSORS:])
    if arguments.dropout_p or any(getattr(arguments, f"{name}_grad") for name in OPTIONAL_GRADED) or not _folds(dims):
        return one_by_one(call, size, in_dims, inputs), (0,) * GRADED
    batch = _batch_of(tensors.q, dims[0])
    folded = [_fold(x, dim, size, batch) for x, dim in zip(beside, in_dims[:_BESIDE], strict=True)]
    dq, dk, dv, *rest = call(*folded, *_fold_tensors(tensors, dims, size, batch), *arguments)
    return (*(x.unflatten(0, (size, batch)) for x in (dq, dk, dv)), *rest), (0, 0, 0, *(None,) * (GRADED - 3))


def map_second(call: Callable[..., Any], size: int, in_dims: Dims, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    """vmap of the derivative of an op's backward."""
    results = one_by_one(call, size, in_dims, inputs)
    return results, (0,) * len(results)


def mapped(call: Callable[..., Any], rule: Callable[..., tuple[Any, Any]]) -> Any:
    """One of these rules for `call`, as torch takes it."""

    def vmap(info: Any, in_dims: Dims, *inputs: Any) -> tuple[Any, Any]:
        return rule(call, info.batch_size, in_dims, inputs)

    return staticmethod(vmap)


def _folds(dims: Dims) -> bool:
    """Whether every mapped tensor has a batch axis to be folded into."""
    dim_of = zip(OpTensors._fields, dims, strict=False)
    return not any(dim is not None and name not in (*_BATCHED, *_BROADCAST) for name, dim in dim_of)


def _fold_tensors(tensors: OpTensors, dims: Dims, size: int, batch: int) -> list[Any]:
    folded: list[Any] = []
    for name, x, dim in zip(OpTensors._fields, tensors, dims, strict=False):
        fold = _fold if name in _BATCHED else _fold_mask if name in _BROADCAST else None
        folded.append(x if fold is None else fold(x, dim, size, batch))
    return folded


def one_by_one(call: Callable[..., Any], size: int, in_dims: Dims, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The results of each mapped element, stacked."""
    each = [call(*(_select(x, dim, n) for x, dim in zip(inputs, in_dims, strict=True))) for n in range(size)]
    return tuple(torch.stack(parts) for parts in zip(*each, strict=True))


def _batch_of(x: Tensor, dim: int | None) -> int:
    return x.shape[0] if dim is None else x.movedim(dim, 0).shape[1]


def _select(x: Any, dim: Any, n: int) -> Any:
    return x.select(dim, n) if isinstance(x, Tensor) and dim is not None else x


def _fold(x: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """(size * batch, ...) of a tensor that is mapped along `dim`, or not at all."""
    if x is None:
        return None
    mapped = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return mapped.reshape(size * batch, *mapped.shape[2:])


def _fold_mask(x: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """The same for what broadcasts to (batch, heads, Nq, Nk)."""
    if x is None or (dim is None and (x.dim() < 4 or x.shape[0] == 1)):
        return x
    mapped = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
    mapped = mapped.reshape(mapped.shape[0], *(1,) * (5 - mapped.dim()), *mapped.shape[1:])
    return mapped.expand(size, batch, *mapped.shape[2:]).reshape(size * batch, *mapped.shape[2:])
