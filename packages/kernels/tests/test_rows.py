"""Every row of the table against the oracle: outputs, lse and gradients, on a grid derived from what the row declares."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longattn.kernels import attend, backends, reference_attention
from longattn.kernels.dispatch.table import row
from longattn.kernels.testing import LAYOUTS, MASKS, Case, cases, check_backend, run_case
from longattn.patterncache import Dilated, Full, Pattern, Restrict, Span, Strided, Window

LONGNET = Dilated((8, 16), (1, 2), causal=True)
LISTED = Restrict(Restrict(Window(9), Dilated((4,), (2,))), Strided(4))
HEAD_DIMS = (1, 5, 8, 64, 72, 200)

ON_CPU = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name in backends("cpu")
    for dtype in row(name).capability.dtypes_on("cpu")
    if not row(name).capability.devices or "cpu" in row(name).capability.devices
]


@pytest.mark.parametrize(("name", "dtype"), ON_CPU)
@settings(max_examples=settings().max_examples // 2)
@given(data=st.data())
def test_a_row_agrees_with_the_oracle_on_any_call(name: str, dtype: torch.dtype, data: st.DataObject):
    check_backend(name, data.draw(cases(dtype)))


@pytest.mark.parametrize(("name", "dtype"), ON_CPU)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_any_head_dim(name: str, dtype: torch.dtype, head_dim: int):
    check_backend(name, Case(LONGNET, (37, 37), kv_heads=2, group=2, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize(("name", "dtype"), ON_CPU)
@pytest.mark.parametrize("dims", [(24, 16), (5, 72), (192, 128)], ids=str)
def test_v_has_its_own_head_dim(name: str, dtype: torch.dtype, dims: tuple[int, int]):
    """As in MLA (DeepSeek: 192 and 128), and wider; with a prior, grouped heads and every mask of the call."""
    case = Case(LONGNET, (37, 37), kv_heads=2, group=2, head_dim=dims[0], value_head_dim=dims[1], dtype=dtype)
    check_backend(name, case)
    check_backend(name, replace(case, mask="+bhqk", padding=True, prior=True, dropout_p=0.3))


@pytest.mark.parametrize(("name", "dtype"), ON_CPU)
@pytest.mark.parametrize(
    "feature", ["listed", "attention_mask", "key_padding", "gqa", "bias", "dropout", "softcap", "by_distance"]
)
def test_declared_features(name: str, dtype: torch.dtype, feature: str):
    case = Case(LONGNET, (19, 23), dtype=dtype, prior=True)
    case = {
        "listed": replace(case, pattern=LISTED),
        "attention_mask": replace(case, mask="bhqk"),
        "key_padding": replace(case, padding=True),
        "gqa": replace(case, group=3),
        "bias": replace(case, mask="+bhqk"),
        "dropout": replace(case, dropout_p=0.3),
        "softcap": replace(case, terms=("softcap",)),
        "by_distance": replace(case, terms=("alibi", "relative")),
    }[feature]
    if not getattr(row(name).capability, feature):
        with pytest.raises(ValueError, match="is not supported|are not supported|only strided rows"):
            run_case(case, case.tensors(), backend=name)
        return
    check_backend(name, case)


@pytest.mark.parametrize("name", backends("cpu"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(name: str, layout: str):
    """Strides of q, k, v, prior and cotangents change no result; the batch has two elements, so that they matter."""
    for which in range(5):
        layouts = tuple(layout if at == which else "plain" for at in range(5))
        check_backend(name, Case(LONGNET, (24, 32), layouts=layouts, prior=which == 3))


@pytest.mark.parametrize("name", backends("cpu"))
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("padding", [False, True])
def test_any_mask(name: str, mask: str | None, padding: bool):
    for pattern in (LONGNET, LISTED, Window(5, sinks=2)):
        check_backend(name, Case(pattern, (17, 21), group=2, mask=mask, padding=padding))


@pytest.mark.parametrize("name", backends("cpu"))
@pytest.mark.parametrize(
    "pattern",
    [
        Full(),
        Full(causal=True),
        Window(70),
        Window(40, sinks=5, causal=False),
        Dilated((300, 600), (1, 3), causal=True),
    ],
    ids=str,
)
def test_longer_than_a_strip(name: str, pattern: Pattern):
    """Several strips, pieces and tiles."""
    check_backend(name, Case(pattern, (700, 700), batch=1, kv_heads=1, group=2, head_dim=4))


@pytest.mark.parametrize("name", backends("cpu"))
@pytest.mark.parametrize("lengths", [(0, 0), (0, 5), (1, 1), (1, 40), (3, 0)])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_nothing_is_fine(name: str, lengths: tuple[int, int], batch: int):
    """N = 0, B = 0, Nk = 0."""
    pattern = Full() if lengths[0] > lengths[1] else LONGNET
    check_backend(name, Case(pattern, lengths, batch=batch, prior=True))
    check_backend(name, Case(pattern, lengths, batch=batch, mask="bhqk", padding=True))


@pytest.mark.parametrize("name", backends("cpu"))
@pytest.mark.parametrize("scale", [0.0, -0.5])
@pytest.mark.parametrize("pattern", [Full(causal=True), LONGNET, Window(3)], ids=str)
def test_any_scale(name: str, scale: float, pattern: Pattern):
    """Zero and negative scales too: what is hidden stays hidden."""
    check_backend(name, Case(pattern, (20, 20), softmax_scale=scale))


@pytest.mark.parametrize("name", backends("cpu"))
def test_huge_logits(name: str):
    """Scores of several hundred neither overflow nor lose the row."""
    check_backend(name, Case(LONGNET, (40, 40), softmax_scale=40.0))


@pytest.mark.parametrize("name", backends("cpu"))
@pytest.mark.parametrize("pattern", [Full(), Full(causal=True), Window(3), LONGNET], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_beyond_the_type(name: str, pattern: Pattern, dtype: torch.dtype):
    """-inf weighs nothing, and a row of it alone is one that sees nothing; +inf makes its row NaN. The others are as ever."""
    huge = 1e160 if dtype == torch.float64 else 1e20
    # Queries 0, 3, 6, ... have scores of -inf, 1, 4, 7, ... of 0, 2, 5, 8, ... of +inf.
    factors = torch.tensor([-1.0, 0.0, 1.0], dtype=dtype).repeat(8)[None, :, None, None] * huge
    q, k = factors.expand(1, 24, 2, 8).clone(), torch.full((1, 24, 2, 8), huge, dtype=dtype)
    v = torch.randn(1, 24, 2, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    try:
        state = attend(q, k, v, pattern, backend=name)
    except ValueError as refusal:
        pytest.skip(str(refusal))
    assert not state.out[:, 0::3].any() and (state.lse[:, 0::3] == -torch.inf).all()
    assert state.out[:, 2::3].isnan().all() and state.lse[:, 2::3].isnan().all()
    expected = attend(torch.zeros_like(q), torch.zeros_like(k), v, pattern, backend="gather")
    within = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(state.out[:, 1::3], expected.out[:, 1::3], **within)
    torch.testing.assert_close(state.lse[:, 1::3], expected.lse[:, 1::3], **within)


@pytest.mark.parametrize("name", backends("cpu"))
@settings(max_examples=settings().max_examples // 3)
@given(shift=st.integers(0, 30), keys=st.integers(1, 30))
@example(shift=4, keys=8)
def test_rows_out_of_reach(name: str, shift: int, keys: int):
    """Queries before, within and past the keys: whoever sees nothing is zero with lse -inf, also when another row asked first."""
    for pattern in (Full(causal=True), Window(3), Window(3, causal=False), LONGNET):
        case = Case(pattern, (40, keys), q_spans=(Span(0, 40),), k_spans=(Span(shift, keys),), batch=1, head_dim=2)
        for each in (*backends("cpu"), name):
            check_backend(each, case)


@pytest.mark.parametrize("name", backends("cpu"))
def test_strips_that_see_nothing_are_written(name: str):
    """Only the first strip of rows reaches the keys, whatever the height of a row's strips."""
    spans = {"q_spans": (Span(2040, 256),), "k_spans": (Span(0, 2048),)}
    check_backend(name, Case(Window(8), (256, 2048), batch=1, kv_heads=16, head_dim=2, **spans))


@pytest.mark.parametrize("name", backends("cpu"))
def test_a_bias_may_want_no_gradient(name: str):
    """Then q, k and v have theirs all the same, and it has none."""
    if not row(name).capability.bias:
        pytest.skip(f"{name} takes no bias")
    q, k, v = (torch.randn(1, 12, 2, 8, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 12, 12)
    out = attend(q, k, v, LONGNET, attention_mask=bias, backend=name).out
    truth = reference_attention(q, k, v, LONGNET.to_dense(12, 2), bias=bias).out
    grad = torch.randn_like(out)
    for ours, true in zip(
        torch.autograd.grad(out, (q, k, v), grad),
        torch.autograd.grad(truth, (q, k, v), grad.to(truth.dtype)),
        strict=True,
    ):
        torch.testing.assert_close(ours, true.to(ours.dtype), atol=1e-4, rtol=1e-4)
