"""`longattn::attend` and `longattn::attend_backward`: the opaque border to torch.

A Plan is a Python object and cannot cross it, so the pattern travels as its canonical string, the rectangle as integers, and cache and
allocator as the name of an environment; plan look-up, the choice of a row and leasing happen inside, never in traced code.
"""

# What is active in torch is known to private names alone.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longattn.kernels.dispatch.call import GradientPart
from longattn.kernels.dispatch.environment import Environment, find_environment
from longattn.kernels.dispatch.plans import find_plan
from longattn.kernels.dispatch.prepared import PreparedCall, served
from longattn.kernels.ops.arguments import Cotangents, Gradients, OpArguments, OpTensors
from longattn.kernels.ops.define import define
from longattn.patterncache import Plan

LIBRARY = torch.library.Library("longattn", "DEF")


def attend_rectangle(
    tensors: OpTensors, arguments: OpArguments, environment: Environment, *, skip_empty: bool = False
) -> tuple[Tensor, Tensor] | None:
    """`longattn::attend` itself, on real tensors and outside autograd: (out, lse).

    skip_empty: return None, and compute nothing, where no query of the rectangle sees a key.
    """

    def compute(call: PreparedCall, plan: Plan) -> tuple[Tensor, Tensor] | None:
        return None if skip_empty and plan.empty else call.forward(tensors, plan, environment)

    # Inside the ops autocast is off: a row's float32 products must stay float32. `entry.autocast` has cast q, k and v before.
    with torch._C._DisableAutocast():
        return served(compute, tensors, arguments, environment)


def rectangle_gradients(
    cotangents: Cotangents,
    tensors: OpTensors,
    arguments: OpArguments,
    environment: Environment,
    *,
    skip_empty: bool = False,
    plan: Plan | None = None,
    part: GradientPart | None = None,
) -> Gradients | None:
    """`longattn::attend_backward` itself, on real tensors: dq, dk, dv, dbias (None where it is not wanted); `skip_empty` as above.

    plan: the rectangle's, where it was looked up already. part: of one rectangle of several, as in `Call`; dq, dk and dv are then in
    float32 (float64), and dq perhaps `part.dq`, added to.
    """

    def compute(call: PreparedCall, plan: Plan) -> Gradients | None:
        return None if skip_empty and plan.empty else call.backward(cotangents, tensors, plan, environment, part)

    with torch._C._DisableAutocast():
        gradients = served(compute, tensors, arguments, environment, plan)
    if gradients is None:
        return None
    dq, dk, dv, dbias, added = gradients
    dbias = None if dbias is None or tensors.bias is None else dbias.reshape(tensors.bias.shape)
    return (
        dq,
        dk,
        dv,
        dbias,
        None if added is None or tensors.by_distance is None else added.to(tensors.by_distance.dtype),
    )


def _compute(tensors: OpTensors, arguments: OpArguments) -> tuple[Tensor, Tensor]:
    if tensors.cu_seqlens is not None:
        raise NotImplementedError("longattn::attend takes no cu_seqlens; give a Documents pattern")
    computed = attend_rectangle(tensors, arguments, find_environment(arguments.env))
    assert computed is not None
    return computed


def _differentiate(cotangents: Cotangents, tensors: OpTensors, arguments: OpArguments) -> Gradients:
    gradients = rectangle_gradients(cotangents, tensors, arguments, find_environment(arguments.env, may_be_gone=True))
    assert gradients is not None
    return gradients


def _differentiate_twice(
    above: list[Tensor | None], cotangents: Cotangents, tensors: OpTensors, arguments: OpArguments
) -> list[Tensor | None]:
    environment = find_environment(arguments.env, may_be_gone=True)
    return second_gradients(above, cotangents, tensors, arguments, environment)


def second_gradients(
    above: list[Tensor | None],
    cotangents: Cotangents,
    tensors: OpTensors,
    arguments: OpArguments,
    environment: Environment,
) -> list[Tensor | None]:
    """`longattn::attend_backward`'s own backward, on real tensors: gradients of the cotangents, q, k, v and bias, each in its shape.

    above: gradients of dq, dk, dv and dbias, each or None.
    """

    def compute(call: PreparedCall, plan: Plan) -> list[Tensor | None]:
        return call.second_backward(above, cotangents, tensors, plan, environment)

    with torch._C._DisableAutocast():
        gradients = served(compute, tensors, arguments, environment)
    inputs = (*cotangents, *tensors)
    return [
        None if x is None or like is None else x.reshape(like.shape) for x, like in zip(gradients, inputs, strict=False)
    ]


def _pairs(q: Any, k: Any, arguments: OpArguments) -> int:
    return visible_pairs(find_plan(arguments, find_environment("")))


def visible_pairs(plan: Plan) -> int:
    """(query, key) pairs of a plan over all its heads."""
    return sum(branch.pairs * branch.heads.length for branch in plan.branches)


attend_op = define(LIBRARY, "attend", _compute, _differentiate, _pairs, _differentiate_twice)
"""The op as a caller calls it: (tensors, arguments) -> (out, lse), with or without autograd, transforms and tracing."""
