"""`longattn::attend` and `longattn::attend_backward`: the opaque border to torch.

A Plan is a Python object and cannot cross it, so the pattern travels as its canonical string and the rectangle as integers; plan
look-up and the choice of a row happen inside, never in traced code. Autograd, fakes and vmap are registered here, for the raw ops;
`entry.attend` is the caller's way in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from longattn.kernels.dispatch import Row, select
from longattn.kernels.problem import AttentionProblem
from longattn.kernels.state import state_dtype
from longattn.kernels.tiles import Call
from longattn.patterncache import Plan, Rectangle, Span, get_global_pattern_cache, parse_pattern

LIBRARY = torch.library.Library("longattn", "DEF")

# The rectangle and the options, the same for both ops: what is asked, without the differentiable tensors.
_ASKED = (
    "Tensor? mask, Tensor? key_padding, str pattern, SymInt[] q_spans, SymInt[] k_spans, SymInt[] heads, "
    "float? scale, str backend, bool deterministic, ScalarType out_dtype"
)
LIBRARY.define(
    f"attend(Tensor q, Tensor k, Tensor v, Tensor? prior_out, Tensor? prior_lse, {_ASKED}) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "attend_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_ASKED}) -> (Tensor, Tensor, Tensor)"
)

Asked = tuple[Any, ...]
"""mask, key_padding, pattern, q_spans, k_spans, heads, scale, backend, deterministic, out_dtype: in the ops' order."""


def find_plan(pattern: str, q_spans: list[int], k_spans: list[int], heads: list[int]) -> Plan:
    """The plan of a canonical string on a rectangle: spans as flat (start, length, step) triples, heads as (total, first, count)."""
    key = (pattern, tuple(q_spans), tuple(k_spans), tuple(heads))
    return get_global_pattern_cache().get_or_build(key, lambda: _build_plan(*key))


def _build_plan(pattern: str, q_spans: tuple[int, ...], k_spans: tuple[int, ...], heads: tuple[int, ...]) -> Plan:
    queries, keys = (tuple(Span(*flat[i : i + 3]) for i in range(0, len(flat), 3)) for flat in (q_spans, k_spans))
    return parse_pattern(pattern).plan(Rectangle(heads[0], queries, keys, Span(*heads[1:])))


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, prior: tuple[Tensor, Tensor] | None, backward: bool, asked: Asked
) -> tuple[Row, Call]:
    mask, key_padding, pattern, q_spans, k_spans, heads, scale, backend, deterministic, out_dtype = asked
    plan = find_plan(pattern, q_spans, k_spans, heads)
    problem = AttentionProblem(
        device=q.device.type,
        dtype=q.dtype,
        heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim=q.shape[3],
        listed=plan.listed,
        attention_mask=mask is not None,
        key_padding=key_padding is not None,
        prior=prior is not None,
        backward=backward,
        deterministic=deterministic,
    )
    row = select(problem, backend or None)
    if key_padding is not None:
        # 0 * NaN is NaN: what padding holds must not meet a product at all.
        hidden = key_padding[:, :, None, None]
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return row, Call(q, k, v, plan, scale, mask, key_padding, prior, out_dtype, deterministic)


def _attend(q: Tensor, k: Tensor, v: Tensor, prior_out: Tensor | None, prior_lse: Tensor | None, *asked: Any):
    prior = None if prior_out is None or prior_lse is None else (prior_out, prior_lse)
    row, call = _prepare(q, k, v, prior, False, asked)
    return row.forward(call)


def _attend_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *asked: Any
):
    row, call = _prepare(q, k, v, None, True, asked)
    return row.backward(call, grad_out, grad_lse, out, lse)


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, prior_out: Tensor | None, prior_lse: Tensor | None, *asked: Any):
    out = q.new_empty((*q.shape[:3], v.shape[3]), dtype=asked[-1])
    return out, q.new_empty(q.shape[:3], dtype=state_dtype(q.dtype))


def _attend_backward_fake(grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, prior_out, _, mask, key_padding, *rest = inputs
    if prior_out is not None and any(ctx.needs_input_grad[:5]):
        raise NotImplementedError(
            "longattn::attend has no gradient through a prior; call longattn.kernels.attend, which merges"
        )
    ctx.set_materialize_grads(False)
    ctx.rest = rest
    ctx.save_for_backward(q, k, v, *output, mask, key_padding)


def gradients(
    ctx: Any,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    call: Callable[..., Any] = torch.ops.longattn.attend_backward,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) through `call`, the backward op, from what `_setup` saved."""
    q, k, v, out, lse, mask, key_padding = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    return call(grad_out, grad_lse, q, k, v, out, lse, mask, key_padding, *ctx.rest)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None):
    return (*gradients(ctx, grad_out, grad_lse), *(None,) * 12)


def no_second_order(ctx: Any, *grads: Any) -> NoReturn:
    """Raise: the backward op has no derivative."""
    raise NotImplementedError("longattn::attend_backward is not differentiable: second derivatives are not supported")


LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")
LIBRARY.impl("attend_backward", _attend_backward, "CompositeExplicitAutograd")
torch.library.register_fake("longattn::attend", _attend_fake, lib=LIBRARY)
torch.library.register_fake("longattn::attend_backward", _attend_backward_fake, lib=LIBRARY)
torch.library.register_autograd("longattn::attend", _backward, setup_context=_setup, lib=LIBRARY)
torch.library.register_autograd("longattn::attend_backward", no_second_order, lib=LIBRARY)
