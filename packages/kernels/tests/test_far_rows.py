"""A bias of finfo.min, or of any finite number, is a number: only -inf hides. Rows that have no other bias are exact in every row of the table."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given

from longattn.kernels import AttentionState, attend, backends, merge, reference_attention
from longattn.kernels.dispatch.table import row
from longattn.kernels.far_rows import bounded, row_counts
from longattn.kernels.testing import Case, assert_near, cases, expect_case, run_case
from longattn.patterncache import Dilated, Full, Rectangle, Restrict, Span, Strided, Window

LONGNET = Dilated((8, 16), (1, 2), causal=True)
LISTED = Restrict(Restrict(Window(9), Dilated((4,), (2,))), Strided(4))
ROWS = pytest.mark.parametrize("name", backends("cpu"))
LOWEST = {dtype: torch.finfo(dtype).min for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def agree(name: str, case: Case, bias: torch.Tensor, bias_grad: bool = False, tolerance: float = 1e-4) -> None:
    """out, lse and gradients of a row against the oracle."""
    data, found = replace(case.tensors(), mask=bias), []
    for compute, options in ((run_case, {"backend": name}), (expect_case, {})):
        q, k, v = (x.detach().requires_grad_() for x in (data.q, data.k, data.v))
        mask = bias.clone().requires_grad_() if bias_grad else bias
        state = compute(case, replace(data, q=q, k=k, v=v, mask=mask), **options)
        lse = state.lse.masked_fill(state.lse == -torch.inf, 0)
        wanted = (q, k, v, mask) if bias_grad else (q, k, v)
        cotangents = [data.grad_out.to(state.out.dtype), data.grad_lse.to(lse.dtype)]
        # A float32 state ends before a float64 bias does.
        lowest = LOWEST[torch.float64 if case.dtype == torch.float64 else torch.float32]
        whole = state.lse.detach().clamp(lowest, -lowest).masked_fill(state.lse == -torch.inf, -torch.inf)
        found.append((state.out.detach(), whole, *torch.autograd.grad([state.out, lse], wanted, cotangents)))
    for at, (got, expected) in enumerate(zip(*found, strict=True)):
        size = 1.0 if at == 1 else max(1.0, float(expected.abs().max()))
        assert_near(got, expected, tolerance * size, tolerance, f"{name}: {case}")


@ROWS
@pytest.mark.parametrize("dtype", LOWEST, ids=str)
@pytest.mark.parametrize("pattern", [LONGNET, LISTED], ids=["strided", "listed"])
def test_a_row_of_the_lowest_number(name: str, dtype: torch.dtype, pattern):
    """Rows of nothing else, of nothing else but -inf, and with one ordinary key, in every dtype of a bias: parts of a row too."""
    bias = torch.randn(19, 19, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias[3] = bias[11] = LOWEST[dtype]
    bias[7], bias[7, 5:9] = -torch.inf, LOWEST[dtype]
    bias[12, :10] = LOWEST[dtype]
    # float32 scores beside -65504 have eight bits behind the point.
    agree(
        name,
        Case(pattern, (19, 19), group=2, kv_heads=1, batch=1),
        bias,
        tolerance=2e-2 if dtype == torch.float16 else 1e-4,
    )


@ROWS
def test_it_is_the_mean_of_what_is_seen(name: str):
    """Scores vanish beside finfo.min, as they do in float64, so every key that is seen counts the same."""
    q, k, v = torch.randn(3, 1, 300, 2, 8, generator=torch.Generator().manual_seed(0))
    state = attend(q, k, v, Window(290), attention_mask=torch.full((300, 300), LOWEST[torch.float32]), backend=name)
    expected = torch.stack([v[:, max(0, i - 289) : i + 1].mean(1) for i in range(300)], 1)
    assert_near(state.out, expected, 1e-5, 1e-5, name)
    assert state.lse.isfinite().all()


@ROWS
@pytest.mark.parametrize("value", [-1e9, 1e9, 1e38, -(2.0**21)])
def test_any_huge_number(name: str, value: float):
    """-1e9, which many masks are made of, and its kin: over a row it changes nothing but lse."""
    case = Case(LONGNET, (19, 19), group=2, prior=abs(value) < 1e9, dropout_p=0.3 * row(name).capability.dropout)
    bias = torch.randn(19, 19, generator=torch.Generator().manual_seed(0))
    bias[4:9] = value
    if case.prior:
        data = replace(case.tensors(), mask=bias)
        got, expected = run_case(case, data, backend=name), expect_case(case, data)
        assert_near(got.out, expected.out, 1e-4, 1e-4, name)
        assert_near(got.lse, expected.lse, 1e-4, 1e-4, name)
    else:
        agree(name, case, bias)


@ROWS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name: str, dtype: torch.dtype):
    """q, k, v in half precision, with a bias of their own dtype and of float32."""
    if dtype not in row(name).capability.dtypes_on("cpu"):
        pytest.skip(f"{name} has no {dtype}")
    for wide in (dtype, torch.float32):
        bias = torch.zeros(17, 17, dtype=wide)
        bias[2], bias[5, 1:] = LOWEST[wide], LOWEST[wide]
        agree(name, Case(Full(causal=True), (17, 17), dtype=dtype), bias, tolerance=6e-2)


@pytest.mark.parametrize("name", [name for name in backends("cpu") if row(name).capability.bias_grad])
@pytest.mark.parametrize("shape", [(13, 13), (4, 13, 1), (1, 13), (2, 1, 13, 13)], ids=str)
def test_the_gradient_of_such_a_bias(name: str, shape: tuple[int, ...]):
    """In every broadcast shape, where it is a leaf."""
    bias = torch.zeros(shape)
    bias[..., : (shape[-2] + 1) // 2, :] = LOWEST[torch.float32]
    agree(name, Case(LONGNET, (13, 13), group=2), bias, bias_grad=True)


@ROWS
def test_only_minus_infinity_hides(name: str):
    """A key with finfo.min beside ordinary ones weighs nothing; a row of -inf saw nothing; +finfo.max outweighs all."""
    q, k, v = torch.randn(3, 1, 6, 1, 4, generator=torch.Generator().manual_seed(0))
    bias = torch.zeros(6, 6)
    bias[0], bias[1, 2:], bias[2, 4] = -torch.inf, LOWEST[torch.float32], -LOWEST[torch.float32]
    state = attend(q, k, v, Full(), attention_mask=bias, backend=name)
    assert state.lse[0, 0] == -torch.inf and not state.out[0, 0].any()
    seen = bias == 0
    seen[2] = torch.arange(6) == 4
    assert_near(state.out[:, 1:3], attend(q, k, v, Full(), attention_mask=seen).out[:, 1:3], 1e-5, 1e-5, name)


def test_the_oracle_divides_by_the_sum():
    """In float64 too a lse of finfo.min has no room for the number of keys: out is the mean all the same, and dv its gradient."""
    q, k, v = torch.randn(3, 1, 5, 1, 4).unbind()
    v.requires_grad_()
    state = reference_attention(q, k, v, np.ones((1, 5, 5)), bias=torch.full((5, 5), LOWEST[torch.float32]))
    assert_near(state.out, v.mean(1, keepdim=True).expand(1, 5, 1, 4), 1e-6, 1e-6, "out")
    (grad,) = torch.autograd.grad(state.out.sum(), v)
    assert_near(grad, torch.ones_like(v), 1e-6, 1e-6, "dv")


@given(cases())
@example(Case(LISTED, (12, 17)))
def test_counts_of_single_rows(case: Case):
    """`row_counts` is the plan's counts, row by row."""
    nq, nk = case.lengths
    first, total = case.shard or (0, case.kv_heads * case.group)
    queries = (Span(max(0, nk - nq), nq),) if case.q_spans is None else case.q_spans
    keys = (Span(0, nk),) if case.k_spans is None else case.k_spans
    plan = case.pattern.plan(Rectangle(total, queries, keys, Span(first, case.kv_heads * case.group)))
    expected = plan.counts()
    rows = np.arange(nq)[::-1].copy()
    for head in range(case.kv_heads * case.group):
        assert np.array_equal(row_counts(plan, head, rows), expected[head][::-1])


def test_bounded():
    x = torch.tensor([-torch.inf, -1e38, -3.0, torch.nan, 1e38, torch.inf])
    assert torch.equal(
        bounded(x).nan_to_num(7), torch.tensor([-torch.inf, -1e30, -3.0, 7, 1e30, torch.inf]).nan_to_num(7)
    )
    assert bounded(x.half()) is not None and bounded(x.half()).dtype == torch.float16


def test_parts_of_a_merged_row():
    """An ordinary part outweighs a far one; two far parts of one lse weigh the same, for lse holds no more."""
    q, k, v = torch.randn(3, 1, 4, 1, 4).unbind()
    low = torch.full((4, 4), LOWEST[torch.float32])
    far, near = attend(q, k, v, Full(), attention_mask=low), attend(q, k, v, Full())
    assert_near(merge(far, near).out, near.out, 1e-6, 1e-6, "out")
    assert_near(
        attend(q, k, v, Full(), attention_mask=low, prior=AttentionState(near.out, near.lse)).out,
        near.out,
        1e-6,
        1e-6,
        "prior",
    )
    assert_near(merge(far, far).out, far.out, 1e-6, 1e-6, "out")
