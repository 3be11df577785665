"""What crosses to torch: `OpTensors` and `OpArguments` are the arguments of every op over attention, and the schema follows from them.

To add an argument, add a field: a tensor with a gradient after `bias`, with a flag `<name>_grad` among the arguments; another tensor after
`key_padding`; anything else to `OpArguments`. Schema, fakes, autograd, vmap and the memo's keys take it from here.
"""

from __future__ import annotations

from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor


class OpTensors(NamedTuple):
    """The tensors of a call. The first `GRADED` of them have gradients.

    Attributes:
        q: (batch, Nq, heads, head_dim). k, v: (batch, Nk, kv_heads, head_dim); v, and so out, may have its own head_dim.
        bias: floating, broadcastable to (batch, heads, Nq, Nk), or None. mask: bool, likewise.
        by_distance: what score terms add for each head of q and distance, (heads, columns) as `terms` says, or None.
        key_padding: (batch, Nk) bool, or None.
        seed: 0-dim int64, or None without dropout.
        prior_out, prior_lse: a state to merge onto, read only, or None. Only of `longattn::attend`.
        metadata: (ranks, 4) int64, what the ranks of a schedule over a process group told one another, or None.
        cu_seqlens, cu_seqlens_q: (documents + 1,) integers of packed keys, and of queries where they are others, where they are data; or
            None. Only of `longattn::scheduled_attend`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    by_distance: Tensor | None = None
    mask: Tensor | None = None
    key_padding: Tensor | None = None
    seed: Tensor | None = None
    prior_out: Tensor | None = None
    prior_lse: Tensor | None = None
    metadata: Tensor | None = None
    cu_seqlens: Tensor | None = None
    cu_seqlens_q: Tensor | None = None


class OpArguments(NamedTuple):
    """The arguments of an op beside its tensors. Its first four fields are the pattern cache's key.

    Attributes:
        pattern: canonical string. q_spans, k_spans: flat (start, length, step) triples; empty: the schedule knows, from all ranks.
        heads: (total, first, count).
        softcap: what scaled scores are capped at; 0: they are not.
        needs_grad, bias_grad, by_distance_grad: whether anything, and whether bias, or by_distance, will want a gradient.
        backend: a row's name, or ''. env: an environment's name, or ''.
        schedule: canonical string of a schedule; '' in `longattn::attend`.
    """

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
    schedule: str = ""
    softcap: float = 0.0
    by_distance_grad: bool = False


class Cotangents(NamedTuple):
    """What a backward has beside the arguments of its forward: gradients of its results, and the results."""

    grad_out: Tensor
    grad_lse: Tensor | None
    out: Tensor
    lse: Tensor


Gradients = tuple[Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None"]
"""Of the first `GRADED` tensors: dq, dk, dv, dbias and that of by_distance."""

GRADED = 5
OPTIONAL_GRADED = OpTensors._fields[3:GRADED]
"""Those of them that a call need not have; `<name>_grad` of `OpArguments` says whether one wants a gradient."""

TENSORS = len(OpTensors._fields)

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    str: "str",
    bool: "bool",
    float: "float",
    float | None: "float?",
    list[int]: "SymInt[]",
    torch.dtype: "ScalarType",
}


def schema(*kinds: type) -> str:
    """The fields of some of these classes in the language of torch's operator schemas."""
    hints = [item for kind in kinds for item in get_type_hints(kind).items()]
    return ", ".join(f"{_SCHEMA_TYPES[hint]} {name}" for name, hint in hints)
