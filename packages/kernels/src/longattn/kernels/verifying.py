"""Sampled rows of a call beside the float64 oracle: what `explain(verify=...)` states."""

# torch's own types are partial.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import torch
from torch import Tensor

from longattn.kernels.entry import attend
from longattn.kernels.reference import reference_attention
from longattn.patterncache import Pattern, Rectangle, Span

MOST_ROWS = 16
Triple = tuple[Tensor, Tensor, Tensor]


def drawn(q_shape: tuple[int, ...], k_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Triple:
    """Unit normal q, k and v, the same each time."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in (q_shape, k_shape, k_shape))
    return q, k, v


def sampled(count: int) -> list[int]:
    """Rows to look at: both ends, and random ones between; the same each time."""
    generator = torch.Generator().manual_seed(0)
    chosen = {row for row in (0, count - 1) if 0 <= row < count}
    drawn_rows: list[int] = torch.randperm(count, generator=generator)[:MOST_ROWS].tolist()
    for row in drawn_rows:
        if len(chosen) < MOST_ROWS:
            chosen.add(row)
    return sorted(chosen)


def errors_of(
    tensors: Triple, pattern: Pattern, queries: Span, backend: str, backward: bool
) -> tuple[tuple[str, float], ...]:
    """The largest absolute errors of out and lse, and of dq, dk and dv with `backward`, on sampled query rows.

    queries: where the rows of q stand. Gradients are of an upstream gradient of ones in the sampled rows and zero elsewhere.
    """
    q, k, v = (x.detach().clone().requires_grad_(backward) for x in tensors)
    rows = sampled(q.shape[1])
    if not rows:
        return ()
    state = attend(q, k, v, pattern, q_spans=queries, backend=backend)
    spans = tuple(Span(queries.start + row * queries.step, 1) for row in rows)
    counts = torch.from_numpy(pattern.counts(Rectangle(q.shape[2], spans, Span(0, k.shape[1]))).copy())
    exact_q, exact_k, exact_v = (x.detach().cpu().double().requires_grad_(backward) for x in (q[:, rows], k, v))
    truth = reference_attention(exact_q, exact_k, exact_v, counts)
    pairs = [("out", state.out[:, rows], truth.out), ("lse", state.lse[:, rows], truth.lse)]
    if backward:
        upstream = torch.zeros_like(state.out)
        upstream[:, rows] = 1
        dq, dk, dv = torch.autograd.grad(state.out, (q, k, v), upstream)
        exact_gradients = torch.autograd.grad(truth.out, (exact_q, exact_k, exact_v), torch.ones_like(truth.out))
        pairs += [
            (f"d{name}", *pair) for name, *pair in zip("qkv", (dq[:, rows], dk, dv), exact_gradients, strict=True)
        ]
    return tuple((name, _largest(got, expected)) for name, got, expected in pairs)


def _largest(got: Tensor, expected: Tensor) -> float:
    """NaN where only one of both is infinite, or is NaN."""
    got, expected = got.detach().cpu().double(), expected.detach()
    equal = got == expected  # infinities too
    return float(torch.where(equal, 0.0, (got - expected).abs()).max()) if got.numel() else 0.0
