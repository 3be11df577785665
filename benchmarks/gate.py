"""Correctness on sampled rows: outputs and gradients of a full-length run beside the float64 oracle.

The oracle is asked for a few query rows only, so 32768 tokens cost seconds. Gradients are checked with an upstream
gradient that is zero outside the sampled rows: then dk and dv come from those rows alone, and the oracle knows them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longattn.kernels import reference_attention
from longattn.patterncache import Rectangle, Span

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

# Largest error over the largest true value: a few roundings of the dtype for outputs (float16 and bfloat16 round
# probabilities too), more for gradients, which pass through it several times.
TOLERANCE: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-10, 1e-9),
    torch.float32: (2e-5, 1e-4),
    torch.float16: (4e-3, 2e-2),
    torch.bfloat16: (3e-2, 1e-1),
}

_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Truth:
    """The oracle's float64 answers for the rows `rows`.

    `out` and `dq` are (batch, len(rows), heads, head_dim); `dk` and `dv` have the shapes of k and v.
    """

    rows: Tensor
    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def sampled_rows(seq_len: int, borders: Sequence[int], amount: int, seed: int = 0) -> list[int]:
    """Positions worth checking: both ends, both sides of every border, and random ones up to `amount`; sorted."""
    near = [0, 1, seq_len - 1, *(border + step for border in borders for step in (-1, 0, 1))]
    chosen = dict.fromkeys(row for row in near if 0 <= row < seq_len)
    generator = torch.Generator().manual_seed(seed)
    for row in torch.randperm(seq_len, generator=generator).tolist():
        if len(chosen) >= amount:
            break
        chosen[row] = None
    return sorted(chosen)


def oracle(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, pattern: Any, rows: Sequence[int]) -> Truth:
    """Exact outputs and gradients for the given query rows, in float64 on the CPU.

    Args:
        q, k, v: (batch, seq, heads, head_dim).
        grad_out: as the output; only its sampled rows are read.
        pattern: who sees whom.
        rows: positions of queries.
    """
    seq, heads = q.shape[1], q.shape[2]
    k64, v64 = (x.detach().cpu().double().requires_grad_() for x in (k, v))
    dk, dv = torch.zeros_like(k64), torch.zeros_like(v64)
    outs, dqs = [], []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        some = list(rows[start : start + _ROWS_AT_ONCE])
        rectangle = Rectangle(num_heads=heads, queries=tuple(Span(row, 1) for row in some), keys=(Span(0, seq),))
        # A copy: the counts may be a read-only view, which torch does not take.
        counts = torch.tensor(pattern.counts(rectangle))
        q64 = q.detach()[:, some].cpu().double().requires_grad_()
        out = reference_attention(q64, k64, v64, counts).out
        upstream = grad_out.detach()[:, some].cpu().double()
        grads = torch.autograd.grad(out, (q64, k64, v64), upstream)
        outs.append(out.detach())
        dqs.append(grads[0])
        dk += grads[1]
        dv += grads[2]
    return Truth(torch.tensor(list(rows)), torch.cat(outs, 1), torch.cat(dqs, 1), dk, dv)


def errors(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, truth: Truth, *, gradients: bool = True
) -> dict[str, float]:
    """The largest error of out, dq, dk and dv on sampled rows, each over the largest true value.

    Args:
        attention: the path under test, differentiable unless `gradients` is False.
        q, k, v, grad_out: (batch, seq, heads, head_dim), as given to `oracle`.
        truth: the oracle's answers.
        gradients: False checks the output alone. Default True.

    Returns:
        {"out": ..., "dq": ..., "dk": ..., "dv": ...}; NaN anywhere makes its entry infinite.
    """
    rows = truth.rows.to(q.device)
    if not gradients:
        with torch.no_grad():
            return {"out": relative_error(attention(q, k, v)[:, rows], truth.out)}
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    masked = torch.zeros_like(grad_out)
    masked[:, rows] = grad_out[:, rows]
    out = attention(*inputs)
    dq, dk, dv = torch.autograd.grad(out, inputs, masked)
    return {
        "out": relative_error(out.detach()[:, rows], truth.out),
        "dq": relative_error(dq[:, rows], truth.dq),
        "dk": relative_error(dk, truth.dk),
        "dv": relative_error(dv, truth.dv),
    }


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest |got - expected| / largest |expected|, in float64; infinite if anything is NaN.

    The divisor is at least 1e-3: where a row sees one key its true dq and dk are zero, and roundings are no error.
    """
    difference = (got.detach().cpu().double() - expected.detach()).abs().max().item()
    error = difference / max(expected.detach().abs().max().item(), 1e-3)
    return float("inf") if math.isnan(error) else error


def red(name: str, errors: dict[str, float], dtype: torch.dtype) -> list[str]:
    """A sentence for each error above its tolerance; empty is green."""
    out_limit, grad_limit = TOLERANCE[dtype]
    limits = {key: out_limit if key == "out" else grad_limit for key in errors}
    return [
        f"{name}: error of {key} is {error:.2e}, above {limits[key]:.0e} for {dtype}"
        for key, error in errors.items()
        if not error <= limits[key]
    ]
