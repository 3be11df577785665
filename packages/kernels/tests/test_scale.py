"""A softmax scale that is a tensor: what the number gives, with gradient, on every row."""

import re

import pytest
import torch

from longattn.kernels import attend, backends, prepare, reference_attention
from longattn.kernels.dispatch.table import row
from longattn.patterncache import Dilated, Rectangle, Span

LONGNET = Dilated((4, 8), (1, 2), causal=True)
N, HEADS = 11, 4


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (HEADS,)], ids=["one", "each"])
@pytest.mark.parametrize("name", backends("cpu"))
def test_values_and_gradients_are_the_oracles(name: str, shape: tuple[int, ...], dtype: torch.dtype):
    """For all heads or each, of any sign, with v of another head_dim and grouped heads."""
    capability = row(name).capability
    if dtype not in capability.dtypes_on("cpu"):
        pytest.skip(f"{name} has no {dtype}")
    tensors = [randn(2, N, h, d, seed=h + d, dtype=dtype) for h, d in ((HEADS, 8), (2, 8), (2, 5))]
    scale = randn(*shape, seed=9) * 0.3
    counts = LONGNET.counts(Rectangle(HEADS, Span(0, N), Span(0, N)))
    cotangents = randn(2, N, HEADS, 5, seed=3, dtype=dtype), randn(2, N, HEADS, seed=4)
    found = []
    for compute in (
        lambda q, k, v, s: attend(q, k, v, LONGNET, softmax_scale=s, backend=name),
        lambda q, k, v, s: reference_attention(q, k, v, counts, s),
    ):
        leaves = [x.detach().clone().requires_grad_() for x in (*tensors, scale)]
        state = compute(*leaves)
        grads = torch.autograd.grad(
            [state.out, state.lse],
            leaves,
            [x.to(y.dtype) for x, y in zip(cotangents, (state.out, state.lse), strict=True)],
        )
        assert grads[3].dtype == scale.dtype and grads[3].shape == shape
        found.append([x.detach().double() for x in (state.out, state.lse, *grads)])
    # One more rounding of q in half precision.
    atol = 3 * max(capability.tolerance[dtype])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=atol * max(1.0, float(expected.abs().max())), rtol=atol)


def test_a_tensor_is_what_its_number_is():
    """To the bit where q is not rounded: a power of two. Under a transform and in a compiled graph too."""
    q, k, v = randn(3, 1, N, 2, 8).unbind()
    expected = attend(q, k, v, LONGNET, softmax_scale=0.25).out
    scale = torch.tensor(0.25, requires_grad=True)
    assert torch.equal(attend(q, k, v, LONGNET, softmax_scale=scale).out, expected)

    def loss(s: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, LONGNET, softmax_scale=s).out.square().sum()

    wanted = torch.autograd.grad(loss(scale), scale)[0]
    torch.testing.assert_close(torch.func.grad(loss)(scale.detach()), wanted)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(scale), scale)[0], wanted)


@pytest.mark.parametrize(
    ("scale", "error", "words"),
    [
        (torch.ones(3), ValueError, "softmax_scale must be a number or a tensor () or (heads,) = (2,), got (3,)"),
        (
            torch.ones((), dtype=torch.int64),
            TypeError,
            "softmax_scale must be None, a number or a floating tensor, got int64",
        ),
        (torch.ones(2, device="meta"), ValueError, "softmax_scale must be on the device of q, cpu, got meta"),
    ],
)
def test_what_is_refused(scale: torch.Tensor, error: type[Exception], words: str):
    q, k, v = randn(3, 1, N, 2, 8).unbind()
    with pytest.raises(error, match=re.escape(words)):
        attend(q, k, v, LONGNET, softmax_scale=scale)
    with pytest.raises(TypeError, match="softmax_scale must be None or a number"):
        prepare(LONGNET, q, k, v, softmax_scale=torch.ones(()))  # type: ignore[arg-type]
