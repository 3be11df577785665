"""The way of an ordinary eager call: from its signature straight to the row, without torch's dispatcher in between.

A call goes this way where nothing but torch's autograd looks on: no tracing, transform, mode, tensor subclass, autocast or profiler.
Everything else goes through the opaque op, which each of these knows how to handle.
"""

# What is active in torch is known to private names alone.
# pyright: reportPrivateUsage=false
# torch's own types are partial.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler
from torch.nn import Parameter

from longattn.kernels.dispatch.environment import DEFAULT_ENVIRONMENT, Environment, find_environment, find_plan_of
from longattn.kernels.dispatch.plans import find_plan
from longattn.kernels.dispatch.prepared import (
    LENGTHS,
    PREPARED,
    PreparedCall,
    described,
    prepared_for,
    process_settings,
    served,
)
from longattn.kernels.dispatch.table import RowFailure
from longattn.kernels.ops.arguments import Cotangents, OpArguments, OpTensors
from longattn.kernels.ops.attend_op import rectangle_gradients
from longattn.kernels.options import IN_FORM, Options, of_documented_types, tensors_of
from longattn.kernels.philox import as_seed
from longattn.kernels.positions import last_positions
from longattn.kernels.terms import Alibi, RelativeBias, Softcap
from longattn.patterncache import Pattern, Plan

_PLAIN = (Tensor, Parameter)
_STRIDED = torch.strided
_NOT_PLAIN = ("not plain",)
_is_compiling = torch.compiler.is_compiling
_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracing_state = torch._C._get_tracing_state
_autocast_active = torch._C._is_any_autocast_enabled
_is_grad_enabled = torch.is_grad_enabled
_deterministic = torch._C._get_deterministic_algorithms


def is_plain() -> bool:
    """Whether nothing but autograd looks on at what is computed now."""
    return not (
        _is_compiling()
        or _transforms_active()
        or _dispatch_modes()
        or _function_modes()
        or _tracing_state() is not None  # pyright: ignore[reportUnnecessaryComparison]
        or _autocast_active()
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
    )


def signature(place: str, q: Any, k: Any, v: Any, pattern: object, options: Options) -> tuple[Hashable, ...] | None:
    """What the memo knows a call of the public function `place` by; None where the call does not go this way.

    Arguments are as the caller gave them. Values of another type than the documented one have no signature: they could equal one that
    was checked before (1 == True), so they are checked.
    """
    if not is_plain():
        return None
    forms = plain_form(q), plain_form(k), plain_form(v)
    if None in forms:
        return None
    text = getattr(pattern, "_canonical", None)
    if text is None:
        # isinstance of an abstract class is slow: it is called once a pattern.
        if not isinstance(pattern, Pattern):
            return None
        text = pattern.canonical()
    if not of_documented_types(options):
        return None
    mask, key_padding, terms, environment, deterministic = options[:IN_FORM]
    beside: tuple[Hashable, ...] = ()
    if mask is not None or key_padding is not None:
        beside = tuple(None if x is None else plain_form(x) or _NOT_PLAIN for x in (mask, key_padding))
        if _NOT_PLAIN in beside or (mask is not None and mask.requires_grad):
            return None
    if terms is not None:
        form = _form_of(terms)
        if form is None:
            return None
        beside = (*beside, form)
    return (
        place,
        text,
        *forms,
        beside,
        None if environment is None else environment.name,
        _deterministic() if deterministic is None else deterministic,
        *options[IN_FORM:],
        _is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
        *process_settings(),
    )


def _form_of(terms: object) -> tuple[Hashable, ...] | None:
    """What of score terms decides how they are computed: all but the numbers in their tensors. None: they have no signature."""
    forms: list[Hashable] = []
    for term in terms if isinstance(terms, (tuple, list)) else (terms,):
        if isinstance(term, Softcap):
            forms.append(term)
            continue
        if not isinstance(term, (Alibi, RelativeBias)):
            return None
        x = term.slopes if isinstance(term, Alibi) else term.table
        form = plain_form(x)
        if form is None or (x.requires_grad and _is_grad_enabled()):
            return None
        rest = () if isinstance(term, Alibi) else (term.bidirectional, term.max_distance)
        forms.append((type(term), form, *rest))
    return tuple(forms)


def plain_form(x: object) -> tuple[Hashable, ...] | None:
    """What of a tensor decides how it is computed with; None unless it is a torch.Tensor or a parameter and no other subclass, strided, and
    its memory holds what it says.

    torch keeps some views as flags (`is_neg`, of the imaginary part of a conjugate), which its dispatcher resolves and a row would not.
    """
    if type(x) not in _PLAIN:
        return None
    assert isinstance(x, Tensor)
    return None if x.layout is not _STRIDED or x.is_nested or x.is_neg() else described(x)


def attend_prepared(
    key: tuple[Hashable, ...], q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, options: Options, seed: Any
) -> tuple[Tensor, Tensor] | None:
    """(out, lse) of the call of a `signature`; None unless one of that signature was prepared before, or one of other lengths of k and v."""
    call, plan = PREPARED.find(key), None
    if call is None:
        other = _of_other_lengths(key, q, k, v, pattern, options)
        if other is None:
            return None
        call, plan = other
    drawn = as_seed(seed) if options.dropout_p or seed is not None else None
    return run_prepared(call, key, tensors_of(q, k, v, options, drawn), options.environment, plan)


_Q_START = Options._fields.index("q_start")


def _of_other_lengths(
    key: tuple[Hashable, ...], q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, options: Options
) -> tuple[PreparedCall, Plan | None] | None:
    """A call that differs from a prepared one only in the lengths of k and v, as those of a cache that grows do: its arguments need no
    second check, and its plan and row follow from them.
    """
    family = _family(key, options.attention_mask, options.key_padding_mask)
    like = None if family is None else LENGTHS.find(family)
    if like is None or not 0 < (nq := q.shape[1]) <= (nk := k.shape[1]):
        return None
    spans: dict[str, Any] = {"k_spans": [0, nk, 1]}
    follows = options[_Q_START] is None
    if follows:
        spans["q_spans"] = last_positions(nq, nk, pattern.positional)
    arguments, tensors, plan = like.arguments._replace(**spans), OpTensors(q, k, v), None
    call = like.next_length(tensors, arguments) if follows else None
    if call is None:
        plan = find_plan(arguments, DEFAULT_ENVIRONMENT if options.environment is None else options.environment)
        call = PreparedCall(tensors, arguments, plan, like)
    PREPARED.keep(key, call)
    LENGTHS.keep(family, call)
    return call, plan


def _family(key: tuple[Hashable, ...], mask: object, key_padding: object) -> tuple[Hashable, ...] | None:
    """A signature without the lengths of k and v, and without their first stride, which may follow from it; None where k and v differ in
    length, or a mask has the same.
    """
    if mask is not None or key_padding is not None:
        return None
    place, text, q, k, v, *rest = key
    shapes: list[tuple[int, ...]] = [x[0] for x in (k, v)]  # type: ignore[index]
    if len(shapes[0]) != 4 or len(shapes[1]) != 4 or shapes[0][1] != shapes[1][1]:
        return None
    forms = [(shape[0], shape[2:], x[1][1:], x[2:]) for shape, x in zip(shapes, (k, v), strict=True)]  # type: ignore[index]
    return place, text, q, *forms, *rest


def run_prepared(
    call: PreparedCall,
    key: tuple[Hashable, ...],
    tensors: OpTensors,
    environment: Environment | None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the prepared call of a `signature`; differentiable where it was prepared so.

    environment: None is the default one. plan: the call's, where it was looked up already.
    """
    if environment is None:
        environment = DEFAULT_ENVIRONMENT
    if call.arguments.needs_grad:
        return _Direct.apply(tensors.q, tensors.k, tensors.v, (call, key, tensors, environment, plan))  # type: ignore[return-value]
    return _forward(call, key, tensors, environment, plan)


def prepare_and_run(
    key: tuple[Hashable, ...], tensors: OpTensors, arguments: OpArguments, environment: Environment | None
) -> tuple[Tensor, Tensor]:
    """The first call of a `signature`, whose arguments have been checked: (out, lse), and the memo knows the next one."""
    call, plan = prepare_checked(key, tensors, arguments, environment)
    return run_prepared(call, key, tensors, environment, plan)


def prepare_checked(
    key: tuple[Hashable, ...], tensors: OpTensors, arguments: OpArguments, environment: Environment | None
) -> tuple[PreparedCall, Plan]:
    """The prepared call of a `signature` whose arguments have been checked, and its plan; the memo knows it from now on."""
    environment = DEFAULT_ENVIRONMENT if environment is None else environment
    needs_grad = _is_grad_enabled() and any(x.requires_grad for x in tensors[:3])
    call, plan = prepared_for(tensors, arguments._replace(needs_grad=needs_grad), environment)
    PREPARED.keep(key, call)
    family = _family(key, tensors.bias if tensors.mask is None else tensors.mask, tensors.key_padding)
    if family is not None:
        LENGTHS.keep(family, call)
    return call, plan


def _forward(
    call: PreparedCall, key: tuple[Hashable, ...], tensors: OpTensors, environment: Environment, plan: Plan | None
) -> tuple[Tensor, Tensor]:
    if plan is None:
        computed = call.forward_without_plan(tensors, environment)
        if computed is not None:
            return computed
        plan = find_plan_of(call.plan_key, environment)
    if call.serves(plan):
        try:
            return call.forward(tensors, plan, environment)
        except RowFailure:
            # A row that was named raises; else `served` asks the table again, where the row now says why it refuses.
            PREPARED.clear()
            if call.arguments.backend:
                raise

    def compute(anew: PreparedCall, plan: Any) -> tuple[Tensor, Tensor]:
        call.successor = anew
        PREPARED.keep(key, anew)
        return anew.forward(tensors, plan, environment)

    return served(compute, tensors, call.arguments, environment, plan)


class _Direct(torch.autograd.Function):
    """A prepared call under autograd; saves q, k, v, out and lse, and what masks."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rest: Any) -> Any:  # type: ignore[override]
        """(q, k, v, (call, key, tensors, environment, plan)) -> (out, lse)."""
        call, key, tensors, environment, plan = rest
        out, lse = _forward(call, key, tensors, environment, plan)
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.save_for_backward(*tensors, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:  # type: ignore[override]
        """dq, dk, dv by the row that served the forward; through the op where somebody else looks on, or would differentiate again."""
        *saved, out, lse = ctx.saved_tensors
        tensors = OpTensors(*saved)
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        call: PreparedCall = ctx.call
        arguments, cotangents = call.arguments, Cotangents(grad_out, grad_lse, out, lse)
        if not is_plain() or _is_grad_enabled() or type(grad_out) is not Tensor:
            dq, dk, dv, *_ = torch.ops.longattn.attend_backward(*cotangents, *tensors, *arguments)
            return dq, dk, dv, None
        environment = find_environment(arguments.env, may_be_gone=True)
        plan = find_plan_of(call.plan_key, environment)
        if call.serves(plan):
            gradients = call.backward(cotangents, tensors, plan, environment)
        else:
            anew = rectangle_gradients(cotangents, tensors, arguments, environment, plan=plan)
            assert anew is not None
            gradients = anew
        return *gradients[:3], None
