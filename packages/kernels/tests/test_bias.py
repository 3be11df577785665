"""A floating attention_mask: added to the scaled scores, -inf hides, with a gradient where a row has one.

Random calls of every row with every broadcast shape are in test_rows; here is what they do not say.
"""

import pytest
import torch

from longattn.kernels import attend, backends, explain
from longattn.kernels.dispatch.table import row
from longattn.kernels.testing import BIASES, Case, assert_near, check_backend, expect_case
from longattn.patterncache import Dilated, Full, Pattern, Restrict, Strided, Window

LONGNET = Dilated((8, 16), (1, 2), causal=True)
LISTED = Restrict(Restrict(Window(9), Dilated((4,), (2,))), Strided(4))
ROWS = pytest.mark.parametrize("name", backends("cpu"))
GRADED = pytest.mark.parametrize("name", [name for name in backends("cpu") if row(name).capability.bias_grad])
SHAPES = [(), (1,), (7,), (6, 1), (6, 7), (4, 1, 1), (4, 1, 7), (2, 1, 1, 7), (2, 4, 6, 7), (2, 1, 6, 1)]


@ROWS
@pytest.mark.parametrize("axes", BIASES)
def test_any_bias(name: str, axes: str):
    """Every broadcast shape, with -inf entries, on strided, banded and listed plans, with and without padding."""
    for pattern, padding in ((LONGNET, False), (LISTED, True), (Window(5, sinks=2), False)):
        check_backend(name, Case(pattern, (17, 21), group=2, mask=axes, padding=padding, seed=3))


@ROWS
def test_longer_than_a_tile(name: str):
    check_backend(name, Case(Window(290), (300, 300), batch=1, kv_heads=1, group=2, head_dim=4, mask="+qk"))


@ROWS
def test_a_bias_of_minus_infinity_is_a_mask(name: str):
    """Same out, lse and gradients as a bool mask, rows that see nothing included."""
    data = Case(LONGNET, (12, 12)).tensors()
    seen = torch.rand(12, 12, generator=torch.Generator().manual_seed(1)) < 0.6
    seen[3] = False
    results = []
    for mask in (seen, torch.zeros(12, 12).masked_fill(~seen, -torch.inf)):
        q, k, v = (x.clone().requires_grad_() for x in (data.q, data.k, data.v))
        state = attend(q, k, v, LONGNET, attention_mask=mask, backend=name)
        results.append((state.out, state.lse, *torch.autograd.grad(state.out, (q, k, v), data.grad_out)))
    assert (results[1][1][:, 3] == -torch.inf).all() and not results[1][0][:, 3].any()
    for got, expected in zip(*results, strict=True):
        assert_near(got, expected, 1e-5, 1e-5, "bias")


@ROWS
def test_a_bias_is_not_scaled(name: str):
    """It is added after softmax_scale, negative and zero scales included."""
    for scale in (0.0, -0.5, 2.0):
        check_backend(name, Case(LONGNET, (14, 14), softmax_scale=scale, mask="+hqk"))


@ROWS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_bias_of_half_precision_inputs_is_not_rounded(name: str, dtype: torch.dtype):
    """Distances as in ALiBi: at 500 the grid of bfloat16 is 2 wide, and softmax feels every tenth."""
    case = Case(Full(), (16, 16), batch=1, dtype=dtype)
    data = case.tensors()
    bias = -500 + 0.37 * torch.arange(16.0)
    expected = expect_case(case, data.__class__(**{**vars(data), "mask": bias}))
    got = attend(data.q, data.k, data.v, Full(), attention_mask=bias, backend=name)
    assert_near(got.out, expected.out, 3e-2, 3e-2, "out")
    assert_near(got.lse, expected.lse, 3e-2, 1e-4, "lse")


@GRADED
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pattern", [Full(), LISTED, LONGNET], ids=str)
def test_gradcheck_of_bias(name: str, shape: tuple[int, ...], pattern: Pattern):
    """Every broadcast shape: the gradient has it, and is summed over what it stands for; rank is kept."""
    random = torch.Generator().manual_seed(2)
    q, k = (torch.randn(2, n, 4, 3, generator=random, dtype=torch.float64) for n in (6, 7))
    bias = torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_()

    def outputs(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = attend(q, k, k, pattern, attention_mask=b, backend=name)
        return state.out, state.lse.masked_fill(state.lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(outputs, [bias], fast_mode=True)
    (grad,) = torch.autograd.grad(outputs(bias)[0].square().sum(), bias)
    assert grad.shape == bias.shape


@GRADED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_gradient_has_the_dtype_of_the_bias(name: str, dtype: torch.dtype):
    """Summed in float32, rounded once: a bfloat16 bias gets what a float32 bias of its values gets."""
    data = Case(LONGNET, (20, 20)).tensors()
    bias = torch.randn(1, 2, 1, 20, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    wide = bias.detach().float().requires_grad_()
    grads = []
    for leaf in (bias, wide):
        state = attend(data.q, data.k, data.v, LONGNET, attention_mask=leaf, backend=name)
        grads += torch.autograd.grad(state.out, leaf, data.grad_out)
    assert grads[0].dtype == dtype
    assert_near(grads[0], grads[1].to(dtype), 1e-6, 1e-6 if dtype.itemsize > 2 else 2**-7, "gradient")


@GRADED
def test_minus_infinity_gets_no_gradient(name: str):
    q = torch.randn(1, 6, 2, 4)
    bias = torch.randn(6, 6).masked_fill(torch.eye(6) > 0, -torch.inf)
    bias[2] = -torch.inf
    bias.requires_grad_()
    attend(q, q, q, Full(), attention_mask=bias, backend=name).out.square().sum().backward()
    assert bias.grad is not None
    assert bias.grad.isfinite().all() and not bias.grad[bias == -torch.inf].any() and bias.grad.any()


def test_rows_without_a_bias_gradient_say_so():
    """Named, they raise; unnamed, another row serves; a bias that wants none is theirs."""
    q, bias = torch.randn(1, 6, 2, 4), torch.randn(6, 6, requires_grad=True)
    without = [name for name in backends("cpu") if not row(name).capability.bias_grad]
    assert without
    for name in without:
        with pytest.raises(ValueError, match=r"the gradient of a floating attention_mask \(bias\) is not supported"):
            attend(q, q, q, Full(), attention_mask=bias, backend=name)
        assert attend(q, q, q, Full(), attention_mask=bias.detach(), backend=name).out.isfinite().all()
        with torch.no_grad():
            attend(q, q, q, Full(), attention_mask=bias, backend=name)
    attend(q, q, q, Full(), attention_mask=bias).out.sum().backward()
    assert bias.grad is not None
    assert explain(Full(), (1, 6, 2, 4), bias=True, requires_grad=True).backend == "gather"
    assert explain(Full(), (1, 6, 2, 4), bias=True).backend == backends("cpu")[0]


@GRADED
def test_a_bias_alone_may_want_a_gradient(name: str):
    """q, k and v as plain inputs; through a prior too."""
    q, bias = torch.randn(1, 6, 2, 4), torch.randn(6, 6, requires_grad=True)
    plain = attend(q, q, q, Full(), attention_mask=bias, backend=name)
    (whole,) = torch.autograd.grad(plain.out.square().sum(), bias)
    first = attend(q, q[:, :4], q[:, :4], Full(), attention_mask=bias[:, :4], backend=name)
    both = attend(q, q[:, 4:], q[:, 4:], Full(), attention_mask=bias[:, 4:], prior=first, backend=name)
    (parts,) = torch.autograd.grad(both.out.square().sum(), bias)
    assert_near(parts, whole, 1e-5, 1e-5, "gradient")
