"""`longattn::scheduled_attend` and its backward: the opaque border to torch, for a whole schedule.

Which tensors travel between processes, and which rectangles are empty, is known only at run time, so a whole schedule is one op to
traced code: it crosses as its canonical string. The other arguments are those of `longattn::attend`, whose vmap rules serve here too;
q_spans and k_spans are of all queries and keys, and empty where only all ranks together know them; seed is from the schedule's
`exchange_metadata`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.utils.flop_counter import register_flop_formula

from longattn.attention.schedules import driver as scheduled
from longattn.attention.schedules.passes import ScheduleWork, query_spans
from longattn.attention.schedules.registry import parse_schedule
from longattn.kernels import AttentionState
from longattn.kernels.interface import (
    SCHEMA,
    OpArguments,
    find_environment,
    find_plan,
    map_backward,
    map_forward,
    no_second_order,
    refuse_tangents,
    state_dtype,
)

LIBRARY = torch.library.Library("longattn", "FRAGMENT")
LIBRARY.define(
    f"scheduled_attend(Tensor q, Tensor k, Tensor v, Tensor? bias, str schedule, {SCHEMA}) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "scheduled_attend_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor out, Tensor lse, "
    f"str schedule, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, schedule: str, asked: OpArguments) -> AttentionState:
    """Attend under a schedule; arguments are checked, and whether gradients are wanted is filled in here."""
    refuse_tangents(q, k, v, bias)
    transformed = torch._C._are_functorch_transforms_active()
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (q, k, v, bias)]
    # Inside a transform requires_grad says little: any tensor may be differentiated.
    asked = asked._replace(
        needs_grad=any(wanted) or transformed, bias_grad=wanted[3] or (transformed and bias is not None)
    )
    # torch.compile traces a Function under grad, but not under vmap alone; there the op has a rule of its own.
    if transformed and not (torch.compiler.is_compiling() and any(map(is_batchedtensor, (q, k, v)))):
        # torch.compile refuses one tensor in two places of an autograd.Function.
        k = k.view_as(k) if k is q else k
        v = v.view_as(v) if v is q or v is k else v
        return AttentionState(*_Scheduled.apply(q, k, v, bias, schedule, *asked))  # type: ignore[misc]
    return AttentionState(*torch.ops.longattn.scheduled_attend(q, k, v, bias, schedule, *asked))


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, schedule: str, *rest: Any) -> tuple[Tensor, Tensor]:
    asked = OpArguments(*rest)
    environment = find_environment(asked.env)
    work = ScheduleWork((q,), k, v, asked.key_padding, asked.mask, bias, asked, environment)
    return scheduled.forward(parse_schedule(schedule).start(work), asked, environment)


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    schedule: str,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    asked = OpArguments(*rest)
    environment = find_environment(asked.env, may_be_gone=True)
    queries = (q, grad_out, out, lse) if grad_lse is None else (q, grad_out, out, lse, grad_lse)
    work = ScheduleWork(queries, k, v, asked.key_padding, asked.mask, bias, asked, environment)
    *grads, dbias = scheduled.backward(parse_schedule(schedule).start(work), asked, environment)
    dq, dk, dv = (gradient.to(q.dtype) for gradient in grads)
    return dq, dk, dv, q.new_empty(0) if dbias is None or bias is None else dbias.to(bias.dtype)


def _forward_fake(q: Tensor, k: Any, v: Tensor, bias: Any, schedule: str, *rest: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:3], v.shape[3]), dtype=OpArguments(*rest).out_dtype)
    return out, q.new_empty(q.shape[:3], dtype=state_dtype(q.dtype))


def _backward_fake(
    grad_out: Any, grad_lse: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Any, lse: Any, *rest: Any
) -> tuple[Tensor, ...]:
    wanted = bias is not None and OpArguments(*rest[1:]).bias_grad
    dbias = bias.new_empty(bias.shape) if bias is not None and wanted else q.new_empty(0)
    return (*(x.new_empty(x.shape) for x in (q, k, v)), dbias)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, schedule, mask, key_padding, seed, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.schedule, ctx.rest = schedule, rest
    ctx.save_for_backward(q, k, v, bias, *output, mask, key_padding, seed)


def _autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    return _differentiate(ctx, grad_out, grad_lse, torch.ops.longattn.scheduled_attend_backward)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, call: Any) -> tuple[Tensor | None, ...]:
    q, k, v, bias, out, lse, mask, key_padding, seed = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    asked = OpArguments(mask, key_padding, seed, *ctx.rest)
    dq, dk, dv, dbias = call(grad_out, grad_lse, q, k, v, bias, out, lse, ctx.schedule, *asked)
    return (dq, dk, dv, dbias if asked.bias_grad else None, *(None,) * (1 + len(OpArguments._fields)))


class _Scheduled(torch.autograd.Function):
    """The op for torch.func's transforms: (q, k, v, bias, schedule, *OpArguments) -> (out, lse)."""

    @staticmethod
    def forward(*inputs: Any) -> Any:  # type: ignore[override]
        return torch.ops.longattn.scheduled_attend(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        q, k, v, bias, schedule, mask, key_padding, seed, *rest = inputs
        ctx.schedule, ctx.rest = schedule, rest
        # torch.compile wants ctx used here, not handed on.
        ctx.save_for_backward(q, k, v, bias, *output, mask, key_padding, seed)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> Any:  # type: ignore[override]
        # torch.compile does not trace a Function inside a Function's backward; there the op itself will do.
        compiling = torch.compiler.is_compiling()
        call = torch.ops.longattn.scheduled_attend_backward if compiling else _ScheduledBackward.apply
        return _differentiate(ctx, grad_out, grad_lse, call)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:  # type: ignore[override]
        return _map_forward(_Scheduled.apply, info, in_dims, inputs)


class _ScheduledBackward(torch.autograd.Function):
    """The backward op for torch.func's transforms; it has no derivative."""

    @staticmethod
    def forward(*inputs: Any) -> Any:  # type: ignore[override]
        return torch.ops.longattn.scheduled_attend_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]
        no_second_order(ctx, *grads)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:  # type: ignore[override]
        return _map_backward(_ScheduledBackward.apply, info, in_dims, inputs)


def _map_forward(call: Any, info: Any, in_dims: Any, inputs: Any) -> Any:
    """vmap by `longattn::attend`'s own rule, which knows nothing of the schedule's string at place 4."""

    def without(q: Any, k: Any, v: Any, bias: Any, *asked: Any) -> Any:
        return call(q, k, v, bias, inputs[4], *asked)

    return map_forward(without, info.batch_size, in_dims[:4] + in_dims[5:], inputs[:4] + inputs[5:])


def _map_backward(call: Any, info: Any, in_dims: Any, inputs: Any) -> Any:
    """The same for the backward: the string is at place 8."""

    def without(*rest: Any) -> Any:
        return call(*rest[:8], inputs[8], *rest[8:])

    return map_backward(without, info.batch_size, in_dims[:8] + in_dims[9:], inputs[:8] + inputs[9:])


def _op_map_forward(info: Any, in_dims: Any, *inputs: Any) -> Any:
    return _map_forward(torch.ops.longattn.scheduled_attend, info, in_dims, inputs)


def _op_map_backward(info: Any, in_dims: Any, *inputs: Any) -> Any:
    return _map_backward(torch.ops.longattn.scheduled_attend_backward, info, in_dims, inputs)


def _flops(q: list[int], k: list[int], v: list[int], bias: Any, schedule: str, *rest: Any, **_: Any) -> int:
    # Two products of 2 * head_dim operations for each visible pair of the whole, where all of it is here.
    asked = OpArguments(*rest)
    if parse_schedule(schedule).distributed:
        return 0
    spans = query_spans(asked, q[1], k[1])
    whole = asked._replace(q_spans=[n for s in spans for n in (s.start, s.length, s.step)], k_spans=[0, k[1], 1])
    plan = find_plan(whole, find_environment(""))
    return 4 * q[0] * q[3] * sum(branch.pairs * branch.heads.length for branch in plan.branches)


def _flops_backward(
    grad_out: Any,
    grad_lse: Any,
    q: list[int],
    k: list[int],
    v: list[int],
    bias: Any,
    out: Any,
    lse: Any,
    *rest: Any,
    **_: Any,
) -> int:
    # Five products: scores again, dP, dV, dK, dQ.
    return _flops(q, k, v, bias, *rest) * 5 // 2


LIBRARY.impl("scheduled_attend", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("scheduled_attend_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("longattn::scheduled_attend", _forward_fake, lib=LIBRARY)
torch.library.register_fake("longattn::scheduled_attend_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd("longattn::scheduled_attend", _autograd, setup_context=_setup, lib=LIBRARY)
torch.library.register_autograd("longattn::scheduled_attend_backward", no_second_order, lib=LIBRARY)
torch.library.register_vmap("longattn::scheduled_attend", _op_map_forward, lib=LIBRARY)
torch.library.register_vmap("longattn::scheduled_attend_backward", _op_map_backward, lib=LIBRARY)
register_flop_formula(torch.ops.longattn.scheduled_attend)(_flops)
register_flop_formula(torch.ops.longattn.scheduled_attend_backward)(_flops_backward)
