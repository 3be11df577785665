"""`Options`: the arguments of public functions beside q, k, v and the pattern. One table, from which checks and the memo's keys follow."""

from __future__ import annotations

from typing import NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

from longattn.kernels.check import (
    check_attention_mask,
    check_dropout,
    check_dtype,
    check_environment,
    check_flag,
    check_key_padding,
    check_scale,
)
from longattn.kernels.dispatch.environment import Environment
from longattn.kernels.dispatch.table import check_backend_name
from longattn.kernels.ops.arguments import GRADED, OpArguments, OpTensors
from longattn.kernels.terms import ScoreTerms, as_terms, by_distance_of, check_terms, softcap_of
from longattn.patterncache import Pattern


class Options(NamedTuple):
    """As the caller gave them; meanings and defaults are those of `attend`, and of `pattern_attention` for the last three.

    Calls that differ in nothing but these and what tensors hold are looked up in the memo. The first `IN_FORM` fields enter a key in a form
    of their own, the others as they are.
    """

    attention_mask: Tensor | None = None
    key_padding_mask: Tensor | None = None
    score_terms: ScoreTerms = None
    environment: Environment | None = None
    deterministic: bool | None = None
    is_causal: bool | None = None
    softmax_scale: float | None = None
    dropout_p: float = 0.0
    backend: str | None = None
    out_dtype: torch.dtype | None = None
    q_start: int | None = None
    head_start: int | None = None
    num_heads: int | None = None


IN_FORM = 5


def _documented() -> list[tuple[type, ...]]:
    return [get_args(hint) or (hint,) for hint in get_type_hints(Options).values()]


_DOCUMENTED = _documented()
_seen: set[tuple[type, ...]] = set()


def of_documented_types(options: Options) -> bool:
    """Whether every option that is no tensor has its documented type, and no subclass of it: True is no number here, and 1 no flag."""
    types = tuple(map(type, options))
    if types in _seen:
        return True
    tensors = Options._fields.index("score_terms") + 1
    if not all(of in documented for of, documented in zip(types[tensors:], _DOCUMENTED[tensors:], strict=True)):
        return False
    if all(of in documented for of, documented in zip(types, _DOCUMENTED, strict=True)):
        _seen.add(types)
    return True


def check_options(q: Tensor, k: Tensor, options: Options, *, masked_k: Tensor | None = None) -> None:
    """Check all but q_start, head_start and num_heads beside checked tensors.

    Args:
        masked_k: keys that attention_mask has columns for. Default k.

    Raises:
        TypeError, ValueError: a bad option, by name.
    """
    check_flag("is_causal", options.is_causal)
    check_attention_mask(options.attention_mask, q, k if masked_k is None else masked_k)
    check_key_padding(options.key_padding_mask, q, k)
    if options.score_terms is not None:
        check_terms(options.score_terms, q)
    check_scale(options.softmax_scale)
    check_flag("deterministic", options.deterministic)
    check_dropout("dropout_p", options.dropout_p)
    check_backend_name(options.backend)
    check_dtype("out_dtype", options.out_dtype)
    check_environment(options.environment)


def tensors_of(q: Tensor, k: Tensor, v: Tensor, options: Options, seed: Tensor | None) -> OpTensors:
    """The op's tensors of checked ones."""
    mask = options.attention_mask
    floating = mask is not None and mask.dtype != torch.bool
    terms = options.score_terms
    added = None if terms is None else by_distance_of(as_terms(terms), q.dtype)
    if floating:
        return OpTensors(q, k, v, mask, added, None, options.key_padding_mask, seed)
    return OpTensors(q, k, v, None, added, mask, options.key_padding_mask, seed)


def wants_gradient(tensors: OpTensors) -> bool:
    """Whether a tensor of a plain call wants a gradient."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors[:GRADED])


def arguments_of(
    pattern: Pattern,
    options: Options,
    q_spans: list[int],
    k_spans: list[int],
    heads: list[int],
    out_dtype: torch.dtype,
    schedule: str = "",
) -> OpArguments:
    """The op's other arguments of checked options; `pattern` has its final causal field, and the op finds out which gradients are needed."""
    environment, deterministic = options.environment, options.deterministic
    return OpArguments(
        pattern.canonical(),
        q_spans,
        k_spans,
        heads,
        scale=options.softmax_scale,
        softcap=0.0 if options.score_terms is None else softcap_of(as_terms(options.score_terms)),
        dropout_p=float(options.dropout_p),
        needs_grad=False,
        bias_grad=False,
        by_distance_grad=False,
        backend=options.backend or "",
        deterministic=torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic,
        out_dtype=out_dtype,
        env="" if environment is None or torch.compiler.is_compiling() else environment.name,
        schedule=schedule,
    )
