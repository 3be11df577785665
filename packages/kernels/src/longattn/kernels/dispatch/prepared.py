"""`PreparedCall`: a call that was looked up once, and the memo of those.

A call's signature is everything but data: shapes, strides, dtypes, devices, pattern, options, which gradients are wanted, and the
settings of the process that a choice depends on. For each signature the memo holds which row serves and in which form. The plan is
looked up in the environment's cache at every call, so that its statistics and its limits hold; where the cache has another plan than
before (it was reset, or the plan was evicted), the call is prepared anew.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from longattn.kernels.dispatch.call import Call, GradientPart
from longattn.kernels.dispatch.choosing import select
from longattn.kernels.dispatch.environment import Environment
from longattn.kernels.dispatch.memo import Memo
from longattn.kernels.dispatch.plans import find_plan, plan_key, plans_ahead
from longattn.kernels.dispatch.settings import raw_settings
from longattn.kernels.dispatch.table import RowFailure, TableRow, twice_differentiable
from longattn.kernels.ops.arguments import Cotangents, Gradients, OpArguments, OpTensors
from longattn.kernels.problem import AttentionProblem, architecture_of
from longattn.kernels.state import state_dtype
from longattn.patterncache import Plan

logger = logging.getLogger("longattn.kernels")

T = TypeVar("T")
Bound = Callable[..., "tuple[Tensor, Tensor] | None"]
"""A forward with everything but pointers and seed in place: see `TableRow.bind`."""


class PreparedCall:
    """The row, and the form of its call, for one signature.

    Args:
        like: the call of the same signature but for lengths of k and v, from which what does not depend on them is taken.

    Attributes:
        arguments: the op's arguments. plan_key: the pattern cache's key. problem: as the table was asked. row: who serves.
        used: whether it was looked up since the memo last passed over it.
        successor: the same call prepared with a newer plan, once the cache had one.
    """

    __slots__ = (
        "_ahead",
        "_backward",
        "_forward",
        "_like",
        "_plan",
        "_steps",
        "_unbound_calls",
        "arguments",
        "plan_key",
        "problem",
        "row",
        "scale",
        "successor",
        "used",
    )

    def __init__(self, tensors: OpTensors, arguments: OpArguments, plan: Plan, like: PreparedCall | None = None):
        q = tensors.q
        self.arguments = arguments
        self.used = False
        self.successor: PreparedCall | None = None
        self.scale = q.shape[-1] ** -0.5 if arguments.scale is None else arguments.scale
        self.plan_key = plan_key(arguments)
        # Weak: the pattern cache decides how long a plan lives.
        self._plan = weakref.ref(plan)
        self._forward: Bound | None = None
        self._backward: dict[Hashable, Any] = {}
        # Forwards since it could last be bound. The second is bound: the lengths of a cache that grows come once each.
        self._unbound_calls = 0
        if like is None:
            self.problem = _problem_of(tensors, arguments, plan)
        else:
            same = like.problem.listed == plan.listed
            self.problem = like.problem if same else replace(like.problem, listed=plan.listed)
        self.row: TableRow = select(self.problem, arguments.backend or None, plan, q.shape[0])
        self._like: Bound | None = None
        # What binds the lengths to come, and how many before this one came one after the other.
        self._ahead: Any = None
        self._steps = 0 if like is None else like.steps_to(arguments)
        if like is not None and self.row is like.row and self.row.rebind is not None:
            # Bound at once, for lengths to come.
            self._like, self._unbound_calls = like._forward, 1

    def steps_to(self, arguments: OpArguments) -> int:
        """How many calls, this one included, came one after the other with a key more each, where a call of these arguments is the next; else 0."""
        return self._steps + 1 if arguments.k_spans[1] == self.arguments.k_spans[1] + 1 else 0

    def next_length(self, tensors: OpTensors, arguments: OpArguments) -> PreparedCall | None:
        """The call of one key more of a cache that grows, without its plan; None where the row makes nothing ready, or for another form.

        Plans of some lengths are made at once and nobody keeps them: what the call needs of its own was worked out. So the pattern cache is not asked.
        """
        steps, ahead = self.steps_to(arguments), self._ahead
        if steps < _STEPS_BEFORE or self._forward is None or self.row.bind_ahead is None or arguments.needs_grad:
            return None
        if tensors.q.shape[1] != 1 or (self.row.refusal is not None and self.row.refusal() is not None):
            return None
        if ahead is None:
            serves = partial(self._would_serve, tensors.q.shape[0])
            ahead = self.row.bind_ahead(self._forward, partial(plans_ahead, arguments, serves))
        bound = None if ahead is None else ahead(tensors.q, tensors.k, tensors.v)
        if bound is None:
            return None
        call = object.__new__(PreparedCall)
        call.arguments, call.plan_key, call.problem = arguments, plan_key(arguments), self.problem
        call.row, call.scale, call.used, call.successor = self.row, self.scale, False, None
        call._plan, call._forward, call._backward, call._like = _no_plan, bound, {}, None
        call._ahead, call._steps, call._unbound_calls = ahead, steps, 1
        return call

    def _would_serve(self, batch: int, plan: Plan) -> bool:
        return select(self.problem, self.arguments.backend or None, plan, batch) is self.row

    def forward_without_plan(self, tensors: OpTensors, environment: Environment) -> tuple[Tensor, Tensor] | None:
        """`forward` of a call that was made by `next_length`; None for others, and where it must be prepared with its plan."""
        forward = None if self._ahead is None else self._forward
        return forward and forward(tensors.q, tensors.k, tensors.v, tensors.seed, environment.allocator)

    def serves(self, plan: Plan) -> bool:
        """Whether this is the very plan that the call was prepared with."""
        return self._plan() is plan

    @property
    def plan(self) -> Plan | None:
        """That plan, as long as somebody holds it."""
        return self._plan()

    def call(
        self,
        tensors: OpTensors,
        plan: Plan,
        environment: Environment,
        total: Tensor | None = None,
        part: GradientPart | None = None,
    ) -> Call:
        """The call as a row takes it; total: what the gradient of by_distance is added to."""
        arguments = self.arguments
        q, k, v, bias, by_distance, mask, key_padding, seed, prior_out, prior_lse, *_ = tensors
        if key_padding is not None and not self.row.capability.skips_padding:
            # 0 * NaN is NaN: what padding holds must not meet a product at all.
            k, v = (_without_padding(x, key_padding, environment) for x in (k, v))
        return Call(
            q,
            k,
            v,
            plan,
            scale=self.scale,
            mask=_four_axes(mask),
            bias=_four_axes(bias),
            key_padding=key_padding,
            prior=None if prior_out is None or prior_lse is None else (prior_out, prior_lse),
            dropout_p=arguments.dropout_p,
            seed=0 if seed is None else int(seed),
            out_dtype=arguments.out_dtype,
            deterministic=arguments.deterministic,
            allocator=environment.allocator,
            softcap=arguments.softcap,
            by_distance=None if by_distance is None else by_distance.to(state_dtype(q.dtype)).contiguous(),
            by_distance_grad=total,
            part=part,
        )

    def forward(self, tensors: OpTensors, plan: Plan, environment: Environment) -> tuple[Tensor, Tensor]:
        """(out, lse) of tensors of this signature."""
        if self._like is not None and self.row.rebind is not None:
            self._forward, self._like = self.row.rebind(self._like, self.call(tensors, plan, environment)), None
        if self._forward is not None:
            computed = self._forward(tensors.q, tensors.k, tensors.v, tensors.seed, environment.allocator)
            if computed is not None:
                return computed
            self._forward, self._unbound_calls = None, 1
        call = self.call(tensors, plan, environment)
        computed = self.row.forward(call)
        self._unbound_calls += 1
        if self._unbound_calls == 2 and self.row.bind is not None:
            self._forward = self.row.bind(call, *computed)
        return computed

    def backward(
        self,
        cotangents: Cotangents,
        tensors: OpTensors,
        plan: Plan,
        environment: Environment,
        part: GradientPart | None = None,
    ) -> Gradients:
        """dq, dk, dv, dbias and the gradient of by_distance; part as in `Call`."""
        grad_out, grad_lse, out, lse = cotangents
        key = (
            grad_out.stride(),
            grad_out.dtype,
            None if grad_lse is None else grad_lse.stride(),
            out.stride(),
            out.dtype,
            None if part is None else part.dq is None,
        )
        bound = self._backward.get(key)
        if bound:
            gradients = bound(cotangents, tensors, environment.allocator, part)
            if gradients is not None:
                return (*gradients, None)
            bound = None
        total = None
        if self.arguments.by_distance_grad and tensors.by_distance is not None:
            total = torch.zeros_like(tensors.by_distance, dtype=state_dtype(tensors.q.dtype))
        call = self.call(tensors, plan, environment, total, part)
        gradients = self.row.backward(call, grad_out, grad_lse, out, lse, self.arguments.bias_grad)
        if bound is None and self.row.bind_backward is not None and len(self._backward) < _MOST_GRADIENT_FORMS:
            self._backward[key] = self.row.bind_backward(call, grad_out, grad_lse, out, lse, gradients) or False
        return (*gradients, total)

    def second_backward(
        self,
        above: list[Tensor | None],
        cotangents: Cotangents,
        tensors: OpTensors,
        plan: Plan,
        environment: Environment,
    ) -> list[Tensor | None]:
        """Gradients of grad_out, grad_lse, out, lse, q, k, v and bias, from those of dq, dk, dv and dbias.

        Raises:
            NotImplementedError: the row has no second derivative; the message names those that have.
        """
        if self.row.second_backward is None:
            raise NotImplementedError(
                f"second derivatives are not supported by the row {self.row.name}, which served: give backend= one of "
                f"{', '.join(twice_differentiable())}"
            )
        return self.row.second_backward(self.call(tensors, plan, environment), above, cotangents)


_STEPS_BEFORE = 2
"""Calls that came one after the other with a key more each, before the row makes lengths ready that nobody asked for."""


def _no_plan() -> None:
    """Stands for the reference to a plan."""


def _problem_of(tensors: OpTensors, arguments: OpArguments, plan: Plan) -> AttentionProblem:
    """The call as the table is asked for it."""
    q, k, v = tensors[:3]
    return AttentionProblem(
        device=q.device.type,
        dtype=q.dtype,
        heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim=q.shape[3],
        value_head_dim=v.shape[3],
        listed=plan.listed,
        attention_mask=tensors.mask is not None,
        bias=tensors.bias is not None,
        bias_grad=arguments.bias_grad,
        softcap=arguments.softcap > 0,
        by_distance=tensors.by_distance is not None,
        by_distance_grad=arguments.by_distance_grad,
        key_padding=tensors.key_padding is not None,
        dropout=arguments.dropout_p > 0,
        prior=tensors.prior_out is not None,
        backward=arguments.needs_grad,
        deterministic=arguments.deterministic,
        architecture=architecture_of(q.device),
    )


_MOST_GRADIENT_FORMS = 16
"""Layouts of gradients that a prepared call keeps a bound backward for."""

PREPARED: Memo[Any] = Memo(max_size=1024)
"""Every prepared call of this process, by its signature: that of a public function's arguments, or of the op's. A whole schedule's stand here too."""

LENGTHS: Memo[PreparedCall] = Memo(max_size=256)
"""The latest prepared call of each signature without the lengths of k and v, from which the next length follows."""


def prepared_for(
    tensors: OpTensors, arguments: OpArguments, environment: Environment, plan: Plan | None = None
) -> tuple[PreparedCall, Plan]:
    """The prepared call of the op's arguments, and its plan: the given one, or what the environment's cache holds.

    Raises:
        ValueError: no row fits; the message gives each row's reasons.
    """
    key = rectangle_key(tensors, arguments)
    prepared = PREPARED.find(key)
    plan = find_plan(arguments, environment) if plan is None else plan
    if prepared is None or not prepared.serves(plan):
        prepared = PreparedCall(tensors, arguments, plan)
        PREPARED.keep(key, prepared)
    return prepared, plan


def rectangle_key(tensors: OpTensors, arguments: OpArguments) -> tuple[Hashable, ...]:
    """What the memo knows a call of the op by."""
    forms = tuple(None if x is None else described(x) for x in tensors)
    where = plan_key(arguments)
    return (forms, where, arguments[len(where) :], *process_settings())


def served(
    compute: Callable[[PreparedCall, Plan], T],
    tensors: OpTensors,
    arguments: OpArguments,
    environment: Environment,
    plan: Plan | None = None,
) -> T:
    """What the chosen row computes. One whose compiler fails refuses from then on, and the next serves, unless it was named."""
    while True:
        prepared, current = prepared_for(tensors, arguments, environment, plan)
        try:
            return compute(prepared, current)
        except RowFailure as failure:
            PREPARED.clear()
            if arguments.backend:
                raise
            logger.warning("row %s: %s", prepared.row.name, failure)


def described(x: Tensor) -> tuple[Hashable, ...]:
    """What of a tensor decides how it is computed with."""
    return x.shape, x.stride(), x.dtype, None if x.is_cpu else x.device


def process_settings() -> tuple[Hashable, ...]:
    """What of the process decides which row serves, and how."""
    return torch.get_num_threads(), torch.get_float32_matmul_precision(), *raw_settings()


def _without_padding(x: Tensor, key_padding: Tensor, environment: Environment) -> Tensor:
    """A leased copy of k or v, zero in padded rows. Its memory goes back with the call's last reference."""
    own = environment.allocator.empty(x.shape, x.dtype, x.device, "temp")
    return own.copy_(x).masked_fill_(key_padding[:, :, None, None], 0)


def _four_axes(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))
