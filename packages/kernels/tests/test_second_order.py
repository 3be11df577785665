"""Second derivatives: of every row in torch operations, by differences; the other rows say so and name these."""

from typing import Any

import pytest
import torch
from torch.func import grad, jacrev, vmap

from longattn.kernels import attend, backends
from longattn.kernels.dispatch.table import row, twice_differentiable
from longattn.kernels.testing import Case
from longattn.patterncache import Dilated, Full, Pattern, Restrict, Strided, Window

LONGNET = Dilated((2, 4), (1, 2), causal=True)
TWICE = [name for name in twice_differentiable() if name in backends("cpu") and not name.startswith("sdpa_views")]
SMALL = Case(LONGNET, (5, 6), batch=2, kv_heads=1, group=2, head_dim=3, value_head_dim=2, dtype=torch.float64)


def check(case: Case, name: str, **options: Any) -> None:
    """Gradients of the gradients of out and lse, in all that has one and in the cotangents."""
    data = case.tensors()
    leaves = [x.detach().requires_grad_() for x in (data.q, data.k, data.v)]
    bias = data.mask if data.mask is not None and data.mask.is_floating_point() else None
    if bias is not None and row(name).capability.bias_grad:
        leaves.append(bias.double().requires_grad_())
    given = {"dropout_p": case.dropout_p, "seed": case.seed, "key_padding_mask": data.padding, **options}

    def outputs(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mask = rest[0] if rest else data.mask
        state = attend(q, k, v, case.pattern, backend=name, attention_mask=mask, **given)
        return state.out, state.lse.masked_fill(state.lse == -torch.inf, 0)

    assert torch.autograd.gradgradcheck(outputs, leaves, fast_mode=True)


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize(
    "pattern",
    [Full(), LONGNET, Window(3, sinks=1), Restrict(Restrict(Window(3), Dilated((2,), (2,))), Strided(4))],
    ids=str,
)
def test_by_differences(name: str, pattern: Pattern):
    """Overlapping branches, bands, lists; grouped heads, v of another head_dim, queries that see nothing."""
    check(Case(**{**vars(SMALL), "pattern": pattern}), name)


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("options", [{"mask": "bhqk"}, {"mask": "+hqk"}, {"padding": True}, {"dropout_p": 0.4}, {"layouts": ("heads_first",) * 5}], ids=str)  # fmt: skip
def test_options(name: str, options: dict[str, Any]):
    """Masks, a bias with its own second derivative, padding that holds NaN, dropout, strides."""
    if options.get("dropout_p") and not row(name).capability.dropout:
        pytest.skip(f"{name} has no dropout")
    case = Case(**{**vars(SMALL), **options})
    check(case, name)


def test_longer_than_a_tile(monkeypatch: pytest.MonkeyPatch):
    """Tiles add up."""
    from longattn.kernels.eager import second_order

    monkeypatch.setattr(second_order, "_CELLS", 32)
    check(Case(**{**vars(SMALL), "lengths": (40, 40), "pattern": Window(9)}), "gather")


def test_under_transforms():
    """jacrev of jacrev is the Hessian; a gradient of a gradient is mapped; a third derivative is refused."""
    q, k = torch.randn(2, 1, 4, 1, 3, dtype=torch.float64)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return attend(x, k, x[..., :2], Full(), backend="gather").out.square().sum()

    hessian = torch.autograd.functional.hessian(loss, q)
    torch.testing.assert_close(jacrev(jacrev(loss))(q), hessian)
    twice = grad(lambda x: grad(loss)(x).square().sum())
    many = torch.stack([q, q + 1])
    torch.testing.assert_close(vmap(twice)(many), torch.stack([twice(x) for x in many]))
    x = q.requires_grad_()
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives are not supported"):
        second.sum().backward()


@pytest.mark.parametrize("name", [name for name in backends("cpu") if name not in twice_differentiable()])
def test_a_row_without_says_so(name: str):
    """And names those that have."""
    q = torch.randn(1, 6, 1, 4, requires_grad=True)
    (first,) = torch.autograd.grad(attend(q, q, q, Full(), backend=name).out.square().sum(), q, create_graph=True)
    with pytest.raises(
        NotImplementedError, match=f"not supported by the row {name}.*sdpa, gather, tiled, tiled_k_major"
    ):
        first.sum().backward()


def test_a_huge_bias_is_refused():
    """Rows whose first derivatives are made elsewhere have no second ones."""
    q = torch.randn(1, 4, 1, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.full((4, 4), torch.finfo(torch.float64).min, dtype=torch.float64)
    out = attend(q, q, q, Full(), backend="gather", attention_mask=bias).out
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="has a huge bias"):
        first.sum().backward()
