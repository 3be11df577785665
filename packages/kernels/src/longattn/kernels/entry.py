"""`attend`: the front door of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.autograd import forward_ad

from longattn.kernels.check import (
    check_attention_mask,
    check_dropout,
    check_dtype,
    check_environment,
    check_flag,
    check_key_padding,
    check_prior,
    check_qkv,
    check_scale,
    check_sinks,
    refuse_torchscript,
)
from longattn.kernels.dispatch.environment import Environment
from longattn.kernels.dispatch.table import check_backend_name
from longattn.kernels.ops import direct
from longattn.kernels.ops.arguments import OpArguments
from longattn.kernels.ops.transforms import Attend
from longattn.kernels.philox import as_seed
from longattn.kernels.positions import flat_heads, flat_spans, last_positions
from longattn.kernels.state import AttentionState, add_sink, merge, state_dtype
from longattn.patterncache import Pattern, Span

_AUTOCAST = (torch.float16, torch.bfloat16, torch.float32)


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
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    sink_logits: Tensor | None = None,
    backend: str | None = None,
    deterministic: bool | None = None,
    out_dtype: torch.dtype | None = None,
    environment: Environment | None = None,
) -> AttentionState:
    """softmax(scale * q k^T + log counts) v over one rectangle of heads x queries x keys, as a state.

    Differentiable once in q, k, v, prior, sink_logits and a floating attention_mask. Shapes are (batch, seq, heads, head_dim).
    Under autocast, q, k and v are cast to its dtype.

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
        attention_mask: bool, True = may see, or floating, added to the scaled scores; broadcastable to (batch, heads, Nq, Nk).
        key_padding_mask: (batch, Nk) bool, True = padding. What padded rows of k and v hold reaches nothing.
        dropout_p: probability in [0, 1) of dropping a (query, key) pair, by Philox on their positions (see `philox`). lse is undropped.
        seed: 0-dim int64 CPU tensor or integer that decides which. Default: drawn from torch's generator.
        sink_logits: (heads,), a learned sink per head: merges the state (out 0, lse = logit) once, at the end.
        backend: name of the row that must serve; None picks (see `explain`).
        deterministic: equal inputs give equal bits. Default: torch.are_deterministic_algorithms_enabled().
        out_dtype: dtype of the returned out. Default float32 (float64 for float64): states are rounded once, at the end.
        environment: where plans are cached and memory comes from. Default: the global cache, plain torch; always so in traced code.

    Returns:
        AttentionState: out (batch, Nq, heads, head_dim); lse (batch, Nq, heads), natural log, -inf = saw no key.

    Raises:
        TypeError, ValueError: a bad argument, by name; or no row fits, with each one's reasons.
    """
    key = None
    if (
        prior is None
        and q_spans is None
        and k_spans is None
        and heads is None
        and num_heads is None
        and sink_logits is None
    ):
        key = direct.signature(
            "attend",
            q,
            k,
            v,
            pattern,
            is_causal=is_causal,
            softmax_scale=softmax_scale,
            attention_mask=attention_mask,
            key_padding_mask=key_padding_mask,
            dropout_p=dropout_p,
            backend=backend,
            deterministic=deterministic,
            environment=environment,
            out_dtype=out_dtype,
        )
        prepared = None if key is None else direct.find_prepared(key)
        if key is not None and prepared is not None:
            drawn = as_seed(seed) if dropout_p or seed is not None else None
            return AttentionState(
                *direct.run_prepared(prepared, key, q, k, v, attention_mask, key_padding_mask, drawn, environment)
            )
    refuse_torchscript()
    q, k, v = autocast(q, k, v)
    bias, asked = check_and_ask(
        q,
        k,
        v,
        pattern,
        is_causal=is_causal,
        prior=prior,
        q_spans=q_spans,
        k_spans=k_spans,
        heads=heads,
        num_heads=num_heads,
        softmax_scale=softmax_scale,
        attention_mask=attention_mask,
        key_padding_mask=key_padding_mask,
        dropout_p=dropout_p,
        seed=seed,
        sink_logits=sink_logits,
        backend=backend,
        deterministic=deterministic,
        out_dtype=out_dtype,
        environment=environment,
    )
    if key is not None:
        return AttentionState(*direct.prepare_and_run(key, q, k, v, bias, asked, environment))
    state = run(q, k, v, bias, prior, asked)
    if sink_logits is None:
        return state
    state = add_sink(state, sink_logits)
    return AttentionState(state.finalize(state_dtype(q.dtype) if out_dtype is None else out_dtype), state.lse)


def check_and_ask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    is_causal: bool | None,
    prior: AttentionState | None,
    q_spans: Span | tuple[Span, ...] | None,
    k_spans: Span | tuple[Span, ...] | None,
    heads: Span | None,
    num_heads: int | None,
    softmax_scale: float | None,
    attention_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | int | None,
    sink_logits: Tensor | None,
    backend: str | None,
    deterministic: bool | None,
    out_dtype: torch.dtype | None,
    environment: Environment | None,
) -> tuple[Tensor | None, OpArguments]:
    """The arguments of `attend`, checked: the bias, and what else the op is asked.

    Raises:
        TypeError, ValueError: a bad argument, by name.
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
    check_dropout("dropout_p", dropout_p)
    check_sinks(sink_logits, q)
    check_backend_name(backend)
    check_prior(prior, q)
    check_dtype("out_dtype", out_dtype)
    check_environment(environment)
    if is_causal is not None and is_causal != pattern.causal:
        pattern = pattern.with_causal(is_causal)
    rectangle = (
        last_positions(q.shape[1], k.shape[1], pattern.positional)
        if q_spans is None
        else flat_spans("q_spans", q_spans, q.shape[1]),
        [0, k.shape[1], 1] if k_spans is None else flat_spans("k_spans", k_spans, k.shape[1]),
        flat_heads(q.shape[2], heads, num_heads),
    )
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    out_dtype = state_dtype(q.dtype) if out_dtype is None else out_dtype
    floating = attention_mask is not None and attention_mask.dtype != torch.bool
    bias = attention_mask if floating else None
    return bias, OpArguments(
        None if floating else attention_mask,
        key_padding_mask,
        as_seed(seed) if dropout_p or seed is not None else None,
        pattern.canonical(),
        *rectangle,
        scale=softmax_scale,
        dropout_p=float(dropout_p),
        needs_grad=False,
        bias_grad=False,
        backend=backend or "",
        deterministic=deterministic,
        out_dtype=out_dtype if sink_logits is None else state_dtype(q.dtype),
        env="" if environment is None or torch.compiler.is_compiling() else environment.name,
    )


def run(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, prior: AttentionState | None, asked: OpArguments
) -> AttentionState:
    """`attend` without its checks, on the op's own arguments; fills in what wants a gradient."""
    refuse_tangents(q, k, v, bias, *(() if prior is None else (prior.out, prior.lse)))
    transformed = torch._C._are_functorch_transforms_active()
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (q, k, v, bias)]
    # Inside a transform requires_grad says little: any tensor may be differentiated.
    asked = asked._replace(
        needs_grad=any(wanted) or transformed, bias_grad=wanted[3] or (transformed and bias is not None)
    )
    if prior is not None and (asked.needs_grad or (torch.is_grad_enabled() and _needs_grad(prior))):
        # The op reads a prior without a gradient; `merge` has one.
        merged = merge(prior, run(q, k, v, bias, None, asked._replace(out_dtype=prior.out.dtype)))
        return AttentionState(merged.finalize(asked.out_dtype), merged.lse)
    # torch.compile traces a Function under grad, but not under vmap alone; there the op has a rule of its own.
    if transformed and not (torch.compiler.is_compiling() and any(map(is_batchedtensor, (q, k, v)))):
        # torch.compile refuses one tensor in two places of an autograd.Function.
        k = k.view_as(k) if k is q else k
        v = v.view_as(v) if v is q or v is k else v
        return AttentionState(*Attend.apply(q, k, v, bias, *asked))  # type: ignore[misc]
    partial = (None, None) if prior is None else (prior.out, prior.lse)
    return AttentionState(*torch.ops.longattn.attend(q, k, v, bias, *partial, *asked))


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise NotImplementedError where a tensor carries a forward-mode tangent: the op would drop it without a word."""
    if forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "attend has no forward-mode derivative (jvp): use reverse mode, such as torch.func.grad or vjp"
        )


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in autocast's dtype where it is on for their device (float64 stays), as torch does for its own attention."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return q, k, v
    # torch refuses the question itself on devices such as "meta".
    if not isinstance(q, Tensor) or not torch.amp.is_autocast_available(q.device.type):
        return q, k, v
    if not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    cast = [x.to(dtype) if isinstance(x, Tensor) and x.dtype in _AUTOCAST else x for x in (q, k, v)]
    return cast[0], cast[1], cast[2]


def _needs_grad(state: AttentionState) -> bool:
    return state.out.requires_grad or state.lse.requires_grad
