"""Sink logits: what one more key of value zero and that logit would do, once."""

import pytest
import torch

from longattn.kernels import AttentionState, attend, backends, merge, reference_attention
from longattn.kernels.dispatch.table import row
from longattn.kernels.state import add_sink, state_dtype
from longattn.kernels.testing import Case, assert_near, run_case
from longattn.patterncache import Dilated, Full, Pattern, Span, Window

LONGNET = Dilated((8, 16), (1, 2), causal=True)
ROWS = pytest.mark.parametrize("name", backends("cpu"))


def extra_key(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> AttentionState:
    """The oracle with one more key for all queries: its scores are the logits, its value is zero."""
    k, v = (torch.cat([x, x.new_zeros(x[:, :1].shape)], 1) for x in (k, v))
    counts = torch.cat([case.counts(), torch.ones(*case.counts().shape[:2], 1, dtype=torch.int64)], -1)
    last = torch.arange(k.shape[1]) == k.shape[1] - 1
    bias = torch.where(last, sinks.double()[None, :, None, None], 0.0)
    return reference_attention(q, k, v, counts, bias=bias)


@ROWS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", [LONGNET, Full(), Window(3), Dilated((6,), (4,))], ids=str)
def test_sinks_are_one_more_key(name: str, dtype: torch.dtype, pattern: Pattern):
    """Out, lse, and gradients of q, k, v and the logits; rows that see no other key see the sink."""
    if dtype not in row(name).capability.dtypes_on("cpu"):
        pytest.skip(f"{name} declares no {dtype}")
    case = Case(pattern, (20, 20), kv_heads=2, group=2, dtype=dtype)
    data, sinks = case.tensors(), torch.tensor([-1.0, 0.5, 2.0, 0.0], dtype=state_dtype(dtype))
    results = []
    for compute in ("row", "oracle"):
        leaves = [x.detach().clone().requires_grad_() for x in (data.q, data.k, data.v, sinks)]
        if compute == "row":
            state = attend(*leaves[:3], pattern, sink_logits=leaves[3], backend=name)
        else:
            state = extra_key(case, *leaves)
        cotangents = [data.grad_out.to(state.out.dtype), data.grad_lse.to(state.lse.dtype)]
        results.append((state.out, state.lse, *torch.autograd.grad([state.out, state.lse], leaves, cotangents)))
    close = 1e-10 if dtype == torch.float64 else 1e-4 if dtype == torch.float32 else 5e-2
    for at, (got, expected) in enumerate(zip(*results, strict=True)):
        size = max(1.0, float(expected.detach().abs().max()))
        assert_near(got, expected, close * size, close, str(at))
    assert results[0][0].isfinite().all() and results[0][1].isfinite().all()


@ROWS
def test_a_sink_counts_once_on_top_of_a_prior(name: str):
    """Given with the last part, or merged at the end: not once a part."""
    case = Case(LONGNET, (24, 24))
    data, sinks = case.tensors(), torch.tensor([1.0, -0.5])
    whole = attend(data.q, data.k, data.v, LONGNET, sink_logits=sinks, backend=name)
    options = {"q_spans": Span(0, 24), "backend": name}
    first = attend(data.q, data.k[:, :9], data.v[:, :9], LONGNET, k_spans=Span(0, 9), **options)
    rest = {"k_spans": Span(9, 15), **options}
    both = attend(data.q, data.k[:, 9:], data.v[:, 9:], LONGNET, prior=first, sink_logits=sinks, **rest)
    last = attend(data.q, data.k[:, 9:], data.v[:, 9:], LONGNET, sink_logits=sinks, **rest)
    for state in (both, merge(first, last), add_sink(run_case(case, data, backend=name), sinks)):
        assert_near(state.out, whole.out, 2e-5, 2e-5, "out")
        assert_near(state.lse, whole.lse, 2e-5, 2e-5, "lse")


def test_a_sink_of_minus_infinity_is_none():
    """Also where no key is seen at all; no gradient is NaN."""
    q = torch.randn(1, 6, 2, 4, requires_grad=True)
    sinks = torch.full((2,), -torch.inf, requires_grad=True)
    pattern = Dilated((6,), (2,))
    state, plain = attend(q, q, q, pattern, sink_logits=sinks), attend(q, q, q, pattern)
    assert torch.equal(state.out, plain.out) and torch.equal(state.lse, plain.lse)
    assert (plain.lse == -torch.inf).any()
    root = state.out.square().sum() + state.lse.masked_fill(state.lse == -torch.inf, 0).sum()
    assert all(g.isfinite().all() for g in torch.autograd.grad(root, (q, sinks)))


def test_sinks_and_dropout():
    """lse is undropped, so the share that the sink takes is too: out is that of plain dropout, scaled."""
    q, sinks = torch.randn(1, 12, 2, 4), torch.tensor([0.3, 1.0])
    options = {"dropout_p": 0.5, "seed": 2}
    plain, both = attend(q, q, q, Full(), **options), attend(q, q, q, Full(), sink_logits=sinks, **options)
    assert_near(both.out, add_sink(plain, sinks).out, 1e-6, 1e-6, "out")
    assert_near(both.lse, attend(q, q, q, Full(), sink_logits=sinks).lse, 1e-5, 1e-5, "lse")


def test_out_dtype_with_sinks():
    """The one rounding comes after the sink."""
    q, sinks = torch.randn(1, 64, 2, 4).bfloat16(), torch.tensor([0.3, 1.0])
    wide = attend(q, q, q, Full(), sink_logits=sinks, backend="gather")
    narrow = attend(q, q, q, Full(), sink_logits=sinks, out_dtype=torch.bfloat16, backend="gather")
    assert narrow.out.dtype == torch.bfloat16 and torch.equal(narrow.out, wide.finalize(torch.bfloat16))


@pytest.mark.parametrize(
    ("sinks", "error", "words"),
    [
        ([0.0, 0.0], TypeError, "sink_logits must be a floating torch.Tensor .heads,., got list"),
        (torch.zeros(2, dtype=torch.int64), TypeError, "sink_logits must be floating, got int64"),
        (torch.zeros(3), ValueError, r"sink_logits must have shape \(heads,\) = \(2,\), got \(3,\)"),
        (torch.zeros(2, device="meta"), ValueError, "sink_logits must be on the device of q, cpu, got meta"),
    ],
)
def test_bad_sinks(sinks: object, error: type[Exception], words: str):
    q = torch.randn(1, 4, 2, 4)
    with pytest.raises(error, match=words):
        attend(q, q, q, Full(), sink_logits=sinks)  # type: ignore[arg-type]
