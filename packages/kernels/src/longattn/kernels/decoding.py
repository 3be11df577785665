"""Decode: one query row for each head against cached rows that lie in any order.

softmax(scale * q k^T) v does not care in which order keys lie, so a ring is read as it lies: no rotation, no gather, no plan. Its rows
stand in the dispatch table beside those that read plans: on CPUs the native library streams keys and values once, in ranges, over all
threads; on GPUs the Triton row splits them over programs; elsewhere, and where a gradient is wanted, it is two of torch's products. There, in float16 and bfloat16, scores and weights are rounded
to that type, which is what torch's products of these types on CPU return.
"""

# What is active in torch is known to private names alone.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from longattn.kernels.dispatch.capability import ROUNDED_WITHIN, Capability
from longattn.kernels.dispatch.table import TABLE, Explanation, RowFailure, refusals, row
from longattn.kernels.native import building
from longattn.kernels.native.decode import CAPABILITY as STREAMED
from longattn.kernels.native.decode import StreamedCache, result_shape
from longattn.kernels.problem import AttentionProblem
from longattn.kernels.state import FLOATS, state_dtype
from longattn.kernels.triton.cached_step import CAPABILITY as SPLIT
from longattn.kernels.triton.cached_step import TritonCache

logger = logging.getLogger("longattn.kernels")

PRODUCTS = Capability(
    devices=(),
    dtypes={"": FLOATS},
    tolerance=ROUNDED_WITHIN,
    decode=True,
    bias=False,
    softcap=True,
    by_distance=True,
)

DECODE_ROWS = {"native_decode": STREAMED, "triton_decode": SPLIT, "torch_decode": PRODUCTS}
"""What serves decode steps, in order of preference, and what each declares."""


def explain_decode(problem: AttentionProblem) -> Explanation:
    """Which row serves a decode step, and why no other one does, those that read plans included."""
    machine = dict(refusals(problem))
    if (refused := building.refusal("decode")) is not None:
        machine["native_decode"] = refused
    if "triton" in machine:
        machine["triton_decode"] = machine["triton"]
    declared = {name: row(name).capability for name in TABLE} | DECODE_ROWS
    rows = tuple(
        (name, (*([machine[name]] if name in machine else []), *capability.reasons(problem)))
        for name, capability in declared.items()
    )
    chosen = next((name for name, reasons in rows if not reasons), None)
    return Explanation(problem, rows, chosen, order="fixed: decode steps")


@lru_cache
def _streams(dtype: torch.dtype, device: str, head_dim: int) -> bool:
    """Whether the native row takes steps over such a cache, where there is a library."""
    return not STREAMED.reasons(AttentionProblem(device, dtype, heads=1, kv_heads=1, head_dim=head_dim, decode=True))


class DecodeCache:
    """Keys and values of a cache, described once for all steps over it.

    Args:
        keys, values: (rows, slots, head_dim), each with its own head_dim, of one dtype and device, last stride 1. A row is a kv head of a
            batch element.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.dims = (keys.shape[-1], values.shape[-1])
        declared = _streams(keys.dtype, keys.device.type, max(self.dims))
        served = declared and StreamedCache.serves(keys) and StreamedCache.serves(values)
        self.streamed = StreamedCache(keys, values) if served else None
        split = self.streamed is None and TritonCache.serves(keys, values)
        self.split = TritonCache(keys, values) if split else None


def decode_attention(
    q: Tensor,
    cache: DecodeCache,
    held: int,
    scale: float,
    *,
    hidden: Tensor | None = None,
    first: tuple[Tensor, int] | None = None,
    sink_logits: Tensor | None = None,
    softcap: float = 0.0,
    added: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v over the first `held` slots of a cache, which hold keys in any order.

    Differentiable; where no gradient is wanted `native_decode` serves if it declares to and there is a library, `triton_decode` if triton is
    here, else `torch_decode`.

    Args:
        q: (rows, group, head_dim) in the cache's dtype, or of any shape whose numbers in order are that; `group` query heads to a row.
        held: slots in use, the first so many.
        hidden: bool, broadcastable to (rows, 1, held), True = not seen. Values there must be finite. A row that sees nothing gives zero.
        first: (q, m), other queries like q, and for how many of the first keys they take q's place.
        sink_logits: broadcastable to (rows, group, 1), a learned sink: joins the softmax as a key of that score and value zero.
        softcap: scaled scores s become softcap * tanh(s / softcap); 0: they stay.
        added: (rows, group, held), added to scores after that, or None.

    Returns:
        Like q; where values have another head_dim than keys, q's last axis is the head_dim, and the result's is that of the values.

    Raises:
        ValueError: tensors that do not fit the cache.
    """
    if not q.numel():
        return q.new_zeros(result_shape(q, *cache.dims))
    if cache.streamed is not None and _plain(q, cache, first, sink_logits, added):
        out = cache.streamed.attend(
            q, held, scale, hidden=hidden, first=first, sink_logits=sink_logits, softcap=softcap, added=added
        )
        if out is not None:
            return out
    if cache.split is not None and held and _plain(q, cache, first, sink_logits, added) and q.dtype == cache.keys.dtype:
        try:
            out = cache.split.attend(
                q, held, scale, hidden=hidden, first=first, sink_logits=sink_logits, softcap=softcap, added=added
            )
            return out.reshape(result_shape(q, *cache.dims))
        except RowFailure as failure:
            cache.split = None
            logger.warning("row triton_decode: %s", failure)
    keys, values = cache.keys, cache.values
    if held < keys.shape[1]:
        keys, values = keys.narrow(1, 0, held), values.narrow(1, 0, held)
    return _products(q, keys, values, scale, hidden, first, sink_logits, softcap, added)


def _plain(
    q: Tensor,
    cache: DecodeCache,
    first: tuple[Tensor, int] | None,
    sink_logits: Tensor | None,
    added: Tensor | None,
) -> bool:
    """Whether numbers are all that is wanted: no gradient, no trace, no transform, no subclass that sees each operation."""
    if type(q) is not Tensor or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if not torch.is_grad_enabled():
        return True
    requires_grad = q.requires_grad or cache.keys.requires_grad or cache.values.requires_grad
    requires_grad = requires_grad or (first is not None and first[0].requires_grad)
    return not (requires_grad or any(x is not None and x.requires_grad for x in (sink_logits, added)))


def _products(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    hidden: Tensor | None,
    first: tuple[Tensor, int] | None,
    sink_logits: Tensor | None,
    softcap: float,
    added: Tensor | None,
) -> Tensor:
    """The same in torch's products."""
    shape = (keys.shape[0], -1, keys.shape[2])
    scores = _scores(q.reshape(shape), keys, scale)
    if first is not None:
        turned, m = first
        scores = torch.cat([_scores(turned.reshape(shape), keys[:, :m], scale), scores[..., m:]], -1)
    if softcap or added is not None:
        # What is added is not rounded to 16 bits: -100 is not the same as -100.5.
        scores = scores.to(state_dtype(scores.dtype))
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if added is not None:
        scores = scores + added
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    if sink_logits is not None:
        wide = scores if scores.dtype == torch.float64 else scores.float()
        weights = torch.softmax(torch.cat([wide, sink_logits.to(wide.dtype).expand(*wide.shape[:-1], 1)], -1), -1)
        weights = weights[..., :-1].to(q.dtype)
    else:
        weights = torch.softmax(scores, -1).to(q.dtype)
    if hidden is not None:
        # Where nothing is seen the softmax is 0 / 0.
        weights = weights.masked_fill(hidden.all(-1, keepdim=True), 0)
    return torch.bmm(weights, values).reshape(result_shape(q, keys.shape[2], values.shape[2]))


def _scores(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """scale * q k^T for q (rows, group, head_dim) and keys (rows, n, head_dim): (rows, group, n), in their dtype."""
    unread = _UNREAD.get((q.dtype, q.device))
    if unread is None:
        unread = _UNREAD[q.dtype, q.device] = _never_read(q)
    return torch.baddbmm(unread, q, keys.transpose(1, 2), beta=0, alpha=scale)


_UNREAD: dict[tuple[torch.dtype, torch.device], Tensor] = {}
"""What beta=0 multiplies, and torch does not read, for each dtype and device."""


def _never_read(q: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(1, dtype=q.dtype, device=q.device)
