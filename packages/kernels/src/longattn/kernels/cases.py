"""One call as a test names it: `Case`, the tensors that it draws from its seed, and the ways in which they may lie in memory."""

# torch's own types are partial.
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longattn.kernels.philox import keep_scale
from longattn.kernels.state import AttentionState, state_dtype
from longattn.kernels.terms import Alibi, RelativeBias, ScoreTerm, Softcap
from longattn.patterncache import Pattern, Rectangle, Span

LAYOUTS = (
    "plain", "heads_first", "sliced", "expanded_batch", "expanded_seq", "expanded_heads", "expanded_dim", "strided_dim",
    "unfolded", "unfolded_heads",
)  # fmt: skip
"""How a tensor (batch, seq, heads, head_dim) may lie in memory; see `lay_out`."""

MASKS = (None, "", "k", "qk", "hqk", "bk", "hq", "bhqk")
"""Axes that attention_mask varies along; see `random_mask`."""

BIASES = tuple(f"+{axes}" for axes in MASKS if axes is not None)
"""The same for a floating attention_mask."""

TERMS = ((), ("softcap",), ("alibi",), ("relative",), ("causal_relative",), ("softcap", "alibi", "relative"))
"""Kinds of score terms; see `random_terms`."""


@dataclass(frozen=True)
class Case:
    """One call of `attend`, without its data: `tensors` draws them from `seed`, always the same.

    Attributes:
        pattern, q_spans, k_spans, is_causal, softmax_scale, dtype, device: as in `attend`.
        lengths: (Nq, Nk).
        batch, kv_heads, group, head_dim: sizes; kv_heads * group query heads. value_head_dim: of v; None: head_dim.
        shard: (first head, heads of the whole module), or None: all.
        mask: one of MASKS or BIASES. prior: whether to merge onto a state. dropout_p: as in `attend`, with `seed`.
        terms: one of TERMS.
        padding: whether keys are padded; padded rows of k and v then hold NaN and Inf.
        layouts: of q, k, v, the prior and the cotangents, from LAYOUTS.
    """

    pattern: Pattern
    lengths: tuple[int, int] = (12, 12)
    batch: int = 2
    kv_heads: int = 2
    group: int = 1
    head_dim: int = 8
    value_head_dim: int | None = None
    q_spans: tuple[Span, ...] | None = None
    k_spans: tuple[Span, ...] | None = None
    shard: tuple[int, int] | None = None
    is_causal: bool | None = None
    softmax_scale: float | None = None
    mask: str | None = None
    terms: tuple[str, ...] = ()
    padding: bool = False
    prior: bool = False
    dropout_p: float = 0.0
    layouts: tuple[str, ...] = ("plain",) * 5
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0

    def counts(self) -> Tensor:
        """(heads, Nq, Nk) int64, what the pattern says of this rectangle."""
        nq, nk = self.lengths
        heads = self.kv_heads * self.group
        first, total = self.shard or (0, heads)
        queries = (Span(max(0, nk - nq), nq),) if self.q_spans is None else self.q_spans
        keys = (Span(0, nk),) if self.k_spans is None else self.k_spans
        pattern = self.pattern if self.is_causal is None else self.pattern.with_causal(self.is_causal)
        return torch.from_numpy(pattern.counts(Rectangle(total, queries, keys, Span(first, heads))))

    def positions(self) -> tuple[Tensor, Tensor]:
        """Of queries and of keys."""
        nq, nk = self.lengths
        queries = (Span(max(0, nk - nq), nq),) if self.q_spans is None else self.q_spans
        keys = (Span(0, nk),) if self.k_spans is None else self.k_spans
        i, j = (torch.tensor([n for s in side for n in s.positions()], dtype=torch.int64) for side in (queries, keys))
        return i, j

    def keep(self) -> Tensor | None:
        """(batch, heads, Nq, Nk) float64, what dropout multiplies each weight with, from positions alone; None without dropout."""
        if not self.dropout_p:
            return None
        i, j = self.positions()
        h = torch.arange(self.kv_heads * self.group) + (self.shard or (0, 0))[0]
        at = (torch.arange(self.batch)[:, None, None, None], h[:, None, None], i[:, None], j)
        return keep_scale(self.seed, self.dropout_p, *at, torch.float64).to(self.device)

    def tensors(self) -> Tensors:
        """The data, on the case's device."""
        random = torch.Generator().manual_seed(self.seed)
        batch, (nq, nk), heads = self.batch, self.lengths, self.kv_heads * self.group

        def normal(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
            return lay_out(torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).to(self.device), layout)

        state, value_dim = state_dtype(self.dtype), self.value_head_dim or self.head_dim
        wide = (batch, nq, heads, value_dim)
        q = normal((batch, nq, heads, self.head_dim), self.layouts[0], self.dtype)
        k = normal((batch, nk, self.kv_heads, self.head_dim), self.layouts[1], self.dtype)
        v = normal((batch, nk, self.kv_heads, value_dim), self.layouts[2], self.dtype)
        mask = None if self.mask is None else random_mask(self.mask, (batch, heads, nq, nk), random).to(self.device)
        if mask is not None and mask.is_floating_point():
            mask = mask.to((self.dtype, torch.float32)[self.seed % 2])
        padding = None
        if self.padding:
            padding = (torch.rand(batch, nk, generator=random) < 0.4).to(self.device)
            k, v = k.clone(), v.clone()
            k[padding], v[padding] = torch.nan, torch.inf
        prior = None
        if self.prior:
            blind = (torch.rand(wide[:3], generator=random) < 0.3).to(self.device)
            lse = normal(wide[:3], self.layouts[3], state).masked_fill(blind, -torch.inf)
            out = normal(wide, self.layouts[3], state)
            prior = AttentionState(out * (lse > -torch.inf).unsqueeze(-1), lse)
        # Cotangents that the dtype of q can hold: backends may round them to it.
        grads = [normal(shape, self.layouts[4], self.dtype).to(state) for shape in (wide, wide[:3])]
        terms = random_terms(self.terms, heads, self.seed, self.device)
        return Tensors(q, k, v, mask, padding, prior, grads[0], grads[1], terms)


@dataclass(frozen=True)
class Tensors:
    """The data of a `Case`, as in `attend`; grad_out and grad_lse are cotangents in the state's dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    padding: Tensor | None
    prior: AttentionState | None
    grad_out: Tensor
    grad_lse: Tensor
    terms: tuple[ScoreTerm, ...] = ()


def lay_out(x: Tensor, layout: str) -> Tensor:
    """A tensor like x (batch, seq, heads, ...), with other strides.

    "expanded" layouts also repeat its first entry of that axis; in "unfolded" ones neighbours share all but one number: windows of a
    hop of 1 over one line of numbers for each head, or over one line for all.
    """
    if layout == "heads_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        return torch.cat([x, x], 1)[:, : x.shape[1]]
    if layout == "strided_dim":
        return torch.stack([x, x], -1)[..., 0]
    if layout in ("unfolded", "unfolded_heads") and x.numel():
        axis, width = 1 if layout == "unfolded" else x.dim() - 2, x.shape[-1]
        shape = [n for at, n in enumerate(x.shape[:-1]) if at != axis] + [x.shape[axis] + width - 1]
        numbers = x.reshape(-1).repeat(-(-math.prod(shape) // x.numel()))
        return numbers[: math.prod(shape)].view(shape).unfold(-1, width, 1).movedim(-2, axis)
    axis = {"expanded_batch": 0, "expanded_seq": 1, "expanded_heads": 2, "expanded_dim": x.dim() - 1}.get(layout)
    return x if axis is None else x.narrow(axis, 0, min(1, x.shape[axis])).expand(x.shape)


def random_mask(axes: str, shape: tuple[int, int, int, int], random: torch.Generator) -> Tensor:
    """An attention mask for (batch, heads, Nq, Nk) that varies along `axes`, one of MASKS (bool) or BIASES (float32, some -inf).

    Leading axes of size 1 are left out.
    """
    sizes = [n if axis in axes else 1 for axis, n in zip("bhqk", shape, strict=True)]
    leading = min(("bhqk".index(axis) for axis in axes.lstrip("+")), default=4)
    seen = torch.rand(sizes[leading:], generator=random) < 0.7
    return torch.randn(seen.shape, generator=random).masked_fill(~seen, -torch.inf) if axes.startswith("+") else seen


def random_terms(kinds: tuple[str, ...], heads: int, seed: int, device: str = "cpu") -> tuple[ScoreTerm, ...]:
    """Score terms of some kinds, in that order."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device)

    made = {
        "softcap": Softcap(1.5),
        "alibi": Alibi(normal(heads) / 4),
        "relative": RelativeBias(normal(12, heads), max_distance=9),
        "causal_relative": RelativeBias(normal(6, heads), bidirectional=False, max_distance=7),
    }
    return tuple(made[kind] for kind in kinds)
