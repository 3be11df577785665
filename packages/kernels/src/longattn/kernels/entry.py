"""`attend`: the front door of the kernels."""

# What is active in torch is known to private names alone.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from longattn.kernels.axes import Layout, exchanged, in_order
from longattn.kernels.check import check_prior, check_qkv, check_sinks, refuse_torchscript, warn_of_axes
from longattn.kernels.dispatch.environment import Environment
from longattn.kernels.ops import direct
from longattn.kernels.ops.arguments import GRADED, OpArguments, OpTensors
from longattn.kernels.ops.attend_op import attend_op
from longattn.kernels.ops.define import refuse_tangents
from longattn.kernels.options import Options, arguments_of, check_options, tensors_of
from longattn.kernels.philox import as_seed
from longattn.kernels.positions import flat_heads, flat_spans, last_positions
from longattn.kernels.scaling import fold_scale
from longattn.kernels.state import AttentionState, add_sink, merge, state_dtype
from longattn.kernels.terms import ScoreTerms
from longattn.patterncache import Pattern, Span
from longattn.patterncache.spans import shortened

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
    softmax_scale: float | Tensor | None = None,
    attention_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    score_terms: ScoreTerms = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    sink_logits: Tensor | None = None,
    backend: str | None = None,
    deterministic: bool | None = None,
    out_dtype: torch.dtype | None = None,
    environment: Environment | None = None,
    layout: Layout = "bnhd",
) -> AttentionState:
    """softmax(scale * q k^T + log counts) v over one rectangle of heads x queries x keys, as a state.

    Differentiable in q, k, v, prior, sink_logits, a floating attention_mask and what score_terms hold; without score terms, on the rows in torch
    operations twice. Shapes are (batch, seq, heads, head_dim); v, and with it out and prior, may have another head_dim than q and k.
    Keys hidden by the pattern, causality or attention_mask weigh 0 but may be read, so k and v must be finite there: 0 * NaN is NaN.
    Under autocast, q, k and v are cast to its dtype. DTensors sharded on the batch or on the heads stay so, each rank attending for its own: all
    tensors are DTensors then, and without dropout.

    Args:
        q: (batch, Nq, heads, head_dim), float16, bfloat16, float32 or float64.
        k, v: (batch, Nk, kv_heads, head_dim), same dtype and device; kv_heads divides heads (GQA, MQA). v may have its own head_dim (MLA).
        pattern: who sees whom.
        is_causal: replaces the pattern's causal field; None takes it.
        prior: a state over other keys to merge onto; it is read, never written.
        q_spans, k_spans: positions of the rows in the whole sequence. Default: keys are 0 .. Nk, queries the last Nq of them.
        heads: the global query heads that q holds. Default: all.
        num_heads: query heads of the whole module. Default: those of q.
        softmax_scale: a number, or floating () or (heads,) with gradient, such as a learned temperature (see `scaling`: q is multiplied by
            it, which in half precision is one more rounding). Default head_dim ** -0.5.
        attention_mask: bool, True = may see, or floating, added to the scaled scores; broadcastable to (batch, heads, Nq, Nk).
        key_padding_mask: (batch, Nk) bool, True = padding. What padded rows of k and v hold reaches nothing.
        score_terms: a Softcap, Alibi or RelativeBias, or a tuple of those: what is done to scaled scores by rule; see `terms`. Distances are those
            of positions, and slopes and tables are for the heads of q.
        dropout_p: probability in [0, 1) of dropping a (query, key) pair, by Philox on their positions (see `philox`). lse is undropped.
        seed: 0-dim int64 CPU tensor or integer that decides which. Default: drawn from torch's generator.
        sink_logits: (heads,), a learned sink per head: merges the state (out 0, lse = logit) once, at the end.
        backend: name of the row that must serve; None picks (see `explain`).
        deterministic: equal inputs give equal bits. Default: torch.are_deterministic_algorithms_enabled().
        out_dtype: dtype of the returned out. Default float32 (float64 for float64): states are rounded once, at the end.
        environment: where plans are cached and memory comes from. Default: the global cache, plain torch; always so in traced code.
        layout: "bnhd" (default): tensors are as above. "bhnd": q, k, v and prior, and the state that is returned, have heads before the sequence, lse
            too; they are views, and nothing is copied for it. Masks are as they are.

    Returns:
        AttentionState: out (batch, Nq, heads, v's head_dim); lse (batch, Nq, heads), natural log, -inf = saw no key.

    Raises:
        TypeError, ValueError: a bad argument, by name; or no row fits, with each one's reasons.
    """
    if layout != "bnhd":
        q, k, v = in_order(layout, q, k, v)
        prior = prior if prior is None else _exchanged_state(prior)
    if isinstance(softmax_scale, Tensor):
        q, number = fold_scale(q, softmax_scale)
    else:
        number = softmax_scale
    options = Options(
        attention_mask, key_padding_mask, score_terms, environment, deterministic, is_causal, number, dropout_p, backend, out_dtype
    )  # fmt: skip
    key = None
    if prior is q_spans is k_spans is heads is num_heads is sink_logits is None:
        key = direct.signature("attend", q, k, v, pattern, options)
        computed = None if key is None else direct.attend_prepared(key, q, k, v, pattern, options, seed)
        if computed is not None:
            state = AttentionState(*computed)
            return state if layout == "bnhd" else _exchanged_state(state)
    refuse_torchscript()
    if is_sharded(q) or is_sharded(k) or is_sharded(v):
        _know_sharding()
    q, k, v = autocast(q, k, v)
    pattern = checked_pattern(q, k, v, pattern, options)
    warn_of_axes("q", q, layout)
    check_sinks(sink_logits, q)
    check_prior(prior, q, v)
    state_type = state_dtype(q.dtype)
    arguments = arguments_of(
        pattern,
        options,
        last_positions(q.shape[1], k.shape[1], pattern.positional)
        if q_spans is None
        else flat_spans("q_spans", q_spans, q.shape[1]),
        [0, k.shape[1], 1] if k_spans is None else flat_spans("k_spans", k_spans, k.shape[1]),
        flat_heads(q.shape[2], heads, num_heads),
        state_type if out_dtype is None or sink_logits is not None else out_dtype,
    )
    tensors = tensors_of(q, k, v, options, as_seed(seed) if dropout_p or seed is not None else None)
    if key is not None:
        state = AttentionState(*direct.prepare_and_run(key, tensors, arguments, environment))
    else:
        state = _onto(prior, tensors, arguments)
    if sink_logits is not None:
        state = add_sink(state, sink_logits)
        state = AttentionState(state.finalize(state_type if out_dtype is None else out_dtype), state.lse)
    return state if layout == "bnhd" else _exchanged_state(state)


def is_sharded(x: object) -> bool:
    """Whether x is a DTensor: known by what it says of itself, because its module is heavy to import."""
    return hasattr(x, "placements")


def sharding_module() -> Any:
    """`ops.sharding`, imported when the first DTensor comes: torch's own module for them is heavy."""
    return import_module("longattn.kernels.ops.sharding")


def _know_sharding() -> bool:
    """Have the op's rules for DTensors registered; in traced code, while it is traced."""
    return bool(sharding_module())


# What torch.compiler.assume_constant_result does; that one imports torch._dynamo, and with it triton, for everybody.
_know_sharding._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _exchanged_state(state: AttentionState) -> AttentionState:
    """The state with sequence and heads exchanged; what is none is itself, to be refused later."""
    return AttentionState(exchanged(state.out), exchanged(state.lse)) if isinstance(state, AttentionState) else state  # pyright: ignore[reportUnnecessaryIsInstance]


def checked_pattern(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, options: Options) -> Pattern:
    """The checked pattern, with the causal field of `is_causal`.

    Raises:
        TypeError, ValueError: a bad tensor, pattern or option, by name.
    """
    check_qkv(q, k, v)
    if not isinstance(pattern, Pattern):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"pattern must be a Pattern such as Dilated or Window, got {shortened(pattern)} ({type(pattern).__name__})"
        )
    check_options(q, k, options)
    causal = options.is_causal
    return pattern if causal is None or causal == pattern.causal else pattern.with_causal(causal)


def _onto(prior: AttentionState | None, tensors: OpTensors, arguments: OpArguments) -> AttentionState:
    """The op's state, merged onto a prior."""
    if prior is None:
        return AttentionState(*attend_op(tensors, arguments))
    every = (*tensors[:GRADED], prior.out, prior.lse)
    refuse_tangents(*every)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in every)
    if needs_grad or torch._C._are_functorch_transforms_active():
        # The op reads a prior without a gradient; `merge` has one.
        state = AttentionState(*attend_op(tensors, arguments._replace(out_dtype=prior.out.dtype)))
        merged = merge(prior, state)
        return AttentionState(merged.finalize(arguments.out_dtype), merged.lse)
    return AttentionState(*attend_op(tensors._replace(prior_out=prior.out, prior_lse=prior.lse), arguments))


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in autocast's dtype where it is on for their device (float64 stays), as torch does for its own attention."""
    compiling = torch.compiler.is_compiling()
    if not compiling and not torch._C._is_any_autocast_enabled():
        return q, k, v
    if not isinstance(q, Tensor) or q.device.type == "meta":  # pyright: ignore[reportUnnecessaryIsInstance]
        return q, k, v
    # torch refuses the question itself on devices without autocast, "meta" among them. torch 2.11 does not trace the question whether a device has it.
    if not compiling and not torch.amp.is_autocast_available(q.device.type):
        return q, k, v
    if not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    cast = [x.to(dtype) if isinstance(x, Tensor) and x.dtype in _AUTOCAST else x for x in (q, k, v)]  # pyright: ignore[reportUnnecessaryIsInstance]
    return cast[0], cast[1], cast[2]
