"""Inputs whose elements share memory (windows of `unfold`, expanded axes): every row reads them as the values that they are."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longattn.kernels import attend, backends
from longattn.kernels.dispatch.table import row
from longattn.kernels.eager.strides import overlaps, separated
from longattn.kernels.testing import Case, Tensors, assert_near, expect_case, lay_out, run_case, tolerance
from longattn.patterncache import Dilated, Full, Restrict, Strided, Window

LONGNET = Dilated((8, 16), (1, 2), causal=True)
SHARED = ("plain", "expanded_batch", "expanded_seq", "expanded_heads", "expanded_dim", "unfolded", "unfolded_heads")
PATTERNS = (
    Full(),
    Full(causal=True),
    Window(5, sinks=1),
    LONGNET,
    Restrict(Restrict(Window(9), Dilated((4,), (2,))), Strided(4)),
)
MASKS = (None, "bool expanded", "bool windows", "float expanded", "float windows")


def lay_out_mask(kind: str | None, shape: tuple[int, int, int, int], seed: int) -> torch.Tensor | None:
    """A mask of this shape: one row for all queries, or one line of distances of which each query has its window."""
    if kind is None:
        return None
    random = torch.Generator().manual_seed(seed)
    _, _, nq, nk = shape
    line = torch.randn(nq + nk - 1, generator=random)
    if kind.startswith("bool"):
        line = line < 1
    rows = line[:nk].expand(nq, nk) if kind.endswith("expanded") else line.unfold(0, nk, 1)
    return rows.expand(shape)


def check(name: str, case: Case, data: Tensors) -> None:
    """out, lse and gradients of a row against the oracle, on tensors as they lie."""
    found = []
    for compute, options in ((run_case, {"backend": name}), (expect_case, {})):
        q, k, v = (x.detach().requires_grad_() for x in (data.q, data.k, data.v))
        state = compute(case, replace(data, q=q, k=k, v=v), **options)
        lse = state.lse.masked_fill(state.lse == -torch.inf, 0)
        cotangents = [data.grad_out.to(state.out.dtype), data.grad_lse.to(lse.dtype)]
        found.append((state.out.detach(), lse.detach(), *torch.autograd.grad([state.out, lse], (q, k, v), cotangents)))
    atol, rtol = tolerance(name, case.dtype)
    for got, expected in zip(*found, strict=True):
        size = 10 * max(1.0, float(expected.abs().max()))
        assert_near(got, expected, atol * size, rtol * size, f"{name}: {case}")


@pytest.mark.parametrize("name", backends("cpu"))
@settings(max_examples=settings().max_examples // 2)
@given(
    pattern=st.sampled_from(PATTERNS),
    group=st.integers(1, 2),
    layouts=st.tuples(*[st.sampled_from(SHARED)] * 4),
    mask=st.sampled_from(MASKS),
    padding=st.booleans(),
    seed=st.integers(0, 9),
)
@example(Full(), 1, ("unfolded", "plain", "plain", "plain"), None, False, 0)
@example(LONGNET, 1, ("unfolded_heads", "plain", "plain", "plain"), None, False, 0)
@example(Full(), 2, ("plain", "unfolded", "expanded_seq", "expanded_batch"), None, False, 0)
@example(Window(5, sinks=1), 1, ("unfolded",) * 4, "float windows", True, 1)
def test_any_shared_memory(name, pattern, group, layouts, mask, padding, seed):
    """q, k, v, cotangents, masks and padding: overlapping, expanded, or both, on patterns of one tile, many, and lists."""
    case = Case(pattern, (19, 19), group=group, layouts=(*layouts[:3], "plain", layouts[3]), seed=seed)
    data = case.tensors()
    mask = lay_out_mask(mask, (2, 2 * group, 19, 19), seed)
    hidden = (torch.arange(19) % 5 == 1).expand(2, 19) if padding else None
    check(name, case, replace(data, mask=mask, padding=hidden))


@pytest.mark.parametrize(
    "name", [name for name in backends("cpu") if torch.bfloat16 in row(name).capability.dtypes_on("cpu")]
)
@pytest.mark.parametrize("queries", [1, 3])
def test_few_queries_over_windows(name: str, queries: int):
    """A decode step whose keys are windows of one line of numbers, in half precision."""
    case = Case(
        Full(causal=True), (queries, 70), group=3, layouts=("unfolded",) * 3 + ("plain",) * 2, dtype=torch.bfloat16
    )
    data = case.tensors()
    got, expected = run_case(case, data, backend=name), expect_case(case, data)
    assert_near(got.out, expected.out, 3e-2, 3e-2, "out")


def test_a_cotangent_of_sum():
    """`sum` has a cotangent of one number, expanded along every axis."""
    for name in backends("cpu"):
        q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 20, 2, 8, generator=torch.Generator().manual_seed(0)))
        grads = [
            torch.autograd.grad(attend(q, k, v, LONGNET, backend=name).out, (q, k, v), cotangent)
            for cotangent in (torch.ones(()).expand(2, 20, 2, 8), torch.ones(2, 20, 2, 8))
        ]
        for one, other in zip(*grads, strict=True):
            assert_near(one, other, 1e-5, 1e-5, name)


def test_what_overlaps():
    """Judged by strides: axes of length 1 do not count."""
    x = torch.randn(2, 6, 3, 4)
    for layout in ("plain", "heads_first", "sliced", "strided_dim"):
        assert not overlaps(lay_out(x, layout)), layout
        assert separated(lay_out(x, layout)).data_ptr() == lay_out(x, layout).data_ptr() or layout != "plain"
    for layout in SHARED[1:]:
        assert overlaps(lay_out(x, layout)), layout
        assert torch.equal(separated(lay_out(x, layout)), lay_out(x, layout))
    assert not overlaps(x[:, :1].expand(2, 1, 3, 4)) and not overlaps(x[:0])
    assert not overlaps(lay_out(x, "expanded_heads"), (1, 3)) and overlaps(lay_out(x, "unfolded"), (1, 3))
