"""`longattn::attend` and `longattn::attend_backward`: the opaque border to torch.

A Plan is a Python object and cannot cross it, so the pattern travels as its canonical string, the rectangle as integers, and cache and
allocator as the name of an environment; plan look-up, the choice of a row and leasing happen inside, never in traced code. Fakes,
autograd and the FLOP formula of the raw ops are registered here; `entry.attend` is the caller's way in.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from longattn.kernels.dispatch.environment import Environment, find_environment
from longattn.kernels.dispatch.prepared import PreparedCall, find_plan, served
from longattn.kernels.ops.arguments import SCHEMA, OpArguments
from longattn.kernels.state import state_dtype
from longattn.patterncache import Plan

LIBRARY = torch.library.Library("longattn", "DEF")


LIBRARY.define(
    f"attend(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? prior_out, Tensor? prior_lse, {SCHEMA}) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "attend_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor out, Tensor lse, "
    f"{SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)"
)


# Inside the ops autocast is off: a row's float32 products must stay float32. `entry.autocast` has cast q, k and v before.
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    prior_out: Tensor | None,
    prior_lse: Tensor | None,
    *asked: Any,
) -> tuple[Tensor, Tensor]:
    prior = None if prior_out is None or prior_lse is None else (prior_out, prior_lse)
    shared = OpArguments(*asked)
    computed = attend_rectangle(q, k, v, bias, prior, shared, find_environment(shared.env))
    assert computed is not None
    return computed


def attend_rectangle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    prior: tuple[Tensor, Tensor] | None,
    asked: OpArguments,
    environment: Environment,
    *,
    skip_empty: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """`longattn::attend` itself, on real tensors and outside autograd: (out, lse).

    skip_empty: return None, and compute nothing, where no query of the rectangle sees a key.
    """

    def compute(call: PreparedCall, plan: Plan) -> tuple[Tensor, Tensor] | None:
        if skip_empty and plan.empty:
            return None
        return call.forward(q, k, v, bias, asked.mask, asked.key_padding, prior, asked.seed, plan, environment)

    with torch._C._DisableAutocast():
        return served(compute, q, k, v, bias, prior, asked, environment)


def rectangle_gradients(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    asked: OpArguments,
    environment: Environment,
    *,
    skip_empty: bool = False,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """`longattn::attend_backward` itself, on real tensors: dq, dk, dv, dbias (empty where none is wanted); `skip_empty` as above.

    plan: what the environment's cache answered, where it was asked already.
    """

    def compute(call: PreparedCall, plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
        if skip_empty and plan.empty:
            return None
        seed = asked.seed
        return call.backward(
            grad_out, grad_lse, q, k, v, bias, asked.mask, asked.key_padding, seed, out, lse, plan, environment
        )

    with torch._C._DisableAutocast():
        gradients = served(compute, q, k, v, bias, None, asked, environment, plan=plan)
    if gradients is None:
        return None
    dq, dk, dv, dbias = gradients
    return dq, dk, dv, q.new_empty(0) if dbias is None or bias is None else dbias.reshape(bias.shape)


def _attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *asked: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shared = OpArguments(*asked)
    environment = find_environment(shared.env, may_be_gone=True)
    gradients = rectangle_gradients(grad_out, grad_lse, q, k, v, bias, out, lse, shared, environment)
    assert gradients is not None
    return gradients


def _attend_fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, prior_out: Any, prior_lse: Any, *asked: Any
) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:3], v.shape[3]), dtype=OpArguments(*asked).out_dtype)
    return out, q.new_empty(q.shape[:3], dtype=state_dtype(q.dtype))


def _attend_backward_fake(
    grad_out: Any, grad_lse: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Any, lse: Any, *asked: Any
) -> tuple[Tensor, ...]:
    wanted = bias is not None and OpArguments(*asked).bias_grad
    return (
        *(x.new_empty(x.shape) for x in (q, k, v)),
        q.new_empty(0) if bias is None or not wanted else bias.new_empty(bias.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, prior_out, _, mask, key_padding, seed, *rest = inputs
    if prior_out is not None and any(ctx.needs_input_grad[:6]):
        raise NotImplementedError(
            "longattn::attend has no gradient through a prior; call longattn.kernels.attend, which merges"
        )
    ctx.set_materialize_grads(False)
    ctx.rest = rest
    ctx.save_for_backward(q, k, v, bias, *output, mask, key_padding, seed)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, bias, out, lse, mask, key_padding, seed = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    asked = OpArguments(mask, key_padding, seed, *ctx.rest)
    backward = torch.ops.longattn.attend_backward
    dq, dk, dv, dbias = backward(grad_out, grad_lse, q, k, v, bias, out, lse, *asked)
    return (dq, dk, dv, dbias if asked.bias_grad else None, *(None,) * (2 + len(OpArguments._fields)))


def no_second_order(ctx: Any, *grads: Any) -> NoReturn:
    """Raise: the backward op has no derivative."""
    raise NotImplementedError("longattn::attend_backward is not differentiable: second derivatives are not supported")


def _forward_flops(q: list[int], k: list[int], v: list[int], *rest: Any, **_: Any) -> int:
    # Two products of 2 * head_dim operations for each visible pair.
    plan = find_plan(OpArguments(*rest[3:]), find_environment(""))
    return 4 * q[0] * q[3] * sum(branch.pairs * branch.heads.length for branch in plan.branches)


def _backward_flops(
    grad_out: Any, grad_lse: Any, q: list[int], k: list[int], v: list[int], *rest: Any, **_: Any
) -> int:
    # Five products: scores again, dP, dV, dK, dQ.
    return _forward_flops(q, k, v, *rest) * 5 // 2


LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")
LIBRARY.impl("attend_backward", _attend_backward, "CompositeExplicitAutograd")
torch.library.register_fake("longattn::attend", _attend_fake, lib=LIBRARY)
torch.library.register_fake("longattn::attend_backward", _attend_backward_fake, lib=LIBRARY)
torch.library.register_autograd("longattn::attend", _backward, setup_context=_setup, lib=LIBRARY)
torch.library.register_autograd("longattn::attend_backward", no_second_order, lib=LIBRARY)
register_flop_formula(torch.ops.longattn.attend)(_forward_flops)
register_flop_formula(torch.ops.longattn.attend_backward)(_backward_flops)
