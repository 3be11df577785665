"""`define`: an op over attention and its backward, in every form that torch asks for, from two functions on real tensors.

The op itself for tracing, with fakes, autograd, vmap rules and FLOPs; and an `autograd.Function` with setup_context around it, which
torch.func's transforms need. What the two functions do inside is opaque to all of these.
"""

# What is active in torch is known to private names alone.
# pyright: reportPrivateUsage=false
# torch's own types are partial.
# pyright: reportUnknownLambdaType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.autograd import forward_ad

from longattn.kernels.ops.arguments import (
    GRADED,
    OPTIONAL_GRADED,
    TENSORS,
    Cotangents,
    Gradients,
    OpArguments,
    OpTensors,
    schema,
)
from longattn.kernels.ops.flops import register_flops
from longattn.kernels.ops.folding import map_backward, map_forward, map_second, mapped
from longattn.kernels.state import state_dtype

Compute = Callable[[OpTensors, OpArguments], tuple[Tensor, Tensor]]
Differentiate = Callable[[Cotangents, OpTensors, OpArguments], Gradients]
Pairs = Callable[[Any, Any, OpArguments], int]
DifferentiateTwice = Callable[[list["Tensor | None"], Cotangents, OpTensors, OpArguments], list["Tensor | None"]]

_BESIDE = len(Cotangents._fields)
_PRIOR = OpTensors._fields.index("prior_out")
_TWICE = _BESIDE + GRADED
"""How many inputs of a backward have derivatives: its cotangents, and the first tensors."""


def define(
    library: torch.library.Library,
    name: str,
    compute: Compute,
    differentiate: Differentiate,
    pairs: Pairs,
    differentiate_twice: DifferentiateTwice,
) -> Compute:
    """Register `longattn::NAME`, `longattn::NAME_backward` and its derivative `longattn::NAME_second`; return the caller's way into them, (tensors, arguments) -> (out, lse).

    Args:
        library: of the namespace longattn.
        compute: (tensors, arguments) -> (out, lse), on real tensors, outside autograd.
        differentiate: (cotangents, tensors, arguments) -> gradients of the first `GRADED` tensors; None for what is not wanted.
        differentiate_twice: (gradients of differentiate's results, cotangents, tensors, arguments) -> gradients of the cotangents and of the first
            `GRADED` tensors; where there are none it raises NotImplementedError.
        pairs: (shape of q, shape of k, arguments) -> visible (query, key) pairs of all heads of one batch element, from which FLOPs follow.
    """
    back, second = f"{name}_backward", f"{name}_second"
    library.define(f"{name}({schema(OpTensors, OpArguments)}) -> (Tensor, Tensor)")
    library.define(f"{back}({schema(Cotangents, OpTensors, OpArguments)}) -> ({', '.join(['Tensor'] * GRADED)})")
    above = ", ".join(f"Tensor? above_{field}" for field in OpTensors._fields[:GRADED])
    results = ", ".join(["Tensor"] * _TWICE)
    library.define(f"{second}({above}, {schema(Cotangents, OpTensors, OpArguments)}) -> ({results})")
    op, back_op, second_op = (getattr(torch.ops.longattn, each) for each in (name, back, second))

    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return compute(*_sorted(inputs))

    def backward(*inputs: Any) -> tuple[Tensor, ...]:
        tensors, arguments = _sorted(inputs[_BESIDE:])
        gradients = differentiate(Cotangents(*inputs[:_BESIDE]), tensors, arguments)
        return tuple(tensors.q.new_empty(0) if x is None else x for x in gradients)

    def twice(*inputs: Any) -> tuple[Tensor, ...]:
        tensors, arguments = _sorted(inputs[_TWICE:])
        cotangents = Cotangents(*inputs[GRADED:_TWICE])
        gradients = differentiate_twice(list(inputs[:GRADED]), cotangents, tensors, arguments)
        return tuple(tensors.q.new_empty(0) if x is None else x for x in gradients)

    def setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.arguments = inputs[_BESIDE + TENSORS :]
        ctx.save_for_backward(*inputs[: _BESIDE + TENSORS])

    def autograd_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _second_gradients(second_op, ctx.saved_tensors, ctx.arguments, grads)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        if inputs[_PRIOR] is not None and any(ctx.needs_input_grad[:TENSORS]):
            raise NotImplementedError(
                f"longattn::{name} has no gradient through a prior; call longattn.kernels.attend, which merges"
            )
        ctx.set_materialize_grads(False)
        ctx.arguments = inputs[TENSORS:]
        ctx.save_for_backward(*inputs[:TENSORS], *output)

    def autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(back_op, ctx.saved_tensors, ctx.arguments, grad_out, grad_lse)

    def refuse_third_order(ctx: Any, *grads: Any) -> NoReturn:
        raise NotImplementedError(f"longattn::{second} is not differentiable: third derivatives are not supported")

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:  # type: ignore[override]
            return op(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            # torch.compile wants ctx used here, not handed on.
            ctx.arguments = inputs[TENSORS:]
            ctx.save_for_backward(*inputs[:TENSORS], *output)

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> Any:  # type: ignore[override]
            # torch.compile does not trace a Function inside a Function's backward; there the op itself will do.
            call = back_op if torch.compiler.is_compiling() else Backward.apply
            return _gradients(call, ctx.saved_tensors, ctx.arguments, grad_out, grad_lse)

        vmap = mapped(lambda *inputs: Forward.apply(*inputs), map_forward)

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:  # type: ignore[override]
            return back_op(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.arguments = inputs[_BESIDE + TENSORS :]
            ctx.save_for_backward(*inputs[: _BESIDE + TENSORS])

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]
            call = second_op if torch.compiler.is_compiling() else Second.apply
            return _second_gradients(call, ctx.saved_tensors, ctx.arguments, grads)

        vmap = mapped(lambda *inputs: Backward.apply(*inputs), map_backward)

    class Second(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:  # type: ignore[override]
            return second_op(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass  # there is no third derivative

        backward = staticmethod(refuse_third_order)

        vmap = mapped(lambda *inputs: Second.apply(*inputs), map_second)

    def flops(*shapes: Any, **_: Any) -> int:
        # Two products for each visible pair: scores over q's head_dim, and the output over v's.
        q, k, v = shapes[:3]
        return 2 * q[0] * (q[3] + v[3]) * pairs(q, k, OpArguments(*shapes[TENSORS:]))

    def backward_flops(*shapes: Any, **_: Any) -> int:
        # Five: scores again, dK and dQ; dP and dV.
        q, k, v = shapes[_BESIDE : _BESIDE + 3]
        return 2 * q[0] * (3 * q[3] + 2 * v[3]) * pairs(q, k, OpArguments(*shapes[_BESIDE + TENSORS :]))

    def call(tensors: OpTensors, arguments: OpArguments) -> tuple[Tensor, Tensor]:
        refuse_tangents(*tensors)
        transformed = torch._C._are_functorch_transforms_active()
        arguments = _with_wanted(tensors, arguments, transformed)
        # torch.compile traces a Function under grad, but not under vmap alone; there the op has a rule of its own.
        if transformed and not (torch.compiler.is_compiling() and any(map(is_batchedtensor, tensors[:3]))):
            # torch.compile refuses one tensor in two places of an autograd.Function.
            q, k, v, *rest = tensors
            k = k.view_as(k) if k is q else k
            v = v.view_as(v) if v is q or v is k else v
            return Forward.apply(q, k, v, *rest, *arguments)  # type: ignore[return-value]
        return op(*tensors, *arguments)

    library.impl(name, forward, "CompositeExplicitAutograd")
    library.impl(back, backward, "CompositeExplicitAutograd")
    library.impl(second, twice, "CompositeExplicitAutograd")
    forms = {
        name: (_fake, autograd, setup, mapped(op, map_forward)),
        back: (_fake_backward, autograd_backward, setup_backward, mapped(back_op, map_backward)),
        second: (_fake_second, refuse_third_order, None, mapped(second_op, map_second)),
    }
    for each, (fake, derivative, setup_context, rule) in forms.items():
        torch.library.register_fake(f"longattn::{each}", fake, lib=library)
        torch.library.register_autograd(f"longattn::{each}", derivative, setup_context=setup_context, lib=library)
        torch.library.register_vmap(f"longattn::{each}", rule, lib=library)
    register_flops(op, flops)
    register_flops(back_op, backward_flops)
    return call


def _sorted(inputs: tuple[Any, ...]) -> tuple[OpTensors, OpArguments]:
    return OpTensors(*inputs[:TENSORS]), OpArguments(*inputs[TENSORS:])


def _fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    tensors, arguments = _sorted(inputs)
    q, v = tensors.q, tensors.v
    out = q.new_empty((*q.shape[:3], v.shape[3]), dtype=arguments.out_dtype)
    return out, q.new_empty(q.shape[:3], dtype=state_dtype(q.dtype))


def _fake_backward(*inputs: Any) -> tuple[Tensor, ...]:
    tensors, arguments = _sorted(inputs[_BESIDE:])
    needed = wanted_gradients(arguments)
    gradients = zip(tensors, needed, strict=False)
    return tuple(x.new_empty(x.shape) if want and x is not None else tensors.q.new_empty(0) for x, want in gradients)


def _fake_second(*inputs: Any) -> tuple[Tensor, ...]:
    q = _sorted(inputs[_TWICE:])[0].q
    inputs_with_gradient = inputs[GRADED : _TWICE + GRADED]
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs_with_gradient)


def _second_gradients(
    call: Any, saved: tuple[Any, ...], arguments: tuple[Any, ...], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """What autograd is given of a backward: by the op `call`, for every argument of it."""
    needed = wanted_gradients(OpArguments(*arguments))
    above = [x if want else None for x, want in zip(grads, needed, strict=True)]
    gradients = call(*above, *saved, *arguments)
    present = [x is not None for x in saved[:_TWICE]]
    none = (None,) * (TENSORS + len(OpArguments._fields) - GRADED)
    return (*(x if is_there else None for x, is_there in zip(gradients, present, strict=True)), *none)


def wanted_gradients(arguments: OpArguments) -> list[bool]:
    """Which of the first `GRADED` tensors the backward gives gradients of."""
    return [True] * (GRADED - len(OPTIONAL_GRADED)) + [getattr(arguments, f"{name}_grad") for name in OPTIONAL_GRADED]


def _with_wanted(tensors: OpTensors, arguments: OpArguments, transformed: bool) -> OpArguments:
    """`arguments` with what wants a gradient. Inside a transform requires_grad says little: any tensor may be differentiated."""
    grads = torch.is_grad_enabled()
    needed = [x is not None and (transformed or (grads and x.requires_grad)) for x in tensors[:GRADED]]
    flags = {f"{name}_grad": want for name, want in zip(OPTIONAL_GRADED, needed[-len(OPTIONAL_GRADED) :], strict=True)}
    return arguments._replace(needs_grad=any(needed), **flags)


def _gradients(
    call: Any, saved: tuple[Any, ...], arguments: tuple[Any, ...], grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """What autograd is given: by the backward `call`, for every argument of the forward."""
    *tensors, out, lse = saved
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    gradients = call(grad_out, grad_lse, out, lse, *tensors, *arguments)
    needed = wanted_gradients(OpArguments(*arguments))
    none = (None,) * (TENSORS + len(OpArguments._fields) - GRADED)
    return (*(x if want else None for x, want in zip(gradients, needed, strict=True)), *none)


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise NotImplementedError where a tensor carries a forward-mode tangent: the op would drop it without a word."""
    if forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "attend has no forward-mode derivative (jvp): use reverse mode, such as torch.func.grad or vjp"
        )
