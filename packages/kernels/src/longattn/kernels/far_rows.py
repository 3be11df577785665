"""Query rows whose every key has a huge bias, such as a mask of finfo.min: their scores are numbers that float32 is too coarse for.

At lse = -1e9 the next float32 is 64 away, so lse no longer says how many keys a row saw: parts of it would merge with wrong weights, and
exp(score - lse), from which gradients are made, would be 1 for every key. `exact_forward` and `exact_backward` wrap the two functions of
a row of the table: such rows, which are few or none, are made again from the plan in float64, a chunk at a time. They are looked for only where
something is added to scores: a bias, or an Alibi over long distances.
"""

# torch's own types are partial.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longattn.kernels.dispatch.call import Call
from longattn.kernels.philox import keep_scale
from longattn.kernels.state import AttentionState, merge, state_dtype
from longattn.kernels.terms import add_gradients, at_distances
from longattn.patterncache import Plan

HUGE = 1e30
"""What rows of the table take a larger finite bias for: scores vanish beside it, and float32 still has room for sums and factors."""

_FAR = {torch.float64: 2.0**40}
"""|lse| from which a row is made again, by the dtype of its state; elsewhere 2^20, where float32 knows lse to 1/16."""

_CELLS = 1 << 20
"""Scores that are in memory at a time: 8 MiB."""

State = tuple[Tensor, Tensor]


def bounded(bias: Tensor) -> Tensor:
    """bias with finite numbers between -HUGE and HUGE, where its dtype holds more; infinities and NaN stay."""
    if torch.finfo(bias.dtype).max < HUGE:
        return bias
    return torch.where(bias.isinf(), bias, bias.clamp(-HUGE, HUGE))


def exact_forward(forward: Callable[..., State]) -> Callable[..., State]:
    """`forward(..., call)` of a row, with far rows made again."""

    @wraps(forward)
    def exact(*arguments: Any) -> State:
        out, lse = forward(*arguments)
        call: Call = arguments[-1]
        if _may_be_far(call) and (far := _far_rows(call, lse)) is not None:
            for chunk in _chunks(call, far):
                chunk.write(out, lse)
        return out, lse

    return exact


def exact_backward(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """`backward(..., call, grad_out, grad_lse, out, lse, bias_grad)` of a row, with the share of far rows made again."""

    @wraps(backward)
    def exact(*arguments: Any) -> tuple[Any, ...]:
        *owner, call, grad_out, grad_lse, out, lse, bias_grad = arguments
        far = _far_rows(call, lse) if _may_be_far(call) else None
        if far is None:
            return backward(*arguments)
        # exp(score - inf) is 0: these rows add nothing to what the row of the table makes.
        grads = backward(*owner, call, grad_out, grad_lse, out, lse.masked_fill(far, torch.inf), bias_grad)
        for chunk in _chunks(call, far):
            chunk.add_gradients(grads, grad_out, grad_lse, out, lse)
        return grads

    return exact


def has_far_rows(call: Call, lse: Tensor) -> bool:
    """Whether a query row is far."""
    return _far_rows(call, lse) is not None


def _may_be_far(call: Call) -> bool:
    """Whether anything is added to scores: products alone do not reach so far."""
    return call.bias is not None or call.by_distance is not None


def _far_rows(call: Call, lse: Tensor) -> Tensor | None:
    """(batch, Nq, heads) bool, or None where no row is far."""
    if lse.is_cuda and torch.cuda.is_current_stream_capturing():
        return None  # a CUDA graph cannot branch on a value that is computed inside it
    limit = _FAR.get(lse.dtype, 2.0**20)
    if call.q.dtype == torch.float16 and call.q.is_cuda:
        limit = 2.0**14  # torch's kernels for CUDA take a bias in q's dtype, which ends at 65504
    far = (lse.abs() > limit) & lse.isfinite()
    return far if bool(far.any()) else None


def _chunks(call: Call, far: Tensor) -> Iterator[_FarRows]:
    by_head = far.transpose(1, 2).cpu()
    size = max(1, _CELLS // max(1, call.k.shape[1]))
    heads: list[list[int]] = by_head.any(-1).nonzero().tolist()
    for batch, head in heads:
        for rows in torch.split(by_head[batch, head].nonzero()[:, 0], size):
            yield _FarRows(call, batch, head, rows)


@dataclass(frozen=True)
class _FarRows:
    """Some query rows of one head of one batch element, dense, in float64 (float32 on devices without)."""

    call: Call
    batch: int
    head: int
    rows: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.call.q.device.type == "mps" else torch.float64

    @property
    def kv_head(self) -> int:
        return self.head // (self.call.q.shape[2] // self.call.k.shape[2])

    @cached_property
    def on_device(self) -> Tensor:
        return self.rows.to(self.call.q.device)

    def queries(self, x: Tensor) -> Tensor:
        """Rows of x (batch, Nq, heads, ...)."""
        return x[self.batch, self.on_device, self.head].to(self.dtype)

    def keys(self, x: Tensor) -> Tensor:
        """All rows of x (batch, Nk, kv_heads, d); padded ones are zero, whatever they hold."""
        rows, padding = x[self.batch, :, self.kv_head].to(self.dtype), self.call.key_padding
        return rows if padding is None else rows.masked_fill(padding[self.batch].unsqueeze(-1), 0)

    def lookup(self, x: Tensor) -> Tensor:
        """(rows, Nk) of what broadcasts to (batch, heads, Nq, Nk)."""
        shape = (self.call.q.shape[0], self.call.q.shape[2], self.call.q.shape[1], self.call.k.shape[1])
        return x.expand(shape)[self.batch, self.head][self.on_device]

    @cached_property
    def scores(self) -> Tensor:
        """(rows, Nk), -inf where hidden."""
        call, device = self.call, self.call.q.device
        times = torch.from_numpy(row_counts(call.plan, self.head, self.rows.numpy())).to(device, self.dtype)
        seen, added = times > 0, times.log()
        if call.bias is not None:
            bias = self.lookup(call.bias).to(self.dtype)
            seen, added = seen & (bias != -torch.inf), added + bias
        if call.by_distance is not None:
            added = added + at_distances(call.by_distance[self.head, None].to(self.dtype), self.distance)[0]
        if call.mask is not None:
            seen = seen & self.lookup(call.mask)
        if call.key_padding is not None:
            seen = seen & ~call.key_padding[self.batch]
        return torch.where(seen, self.products + added, -torch.inf)

    @cached_property
    def products(self) -> Tensor:
        """(rows, Nk): scaled, and capped."""
        scaled, cap = self.queries(self.call.q) @ self.keys(self.call.k).T * self.call.scale, self.call.softcap
        return cap * torch.tanh(scaled / cap) if cap else scaled

    @cached_property
    def positions(self) -> tuple[Tensor, Tensor]:
        """Of these rows, and of the keys."""
        rectangle, device = self.call.plan.rectangle, self.call.q.device
        i = torch.from_numpy(rectangle.query_positions())[self.rows].to(device)
        return i, torch.from_numpy(rectangle.key_positions()).to(device)

    @cached_property
    def distance(self) -> Tensor:
        """(rows, Nk): position of the key minus that of the query."""
        i, j = self.positions
        return j - i[:, None]

    @cached_property
    def pivot(self) -> Tensor:
        pivot = self.scores.amax(-1, keepdim=True)
        return pivot.masked_fill(pivot == -torch.inf, 0)

    @cached_property
    def weights(self) -> Tensor:
        """(rows, Nk): they sum to one, or to zero where nothing is seen."""
        weights = (self.scores - self.pivot).exp()
        return weights / weights.sum(-1, keepdim=True).clamp(min=1)

    @cached_property
    def lse(self) -> Tensor:
        """(rows,): at least the lowest number of the state's dtype where a key is seen."""
        total = (self.scores - self.pivot).exp().sum(-1)
        lowest = torch.finfo(state_dtype(self.call.q.dtype)).min
        lse = (self.pivot[:, 0] + total.log()).clamp(lowest, -lowest)
        return lse.masked_fill(total == 0, -torch.inf)

    def kept(self, x: Tensor) -> Tensor:
        """x (rows, Nk) times what dropout keeps."""
        call = self.call
        if not call.dropout_p:
            return x
        i, j = self.positions
        batch, head = (
            torch.tensor(n, device=x.device) for n in (self.batch, self.head + call.plan.rectangle.heads.start)
        )
        return x * keep_scale(call.seed, call.dropout_p, batch, head, i[:, None], j, x.dtype)

    def write(self, out: Tensor, lse: Tensor) -> None:
        """Put what these rows give, merged onto the call's prior, into out and lse."""
        dtype = state_dtype(self.call.q.dtype)
        state = AttentionState((self.kept(self.weights) @ self.keys(self.call.v)).to(dtype), self.lse.to(dtype))
        if self.call.prior is not None:
            state = merge(AttentionState(*(self.queries(x).to(dtype) for x in self.call.prior)), state)
        out[self.batch, self.on_device, self.head] = state.out.to(out.dtype)
        lse[self.batch, self.on_device, self.head] = state.lse.to(lse.dtype)

    def add_gradients(
        self, grads: tuple[Any, ...], grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
    ) -> None:
        """Add the share of these rows to (dq, dk, dv, dbias or None)."""
        call, grad, whole = self.call, self.queries(grad_out), self.queries(lse)
        # The weight of these keys in a merged state: 1 where both lse are equal but for rounding.
        ahead = whole - self.lse
        share = torch.where(ahead.abs() > whole.abs() * 2.0**-20, (-ahead).exp(), 1.0)
        weights = self.weights * share[:, None]
        delta = (grad * self.queries(out)).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - self.queries(grad_lse)[:, None]
        dq, dk, dv, dbias = grads
        grad_scores = weights * (self.kept(grad @ self.keys(call.v).T) - delta)
        if call.by_distance_grad is not None:
            own = call.by_distance_grad[self.head, None]
            add_gradients(own, self.distance, grad_scores[None].to(own.dtype))
        if dbias is not None:
            target = dbias[self.batch if len(dbias) > 1 else 0, self.head if dbias.shape[1] > 1 else 0]
            part = grad_scores if dbias.shape[3] > 1 else grad_scores.sum(-1, keepdim=True)
            at = self.on_device if dbias.shape[2] > 1 else torch.zeros_like(self.on_device)
            target.index_add_(0, at, part.to(dbias.dtype))
        if call.softcap:
            grad_scores = grad_scores * (1 - (self.products / call.softcap) ** 2)
        dq[self.batch, self.on_device, self.head] += (grad_scores @ self.keys(call.k) * call.scale).to(dq.dtype)
        dk[self.batch, :, self.kv_head] += (grad_scores.T @ self.queries(call.q) * call.scale).to(dk.dtype)
        dv[self.batch, :, self.kv_head] += (self.kept(weights).T @ grad).to(dv.dtype)


def row_counts(plan: Plan, head: int, rows: np.ndarray) -> np.ndarray:
    """(rows, keys) int64: how often these query rows of a head see each key."""
    total = np.zeros((len(rows), plan.rectangle.shape[2]), np.int64)
    for branch in plan.branches:
        if head not in branch.heads.positions():
            continue
        # No query row stands in two tiles of a branch.
        tile_of = np.full(plan.rectangle.shape[1], -1)
        tile_of[branch.q.rows()] = np.arange(branch.q.tiles)[:, None]
        members = np.flatnonzero(tile_of[rows] >= 0)
        keys = branch.k.rows()[tile_of[rows[members]]]
        shown = np.ones(keys.shape, np.int64)
        if branch.band is not None:
            distance = branch.q_at[0] + branch.q_at[1] * rows[members][:, None] - branch.k_at[0] - branch.k_at[1] * keys
            shown = branch.band.sees(distance).astype(np.int64)
        np.add.at(total, (members[:, None], keys), shown)
    return total
