"""The forward and the backward over any schedule, on real tensors, outside autograd.

Forward: each (shard, step) rectangle gives a state; states merge in float32. Backward: P = exp(s - lse) with the *merged* lse, and
delta = rowsum(dO * O) - dlse with the merged out, so that each rectangle's gradient is exact by itself; what is saved in between is
q, k, v, out and lse, whatever the number of steps. Rectangles without a visible pair are not launched.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from longattn.attention.schedules.layouts import Spans, add_rows, flat, select_rows
from longattn.attention.schedules.passes import GradientSum, KeyStep, QueryShard, ScheduleRun
from longattn.kernels import AttentionState, Environment
from longattn.kernels.interface import (
    Cotangents,
    GradientPart,
    Gradients,
    OpArguments,
    OpTensors,
    attend_rectangle,
    merge_into,
    minus_delta_of,
    rectangle_gradients,
    state_dtype,
)


def forward(
    run: ScheduleRun, arguments: OpArguments, environment: Environment, value_dim: int
) -> tuple[Tensor, Tensor]:
    """out (batch, Nq, heads, value_dim) in arguments.out_dtype, lse (batch, Nq, heads) in float32 (float64), in the caller's rows."""
    results: list[tuple[Tensor, ...]] = []
    for shard in run.shards():
        parts, q = _Parts(), shard.queries[0]
        for step in shard.steps:
            tensors, rectangle = rectangle_of(run, shard, step, arguments)
            if run.one_step:
                rectangle = rectangle._replace(out_dtype=arguments.out_dtype)
            state = attend_step(tensors, rectangle, environment, skip_empty=not run.one_step)
            if state is not None:
                parts.add(state)
            # Not kept while the next step's keys are awaited.
            del step, tensors
        state = parts.merged() or AttentionState.empty(q.new_empty((*q.shape[:3], value_dim)))
        results.append((state.out, state.lse))
    out, lse = run.join(results)
    return out.to(arguments.out_dtype), lse


def backward(run: ScheduleRun, arguments: OpArguments, environment: Environment) -> Gradients:
    """dq, dk, dv, and the gradients of bias and by_distance where asked for; in float32 (float64) where parts were added up, in the caller's rows."""
    dbias = None
    if arguments.bias_grad and run.bias is not None:
        dbias = torch.zeros(run.bias.shape, dtype=state_dtype(run.bias.dtype), device=run.bias.device)
    added = None
    if arguments.by_distance_grad and run.by_distance is not None:
        added = torch.zeros_like(run.by_distance)
    results: list[tuple[Tensor, ...]] = []
    for shard in run.shards():
        dq = GradientSum(shard.queries[0])
        _, grad_out, out, lse, *rest = shard.queries
        cotangents = Cotangents(grad_out, rest[0] if rest else None, out, lse)
        minus_delta = minus_delta_of(*cotangents[:3]) if run.in_parts else None
        for step in shard.steps:
            tensors, rectangle = rectangle_of(run, shard, step, arguments)
            part = None if minus_delta is None else GradientPart(minus_delta, dq.in_place())
            gradients = rectangle_gradients(
                cotangents, tensors, rectangle, environment, skip_empty=not run.one_step, part=part
            )
            if gradients is None:
                continue
            dq_part, dk, dv, dbias_part, added_part = gradients
            dq.add(dq_part)
            step.give(dk, dv)
            if dbias is not None and dbias_part is not None:
                _add_cut(dbias, shard.rows, step.rows, dbias_part)
            if added is not None and added_part is not None:
                added += added_part
            # Not kept while the next step's keys are awaited.
            del step, tensors, gradients, part, dq_part, dk, dv, dbias_part, added_part
        results.append((dq.total(),))
    (dq,) = run.join(results)
    dbias = None if dbias is None else run.bias_gradient(dbias)
    return (dq, *run.key_gradients(), dbias, None if added is None else run.by_distance_gradient(added))


def attend_step(
    tensors: OpTensors, arguments: OpArguments, environment: Environment, *, skip_empty: bool = False
) -> AttentionState | None:
    """One rectangle's state; None where no pair is visible and `skip_empty` is set."""
    computed = attend_rectangle(tensors, arguments, environment, skip_empty=skip_empty)
    return None if computed is None else AttentionState(*computed)


def rectangle_of(
    run: ScheduleRun, shard: QueryShard, step: KeyStep, arguments: OpArguments
) -> tuple[OpTensors, OpArguments]:
    """What the kernels are asked for one shard and one step; by default they compute a partial state."""
    q = shard.queries[0]
    mask, bias = (_cut(x, shard.rows, step.rows) for x in (run.mask, run.bias))
    return OpTensors(q, step.k, step.v, bias, run.by_distance, mask, step.padding, run.seed), arguments._replace(
        q_spans=flat(shard.spans),
        k_spans=flat(step.spans),
        heads=list(shard.heads),
        out_dtype=state_dtype(q.dtype),
        schedule="",
    )


class _Parts:
    """Merges parts as they arrive, like a binary counter: 2 ** n parts are merged n deep, and log2 of their number stand at a time.

    Merged one after the other, each part would round the whole sum again. lse is kept in float64 between merges: it is rounded once, like Local's.
    """

    def __init__(self) -> None:
        self.waiting: list[tuple[int, AttentionState]] = []

    def add(self, state: AttentionState) -> None:
        """Merge with the waiting part of the same depth, and the result with the next such part."""
        depth = 0
        while self.waiting and self.waiting[-1][0] == depth:
            state, depth = _merged(self.waiting.pop()[1], state), depth + 1
        self.waiting.append((depth, state))

    def merged(self) -> AttentionState | None:
        """The state over all parts; None without any."""
        if not self.waiting:
            return None
        merged = reduce(_merged, [state for _, state in reversed(self.waiting)])
        return AttentionState(merged.out, merged.lse.to(state_dtype(merged.out.dtype)))


def _merged(first: AttentionState, second: AttentionState) -> AttentionState:
    """Merge parts without other references, in place on the first one's out, with lse in float64."""
    lse = first.lse.double()
    merge_into(first.out, lse, second.out, second.lse.double())
    return AttentionState(first.out, lse)


def _cut_axes(mask: Tensor, queries: Spans | None, keys: Spans | None) -> list[tuple[int, Spans]]:
    """Which rows of which axes of a broadcastable (batch, heads, Nq, Nk) mask a rectangle has."""
    axes: list[tuple[int, Spans]] = []
    if queries is not None and mask.dim() > 1 and mask.shape[-2] > 1:
        axes.append((mask.dim() - 2, queries))
    if keys is not None and mask.dim() > 0 and mask.shape[-1] > 1:
        axes.append((mask.dim() - 1, keys))
    return axes


def _cut(mask: Tensor | None, queries: Spans | None, keys: Spans | None) -> Tensor | None:
    """A mask's part for some query and key rows; views where one span says which."""
    if mask is not None:
        for axis, rows in _cut_axes(mask, queries, keys):
            mask = select_rows(mask, axis, rows)
    return mask


def _add_cut(total: Tensor, queries: Spans | None, keys: Spans | None, part: Tensor) -> None:
    """Add `part`, the gradient of what `_cut` returned, to `total`, in place."""
    axes = _cut_axes(total, queries, keys)
    if not axes:
        total += part
        return
    axis, rows = axes[0]
    if len(axes) == 1:
        add_rows(total, axis, rows, part)
        return
    # Query span by query span, so that the key rows of each can be added into a view.
    begin = 0
    for span in rows:
        view = select_rows(total, axis, (span,))
        add_rows(view, *axes[1], part.narrow(axis, begin, span.length))
        begin += span.length
