"""One call against the float64 oracle: `Case` names it, `check_backend` asks a row for it, gradients included.

Needs torch alone: benchmarks on a bare machine use it. `testing` has it for tests, with Hypothesis strategies.
"""

# torch's own types are partial.
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longattn.kernels.cases import Case, Tensors
from longattn.kernels.dispatch.table import row
from longattn.kernels.entry import attend
from longattn.kernels.reference import reference_attention
from longattn.kernels.state import AttentionState, merge
from longattn.kernels.terms import Alibi, tensors_in
from longattn.patterncache import Span


def tolerance(name: str, dtype: torch.dtype) -> tuple[float, float]:
    """(absolute, relative) error that the row `name` declares for outputs on unit normal inputs of `dtype`."""
    return row(name).capability.tolerance[dtype]


def run_case(case: Case, data: Tensors, **options: Any) -> AttentionState:
    """`attend` on the data of a case."""
    heads = case.kv_heads * case.group
    first, total = case.shard or (0, heads)
    options |= {"is_causal": case.is_causal, "softmax_scale": case.softmax_scale, "prior": data.prior}
    options |= {"q_spans": case.q_spans, "k_spans": case.k_spans, "heads": Span(first, heads), "num_heads": total}
    options |= {"attention_mask": data.mask, "key_padding_mask": data.padding}
    options |= {"dropout_p": case.dropout_p, "seed": case.seed, "score_terms": data.terms}
    return attend(data.q, data.k, data.v, case.pattern, **options)


def expect_case(case: Case, data: Tensors) -> AttentionState:
    """The oracle on the data of a case, in float64."""
    counts = case.counts().to(case.device).expand(case.batch, -1, -1, -1)
    bias = data.mask if data.mask is not None and data.mask.is_floating_point() else None
    if data.mask is not None and bias is None:
        counts = counts * data.mask
    options: dict[str, Any] = {"bias": bias, "key_padding_mask": data.padding, "keep": case.keep()}
    i, j = case.positions()
    options |= {"score_terms": data.terms, "distance": j - i[:, None]}
    state = reference_attention(data.q, data.k, data.v, counts, case.softmax_scale, **options)
    if data.prior is None:
        return state
    return merge(AttentionState(data.prior.out.double(), data.prior.lse.double()), state)


def check_backend(name: str, case: Case) -> None:
    """Assert that a row agrees with the oracle on a case: out, lse, and the gradients of q, k, v, prior and, where declared, bias.

    Also: no input is written, the same input gives the same bits, rows that saw nothing are zero, and nothing is NaN. A row without
    dropout, or without a kind of score term, is asked without.
    """
    capability = row(name).capability
    case = case if capability.dropout else replace(case, dropout_p=0.0)
    terms = (kind for kind in case.terms if (capability.softcap if kind == "softcap" else capability.by_distance))
    case = replace(case, terms=tuple(terms))
    data = case.tensors()
    inputs = [x for x in (data.q, data.k, data.v, data.mask, data.padding) if x is not None]
    inputs += [] if data.prior is None else [data.prior.out, data.prior.lse]
    inputs += tensors_in(data.terms)
    before = [(x.clone(), x._version) for x in inputs]
    got, expected = run_case(case, data, backend=name), expect_case(case, data)
    again = run_case(case, data, backend=name)
    assert torch.equal(got.out, again.out) and torch.equal(got.lse, again.lse), f"{name}: other bits for {case}"
    atol, rtol = tolerance(name, case.dtype)
    # Rounding a score of size s moves its weight by the share s * eps.
    slack = max(1.0, _largest_score(case, data) / 8) / (1 - case.dropout_p)
    assert_near(got.out, expected.out, atol * slack, rtol * slack, f"{name}: out of {case}")
    assert_near(got.lse, expected.lse, atol * slack, rtol * slack, f"{name}: lse of {case}")
    assert not got.out[got.lse == -torch.inf].any()
    if capability.backward:
        beside = (capability.bias_grad, capability.by_distance_grad)
        graded = _gradients(run_case, case, beside, name), _gradients(expect_case, case, beside)
        for index, (computed, exact) in enumerate(zip(*graded, strict=True)):
            size = 4 * slack * max(1.0, float(exact.abs().max()) if exact.numel() else 0.0)
            assert_near(computed, exact, atol * size, rtol * size, f"{name}: gradient {index} of {case}")
    for x, (values, version) in zip(inputs, before, strict=True):
        assert x._version == version and torch.equal(x.nan_to_num(), values.nan_to_num()), (
            f"{name} wrote an input of {case}"
        )


def assert_near(got: Tensor, expected: Tensor, atol: float, rtol: float, what: str) -> None:
    """Equal shapes, and |got - expected| <= atol + rtol * |expected|; NaN is never near, -inf only to -inf."""
    torch.testing.assert_close(
        got.double(),
        expected.double(),
        atol=atol,
        rtol=rtol,
        msg=lambda difference: f"{what}\n{difference}",
        check_device=False,
    )


def _largest_score(case: Case, data: Tensors) -> float:
    q, k = (x.detach().double().nan_to_num() for x in (data.q, data.k))
    if not q.numel() or not k.numel():
        return 0.0
    scale = case.head_dim**-0.5 if case.softmax_scale is None else abs(case.softmax_scale)
    product = float(scale * q.norm(dim=-1).max() * k.norm(dim=-1).max())
    i, j = case.positions()
    slopes = max((float(t.slopes.detach().abs().max()) for t in data.terms if isinstance(t, Alibi)), default=0.0)
    return product + slopes * float((j - i[:, None]).abs().max())


def _gradients(
    compute: Callable[..., AttentionState], case: Case, beside: tuple[bool, bool], backend: str | None = None
) -> tuple[Tensor, ...]:
    """beside: whether of a bias, and of what score terms hold."""
    bias_grad, terms_grad = beside
    data = case.tensors()
    q, k, v = (x.detach().requires_grad_() for x in (data.q, data.k, data.v))
    prior = data.prior and AttentionState(
        data.prior.out.detach().requires_grad_(), data.prior.lse.detach().requires_grad_()
    )
    bias = data.mask.requires_grad_() if bias_grad and data.mask is not None and data.mask.is_floating_point() else None
    parameters = [x.requires_grad_() for x in tensors_in(data.terms)] if terms_grad else []
    graded = replace(data, q=q, k=k, v=v, prior=prior)
    state = compute(case, graded, **({} if backend is None else {"backend": backend}))
    inputs = [q, k, v] + ([] if prior is None else [prior.out, prior.lse]) + ([] if bias is None else [bias])
    inputs += parameters
    # A cotangent at lse = -inf has no meaning.
    grad_lse = data.grad_lse.masked_fill(state.lse == -torch.inf, 0)
    cotangents = [data.grad_out.to(state.out.dtype), grad_lse.to(state.lse.dtype)]
    return torch.autograd.grad([state.out, state.lse], inputs, cotangents)
