"""Measuring a row, once: its rate on a small problem, and what a call costs beside it.

In a caller's process other threads may compute meanwhile, so a probe looks at a clock on the wall and counts every thread of torch's as
busy; a measurement in a process of its own reads CPU time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _disable_current_modes

from longattn.kernels.dispatch.call import Call
from longattn.kernels.dispatch.environment import TorchAllocator
from longattn.kernels.dispatch.rates import PROBED, Numbers
from longattn.kernels.dispatch.table import TableRow
from longattn.kernels.dispatch.work import Work
from longattn.kernels.ops.arguments import Cotangents, OpTensors
from longattn.patterncache import Full, Pattern, Rectangle, Span

TOKENS, TINY, REPEATS = 1024, 16, 3
_PATIENCE = 0.02
"""Seconds of calls after which none is added: the row is slow, and need not be known better."""


def probe(row: TableRow, dtype: torch.dtype) -> Numbers:
    """The figures of a row on `Full()` of `TOKENS` tokens, one head: milliseconds, some ten for rows that are slow.

    Works on tensors of its own, beside whatever mode, generator or autograd state the caller has.
    """
    form, head_dim = PROBED
    numbers: Numbers = {}
    for direction in ("forward", "backward") if row.capability.backward else ("forward",):
        tiny, whole = (seconds_of(row, dtype, Full(), n, 1, head_dim, direction) for n in (TINY, TOKENS))
        # A tiny problem keeps one thread busy, and the others asleep or waiting.
        numbers[direction] = numbers_of(
            Work(form, TOKENS * TOKENS, head_dim), direction, whole * torch.get_num_threads(), tiny
        )
    return numbers


def numbers_of(work: Work, direction: str, seconds: float, overhead: float) -> dict[str, float]:
    """An overhead in microseconds and a rate in GFLOP a second, of a measurement that holds both."""
    # A row that takes as long for a tiny problem is all overhead: then half of the time counts as computing.
    computing = max(seconds - overhead, seconds / 2)
    rate = work.operations(direction) / computing * 1e-9
    return {"overhead_us": round(overhead * 1e6, 2), f"{work.form} {work.head_dim}": round(rate, 3)}


def seconds_of(
    row: TableRow,
    dtype: torch.dtype,
    pattern: Pattern,
    tokens: int,
    heads: int,
    head_dim: int,
    direction: str,
    queries: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
    patience: float = _PATIENCE,
) -> float:
    """The least time of one call of a row by a clock, in seconds; `queries` are the last of the tokens, by default all."""
    queries = tokens if queries is None else queries
    head_dim = min(head_dim, row.capability.max_head_dim or head_dim)
    generator = torch.Generator().manual_seed(0)
    form = {"generator": generator, "dtype": torch.float32, "device": "cpu"}  # whatever the caller's defaults are
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad(), torch._C._DisableAutocast():
        q, grad = (torch.randn(1, queries, heads, head_dim, **form).to(dtype) for _ in range(2))
        k, v = (torch.randn(1, tokens, heads, head_dim, **form).to(dtype) for _ in range(2))
        plan = pattern.plan(Rectangle(heads, Span(tokens - queries, queries), Span(0, tokens)))
        allocator = TorchAllocator()
        call = Call(q, k, v, plan, head_dim**-0.5, None, None, None, None, 0.0, 0, dtype, False, allocator)
        out, lse = row.forward(call)
        # Calls that come again are bound where the row can: that is what they cost.
        if direction == "forward":
            bound = None if row.bind is None else row.bind(call, out, lse)
            again = (lambda: row.forward(call)) if bound is None else (lambda: bound(q, k, v, None, allocator))
            return _least(again, clock, patience)
        given = Cotangents(grad, None, out, lse)
        gradients = row.backward(call, *given, False)
        bound = None if row.bind_backward is None else row.bind_backward(call, *given, gradients)
        if bound is None:
            return _least(lambda: row.backward(call, *given, False), clock, patience)
        return _least(lambda: bound(given, OpTensors(q, k, v), allocator), clock, patience)


def _least(compute: Callable[[], object], clock: Callable[[], float], patience: float) -> float:
    least, spent = float("inf"), 0.0
    for _ in range(REPEATS):
        begun = clock()
        compute()
        taken = clock() - begun
        least, spent = min(least, taken), spent + taken
        if spent > patience:
            break
    return least
