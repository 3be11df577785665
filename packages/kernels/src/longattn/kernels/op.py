"""`longattn::attend` and `longattn::attend_backward`: the opaque border to torch.

A Plan is a Python object and cannot cross it, so the pattern travels as its canonical string, the rectangle as integers, and cache and
allocator as the name of an environment; plan look-up, the choice of a row and leasing happen inside, never in traced code. Fakes,
autograd and the FLOP formula of the raw ops are registered here; `entry.attend` is the caller's way in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from longattn.kernels.call import Call
from longattn.kernels.dispatch import Row, RowFailure, logger, select
from longattn.kernels.environment import Environment, find_environment
from longattn.kernels.problem import AttentionProblem, architecture_of
from longattn.kernels.state import state_dtype
from longattn.patterncache import Plan, Rectangle, Span, parse_pattern

T = TypeVar("T")
LIBRARY = torch.library.Library("longattn", "DEF")


class Asked(NamedTuple):
    """The arguments that both ops share, in their order: what is asked, without the tensors that have gradients.

    Attributes:
        mask: bool, broadcastable to (batch, heads, Nq, Nk), or None. key_padding: (batch, Nk) bool, or None.
        seed: 0-dim int64, or None without dropout.
        pattern: canonical string. q_spans, k_spans: flat (start, length, step) triples. heads: (total, first, count).
        needs_grad, bias_grad: whether q, k or v, and whether bias, will want a gradient.
        backend: a row's name, or ''. env: an environment's name, or ''.
    """

    mask: Tensor | None
    key_padding: Tensor | None
    seed: Tensor | None
    pattern: str
    q_spans: list[int]
    k_spans: list[int]
    heads: list[int]
    scale: float | None
    dropout_p: float
    needs_grad: bool
    bias_grad: bool
    backend: str
    deterministic: bool
    out_dtype: torch.dtype
    env: str


ASKED = (
    "Tensor? mask, Tensor? key_padding, Tensor? seed, str pattern, SymInt[] q_spans, SymInt[] k_spans, SymInt[] heads, "
    "float? scale, float dropout_p, bool needs_grad, bool bias_grad, str backend, bool deterministic, ScalarType out_dtype, str env"
)
LIBRARY.define(
    f"attend(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? prior_out, Tensor? prior_lse, {ASKED}) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "attend_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor out, Tensor lse, "
    f"{ASKED}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def find_plan(asked: Asked, environment: Environment) -> Plan:
    """The plan of what is asked, from the environment's cache."""
    key = (asked.pattern, tuple(asked.q_spans), tuple(asked.k_spans), tuple(asked.heads))
    return environment.cache.get_or_build(key, lambda: _build_plan(*key))


def _build_plan(pattern: str, q_spans: tuple[int, ...], k_spans: tuple[int, ...], heads: tuple[int, ...]) -> Plan:
    queries, keys = (tuple(Span(*flat[i : i + 3]) for i in range(0, len(flat), 3)) for flat in (q_spans, k_spans))
    return parse_pattern(pattern).plan(Rectangle(heads[0], queries, keys, Span(*heads[1:])))


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    prior: tuple[Tensor, Tensor] | None,
    asked: Asked,
    environment: Environment,
) -> tuple[Row, Call]:
    plan = find_plan(asked, environment)
    problem = AttentionProblem(
        device=q.device.type,
        dtype=q.dtype,
        heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim=q.shape[3],
        listed=plan.listed,
        attention_mask=asked.mask is not None,
        bias=bias is not None,
        bias_grad=asked.bias_grad,
        key_padding=asked.key_padding is not None,
        dropout=asked.dropout_p > 0,
        prior=prior is not None,
        backward=asked.needs_grad,
        deterministic=asked.deterministic,
        architecture=architecture_of(q.device),
    )
    row = select(problem, asked.backend or None)
    if asked.key_padding is not None and not row.capability.skips_padding:
        # 0 * NaN is NaN: what padding holds must not meet a product at all.
        k, v = (_without_padding(x, asked.key_padding, environment) for x in (k, v))
    call = Call(
        q,
        k,
        v,
        plan,
        scale=q.shape[-1] ** -0.5 if asked.scale is None else asked.scale,
        mask=_four_axes(asked.mask),
        bias=_four_axes(bias),
        key_padding=asked.key_padding,
        prior=prior,
        dropout_p=asked.dropout_p,
        seed=0 if asked.seed is None else int(asked.seed),
        out_dtype=asked.out_dtype,
        deterministic=asked.deterministic,
        allocator=environment.allocator,
    )
    return row, call


def _without_padding(x: Tensor, key_padding: Tensor, environment: Environment) -> Tensor:
    """A leased copy of k or v, zero in padded rows. Its memory goes back with the call's last reference."""
    own = environment.allocator.empty(x.shape, x.dtype, x.device, "temp")
    return own.copy_(x).masked_fill_(key_padding[:, :, None, None], 0)


def _four_axes(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))


def _served(compute: Callable[[Row, Call], T], asked: tuple[Any, ...]) -> T:
    """What the chosen row computes. One whose compiler fails refuses from then on, and the next serves, unless it was named."""
    with torch._C._DisableAutocast():
        while True:
            row, call = _prepare(*asked)
            try:
                return compute(row, call)
            except RowFailure as failure:
                if asked[5].backend:
                    raise
                logger.warning("row %s: %s", row.name, failure)


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
    shared = Asked(*asked)
    environment = find_environment(shared.env)

    def compute(row: Row, call: Call) -> tuple[Tensor, Tensor]:
        return row.forward(call)

    return _served(compute, (q, k, v, bias, prior, shared, environment))


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
    shared = Asked(*asked)
    environment = find_environment(shared.env, may_be_gone=True)

    def compute(row: Row, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return row.backward(call, grad_out, grad_lse, out, lse, shared.bias_grad)

    dq, dk, dv, dbias = _served(compute, (q, k, v, bias, None, shared, environment))
    return dq, dk, dv, q.new_empty(0) if dbias is None or bias is None else dbias.reshape(bias.shape)


def _attend_fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, prior_out: Any, prior_lse: Any, *asked: Any
) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:3], v.shape[3]), dtype=Asked(*asked).out_dtype)
    return out, q.new_empty(q.shape[:3], dtype=state_dtype(q.dtype))


def _attend_backward_fake(
    grad_out: Any, grad_lse: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Any, lse: Any, *asked: Any
) -> tuple[Tensor, ...]:
    wanted = bias is not None and Asked(*asked).bias_grad
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
    asked = Asked(mask, key_padding, seed, *ctx.rest)
    backward = torch.ops.longattn.attend_backward
    dq, dk, dv, dbias = backward(grad_out, grad_lse, q, k, v, bias, out, lse, *asked)
    return (dq, dk, dv, dbias if asked.bias_grad else None, *(None,) * (2 + len(Asked._fields)))


def no_second_order(ctx: Any, *grads: Any) -> NoReturn:
    """Raise: the backward op has no derivative."""
    raise NotImplementedError("longattn::attend_backward is not differentiable: second derivatives are not supported")


def _forward_flops(q: list[int], k: list[int], v: list[int], *rest: Any, **_: Any) -> int:
    # Two products of 2 * head_dim operations for each visible pair.
    plan = find_plan(Asked(*rest[3:]), find_environment(""))
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
