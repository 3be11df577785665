"""`OpArguments`: what both ops are asked beside the tensors that have gradients, and the schema that torch reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class OpArguments(NamedTuple):
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


SCHEMA = (
    "Tensor? mask, Tensor? key_padding, Tensor? seed, str pattern, SymInt[] q_spans, SymInt[] k_spans, SymInt[] heads, "
    "float? scale, float dropout_p, bool needs_grad, bool bias_grad, str backend, bool deterministic, ScalarType out_dtype, str env"
)
"""`OpArguments` in the language of torch's operator schemas."""
