"""`attend` and `explain`: the front door of the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longattn.kernels import op
from longattn.kernels.check import (
    check_attention_mask,
    check_device_type,
    check_dtype,
    check_flag,
    check_key_padding,
    check_prior,
    check_qkv,
    check_scale,
    check_shapes,
    flat_spans,
)
from longattn.kernels.dispatch import Explanation, check_backend_name, explain_problem
from longattn.kernels.problem import AttentionProblem
from longattn.kernels.state import AttentionState, merge, state_dtype
from longattn.patterncache import Pattern, Rectangle, Span


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    is_causal: bool | None = None,
    prior: AttentionState | None = None,
    q_spans: Span | tuple[Span, ...] | None = None,
    k_spans: Span | tuple[Span, ...] | None = None,
    heads: Span | None = None,
    num_heads: int | None = None,
    softmax_scale: float | None = None,
    attention_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    backend: str | None = None,
    deterministic: bool | None = None,
    out_dtype: torch.dtype | None = None,
) -> AttentionState:
    """softmax(scale * q k^T + log counts) v over one rectangle of heads x queries x keys, as a state.

    Differentiable in q, k, v and prior, once. Shapes are (batch, seq, heads, head_dim).

    Args:
        q: (batch, Nq, heads, head_dim), float16, bfloat16, float32 or float64.
        k, v: (batch, Nk, kv_heads, head_dim), same dtype and device; kv_heads divides heads (GQA, MQA).
        pattern: who sees whom.
        is_causal: replaces the pattern's causal field; None takes it.
        prior: a state over other keys to merge onto; it is read, never written.
        q_spans, k_spans: positions of the rows in the whole sequence. Default: keys are 0 .. Nk, queries the last Nq of them.
        heads: the global query heads that q holds. Default: all.
        num_heads: query heads of the whole module. Default: those of q.
        softmax_scale: default head_dim ** -0.5.
        attention_mask: bool, True = may see, broadcastable to (batch, heads, Nq, Nk).
        key_padding_mask: (batch, Nk) bool, True = padding. What padded rows of k and v hold reaches nothing.
        backend: name of the row that must serve; None picks (see `explain`).
        deterministic: equal inputs give equal bits. Default: torch.are_deterministic_algorithms_enabled().
        out_dtype: dtype of the returned out. Default float32 (float64 for float64): states are rounded once, at the end.

    Returns:
        AttentionState: out (batch, Nq, heads, head_dim); lse (batch, Nq, heads), natural log, -inf = saw no key.

    Raises:
        TypeError, ValueError: a bad argument, by name; or no row fits, with each one's reasons.
    """
    check_qkv(q, k, v)
    if not isinstance(pattern, Pattern):
        raise TypeError(
            f"pattern must be a Pattern such as Dilated or Window, got {pattern!r} ({type(pattern).__name__})"
        )
    check_flag("is_causal", is_causal)
    check_attention_mask(attention_mask, q, k)
    check_key_padding(key_padding_mask, q, k)
    check_scale(softmax_scale)
    check_flag("deterministic", deterministic)
    check_backend_name(backend)
    check_prior(prior, q)
    check_dtype("out_dtype", out_dtype)
    if is_causal is not None and is_causal != pattern.causal:
        pattern = pattern.with_causal(is_causal)
    if q_spans is None and q.shape[1] > k.shape[1] and pattern.positional:
        raise ValueError(
            f"q_start (or q_spans) must be given where queries outnumber keys and positions matter, got Nq={q.shape[1]}, Nk={k.shape[1]}"
        )
    rectangle = (
        _last(q.shape[1], k.shape[1]) if q_spans is None else flat_spans("q_spans", q_spans, q.shape[1]),
        [0, k.shape[1], 1] if k_spans is None else flat_spans("k_spans", k_spans, k.shape[1]),
        _heads(q.shape[2], heads, num_heads),
    )
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    out_dtype = state_dtype(q.dtype) if out_dtype is None else out_dtype
    asked = (
        attention_mask,
        key_padding_mask,
        pattern.canonical(),
        *rectangle,
        softmax_scale,
        backend or "",
        deterministic,
    )
    return run(q, k, v, prior, (*asked, out_dtype))


def run(q: Tensor, k: Tensor, v: Tensor, prior: AttentionState | None, asked: op.Asked) -> AttentionState:
    """`attend` without its checks, on the op's own arguments."""
    graded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    transformed = torch._C._are_functorch_transforms_active()
    if prior is not None and (transformed or (torch.is_grad_enabled() and (graded or _needs_grad(prior)))):
        # The op reads a prior without a gradient; `merge` has one.
        merged = merge(prior, run(q, k, v, None, (*asked[:-1], prior.out.dtype)))
        return AttentionState(merged.finalize(asked[-1]), merged.lse)
    if transformed:
        # torch.compile refuses one tensor in two places of an autograd.Function.
        k = k.view_as(k) if k is q else k
        v = v.view_as(v) if v is q or v is k else v
        return AttentionState(*_Attend.apply(q, k, v, *asked))  # type: ignore[misc]
    partial = (None, None) if prior is None else (prior.out, prior.lse)
    return AttentionState(*torch.ops.longattn.attend(q, k, v, *partial, *asked))


class _Attend(torch.autograd.Function):
    """The op as torch.func's transforms want it: forward without ctx, setup_context. Otherwise the raw op's own autograd serves."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *asked: Any) -> Any:  # type: ignore[override]
        return torch.ops.longattn.attend(q, k, v, None, None, *asked)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        q, k, v, mask, key_padding, *rest = inputs
        ctx.set_materialize_grads(False)
        ctx.rest = rest
        ctx.save_for_backward(q, k, v, *output, mask, key_padding)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]
        return (*op.gradients(ctx, *grads, call=_Gradients.apply), *(None,) * 10)


class _Gradients(torch.autograd.Function):
    """The backward op, likewise."""

    @staticmethod
    def forward(*inputs: Any) -> Any:  # type: ignore[override]
        return torch.ops.longattn.attend_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]
        op.no_second_order(ctx, *grads)


def explain(
    pattern: Pattern,
    q_shape: tuple[int, int, int, int],
    k_shape: tuple[int, int, int, int] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    is_causal: bool | None = None,
    attention_mask: bool = False,
    key_padding_mask: bool = False,
    requires_grad: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> Explanation:
    """Which row would serve, and every other row's reasons, without data and without the device.

    Args:
        pattern: who sees whom.
        q_shape, k_shape: (batch, seq, heads, head_dim); k_shape defaults to q_shape.
        dtype: default torch's default dtype.
        device: any device or type, such as "cuda", whether or not this machine has one. Default "cpu".
        is_causal, backend: as in `attend`.
        attention_mask, key_padding_mask, requires_grad, deterministic: whether the call would have them.

    Returns:
        Explanation; its `backend` is the row's name (None: nothing fits), and its text a line per row.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """
    if not isinstance(pattern, Pattern):
        raise TypeError(
            f"pattern must be a Pattern such as Dilated or Window, got {pattern!r} ({type(pattern).__name__})"
        )
    k_shape = q_shape if k_shape is None else k_shape
    check_shapes(q_shape, k_shape)
    check_dtype("dtype", dtype)
    wanted = {
        "attention_mask": attention_mask,
        "key_padding_mask": key_padding_mask,
        "requires_grad": requires_grad,
        "deterministic": deterministic,
    }
    for name, flag in wanted.items():
        check_flag(name, flag)
    check_backend_name(backend)
    if is_causal is not None and check_flag("is_causal", is_causal) != pattern.causal:
        pattern = pattern.with_causal(is_causal)
    q_start, nq, step = _last(q_shape[1], k_shape[1])
    rectangle = Rectangle(q_shape[2], (Span(q_start, nq, step),), (Span(0, k_shape[1]),))
    problem = AttentionProblem(
        device=check_device_type(device),
        dtype=torch.get_default_dtype() if dtype is None else dtype,
        heads=q_shape[2],
        kv_heads=k_shape[2],
        head_dim=q_shape[3],
        listed=pattern.plan(rectangle).listed,
        attention_mask=attention_mask,
        key_padding=key_padding_mask,
        backward=requires_grad,
        deterministic=deterministic,
    )
    return explain_problem(problem, backend)


def _last(nq: int, nk: int) -> list[int]:
    """Queries are the last Nq positions of the keys; where positions do not matter and they outnumber keys, any will do."""
    return [nk - nq if nq <= nk else 0, nq, 1]


def _heads(local: int, heads: Span | None, num_heads: int | None) -> list[int]:
    if heads is None:
        first = 0
    elif not isinstance(heads, Span) or heads.length != local or heads.step != 1:
        raise ValueError(f"heads must be None or a Span of {local} neighbouring heads, as many as q has, got {heads!r}")
    else:
        first = heads.start
    total = local if num_heads is None else num_heads
    if isinstance(total, bool) or not isinstance(total, int) or total < first + local:
        raise ValueError(
            f"num_heads must be an integer >= {first + local}, the heads up to the last of q, got {num_heads!r}"
        )
    return [total, first, local]


def _needs_grad(state: AttentionState) -> bool:
    return state.out.requires_grad or state.lse.requires_grad
