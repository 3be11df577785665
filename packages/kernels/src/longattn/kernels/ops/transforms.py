"""The ops in the form that torch.func's transforms need: `autograd.Function`s with setup_context, and vmap rules.

vmap folds the mapped axis into the batch. A bias gradient is summed per mapped element, and dropout counts batch elements within one,
so those calls run one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longattn.kernels.ops import attend_op as op
from longattn.kernels.ops.arguments import OpArguments

Dims = tuple[int | None, ...]


class Attend(torch.autograd.Function):
    """`longattn::attend` without a prior: (q, k, v, bias, *OpArguments) -> (out, lse)."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *asked: Any) -> Any:  # type: ignore[override]
        """The op."""
        return torch.ops.longattn.attend(q, k, v, bias, None, None, *asked)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep q, k, v, bias, out, lse and what is asked. torch.compile wants ctx used here, not handed on."""
        q, k, v, bias, mask, key_padding, seed, *rest = inputs
        ctx.rest = rest
        ctx.save_for_backward(q, k, v, bias, *output, mask, key_padding, seed)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> Any:  # type: ignore[override]
        """The backward op, itself a Function, so that transforms nest."""
        q, k, v, bias, out, lse, mask, key_padding, seed = ctx.saved_tensors
        asked = OpArguments(mask, key_padding, seed, *ctx.rest)
        # torch.compile does not trace a Function inside a Function's backward; there the op itself will do.
        backward = torch.ops.longattn.attend_backward if torch.compiler.is_compiling() else AttendBackward.apply
        dq, dk, dv, dbias = backward(grad_out, grad_lse, q, k, v, bias, out, lse, *asked)
        return (dq, dk, dv, dbias if asked.bias_grad else None, *(None,) * len(OpArguments._fields))

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *inputs: Any) -> Any:  # type: ignore[override]
        """Fold the mapped axis into the batch."""
        return map_forward(Attend.apply, info.batch_size, in_dims, inputs)


class AttendBackward(torch.autograd.Function):
    """`longattn::attend_backward`: (grad_out, grad_lse, q, k, v, bias, out, lse, *OpArguments) -> (dq, dk, dv, dbias)."""

    @staticmethod
    def forward(*inputs: Any) -> Any:  # type: ignore[override]
        """The op."""
        return torch.ops.longattn.attend_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing to keep: there is no second derivative."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]
        """Raise."""
        op.no_second_order(ctx, *grads)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *inputs: Any) -> Any:  # type: ignore[override]
        """Fold the mapped axis into the batch."""
        return map_backward(AttendBackward.apply, info.batch_size, in_dims, inputs)


def map_forward(call: Callable[..., Any], size: int, in_dims: Dims, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    """vmap of `call` over (q, k, v, bias, *OpArguments): its results, and along which axes they are mapped."""
    if OpArguments(*inputs[4:]).dropout_p:
        return _one_by_one(call, size, in_dims, inputs), (0, 0)
    batch = _batch_of(inputs[0], in_dims[0])
    qkv = [_fold(x, dim, size, batch) for x, dim in zip(inputs[:3], in_dims[:3], strict=True)]
    asked = _fold_asked(OpArguments(*inputs[4:]), in_dims[4:], size, batch)
    out = call(*qkv, _fold_mask(inputs[3], in_dims[3], size, batch), *asked)
    return tuple(x.unflatten(0, (size, batch)) for x in out), (0, 0)


def map_backward(call: Callable[..., Any], size: int, in_dims: Dims, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    """vmap of `call` over (grad_out, grad_lse, q, k, v, bias, out, lse, *OpArguments): the same."""
    asked = OpArguments(*inputs[8:])
    if asked.bias_grad or asked.dropout_p:
        return _one_by_one(call, size, in_dims, inputs), (0, 0, 0, 0)
    batch = _batch_of(inputs[2], in_dims[2])
    folded = [_fold(x, dim, size, batch) for x, dim in zip(inputs[:8], in_dims[:8], strict=True)]
    folded[5] = _fold_mask(inputs[5], in_dims[5], size, batch)
    *grads, dbias = call(*folded, *_fold_asked(asked, in_dims[8:], size, batch))
    return (*(x.unflatten(0, (size, batch)) for x in grads), dbias), (0, 0, 0, None)


def _one_by_one(call: Callable[..., Any], size: int, in_dims: Dims, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
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


def _fold_asked(asked: OpArguments, dims: Dims, size: int, batch: int) -> OpArguments:
    return asked._replace(
        mask=_fold_mask(asked.mask, dims[0], size, batch), key_padding=_fold(asked.key_padding, dims[1], size, batch)
    )


def _op_vmap_forward(info: Any, in_dims: Dims, *inputs: Any) -> Any:
    if inputs[4] is not None:
        raise NotImplementedError(
            "longattn::attend has no vmap rule with a prior; call longattn.kernels.attend, which merges"
        )

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *asked: Any) -> Any:
        return torch.ops.longattn.attend(q, k, v, bias, None, None, *asked)

    return map_forward(call, info.batch_size, (*in_dims[:4], *in_dims[6:]), (*inputs[:4], *inputs[6:]))


def _op_vmap_backward(info: Any, in_dims: Dims, *inputs: Any) -> Any:
    return map_backward(torch.ops.longattn.attend_backward, info.batch_size, in_dims, inputs)


torch.library.register_vmap("longattn::attend", _op_vmap_forward, lib=op.LIBRARY)
torch.library.register_vmap("longattn::attend_backward", _op_vmap_backward, lib=op.LIBRARY)
