"""States and their merge: a commutative monoid, without NaN, whose error does not grow with the number of parts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longattn.kernels import AttentionState, attend, backends, merge, reference_attention
from longattn.kernels.state import merge_detached, merge_into, state_dtype
from longattn.kernels.testing import Case, Tensors, assert_near, check_merge_laws
from longattn.patterncache import Full

SHAPE = (2, 3, 2, 4)


def make_state(blind: bool | torch.Tensor, seed: int, dtype: torch.dtype = torch.float32) -> AttentionState:
    """A random state; rows of `blind` saw nothing."""
    random = torch.Generator().manual_seed(seed)
    out, lse = torch.randn(SHAPE, generator=random, dtype=dtype), torch.randn(SHAPE[:3], generator=random, dtype=dtype)
    lse = lse.mul(20).masked_fill(torch.as_tensor(blind), -torch.inf)
    return AttentionState(out * (lse > -torch.inf).unsqueeze(-1), lse)


@st.composite
def states(draw: st.DrawFn) -> AttentionState:
    seed = draw(st.integers(0, 10_000))
    return make_state(torch.rand(SHAPE[:3], generator=torch.Generator().manual_seed(seed + 1)) < 0.4, seed)


@given(states(), states(), states())
def test_merge_is_a_commutative_monoid(a: AttentionState, b: AttentionState, c: AttentionState):
    check_merge_laws(a, b, c)


@given(states(), states())
def test_merging_in_place_is_the_same_merge(a: AttentionState, b: AttentionState):
    out, lse = a.out.clone(), a.lse.clone()
    merge_into(out, lse, b.out, b.lse)
    expected = merge(a, b)
    assert_near(out, expected.out, 1e-5, 1e-5, "out")
    assert_near(lse, expected.lse, 1e-5, 1e-5, "lse")


@pytest.mark.parametrize("blind", [(True, False), (False, True), (True, True), (False, False)])
def test_merging_with_rows_that_saw_nothing_has_no_nan(blind: tuple[bool, bool]):
    """-inf on either side or on both, in values and in gradients."""
    sides = [make_state(side, seed) for seed, side in enumerate(blind)]
    leaves = [x.requires_grad_() for s in sides for x in (s.out, s.lse)]
    merged = merge(*sides)
    assert not merged.out.isnan().any() and not merged.lse.isnan().any()
    assert bool((merged.lse == -torch.inf).all()) == all(blind)
    assert not all(blind) or not merged.out.any()
    for root in (merged.out.sum(), merged.lse.masked_fill(merged.lse == -torch.inf, 0).sum()):
        for grad in torch.autograd.grad(root, leaves, retain_graph=True, allow_unused=True):
            assert grad is None or grad.isfinite().all()


@given(st.lists(states(), min_size=1, max_size=4))
def test_merging_with_constant_weights_is_the_same_merge(parts: list[AttentionState]):
    """All at once: out and lse of one merge after the other, without NaN where no part saw a key."""
    merged, expected = merge_detached(parts), parts[0]
    for other in parts[1:]:
        expected = merge(expected, other)
    assert_near(merged.out, expected.out, 1e-5, 1e-5, "out")
    assert_near(merged.lse, expected.lse, 1e-5, 1e-5, "lse")


@pytest.mark.parametrize("blind", [(False, False), (True, False), (True, True)])
def test_constant_weights_have_no_gradient(blind: tuple[bool, bool]):
    """That of each out is its weight, and of no out reaches an lse; that of the merged lse is softmax over the parts. 0 where none saw a key."""
    sides = [make_state(side, seed, torch.float64) for seed, side in enumerate(blind)]
    outs, lses = ([getattr(s, name).requires_grad_() for s in sides] for name in ("out", "lse"))
    merged = merge_detached(sides)
    weights = torch.stack(lses).detach().softmax(0).nan_to_num(nan=0.0)
    grads = torch.autograd.grad(merged.out.sum(), [*outs, *lses], retain_graph=True, allow_unused=True)
    for grad, weight in zip(grads[:2], weights, strict=True):
        torch.testing.assert_close(grad, weight.unsqueeze(-1).expand_as(grad))
    assert grads[2:] == (None, None)
    finite = merged.lse.masked_fill(merged.lse == -torch.inf, 0)
    if finite.requires_grad:
        for grad, weight in zip(torch.autograd.grad(finite.sum(), lses), weights, strict=True):
            torch.testing.assert_close(grad, weight)


def test_merge_is_differentiable_in_both():
    leaves = [x.requires_grad_() for seed in (1, 2) for x in _parts(make_state(False, seed, torch.float64))]

    def merged(*x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = merge(AttentionState(x[0], x[1] / 20), AttentionState(x[2], x[3] / 20))
        return state.out, state.lse

    assert torch.autograd.gradcheck(merged, leaves)


def _parts(state: AttentionState) -> tuple[torch.Tensor, torch.Tensor]:
    return state.out, state.lse


def test_the_arguments_of_merge_stay_as_they_are():
    first, second = make_state(False, 1), make_state(False, 2)
    kept = [x.clone() for x in (*_parts(first), *_parts(second))]
    merged = merge(first, second)
    assert all(torch.equal(a, b) for a, b in zip(kept, (*_parts(first), *_parts(second)), strict=True))
    assert merged.out.data_ptr() not in (first.out.data_ptr(), second.out.data_ptr())


def in_parts(data: Tensors, parts: int, name: str, prior: bool) -> AttentionState:
    """Keys in that many parts, joined by `merge` or one onto the other by `prior`."""
    total = AttentionState.empty(data.q)
    for k, v in zip(data.k.tensor_split(parts, 1), data.v.tensor_split(parts, 1), strict=True):
        if prior:
            total = attend(data.q, k, v, Full(), backend=name, prior=total)
        else:
            total = merge(total, attend(data.q, k, v, Full(), backend=name))
    return total


@pytest.mark.parametrize("parts", [3, 16, 256])
@pytest.mark.parametrize("prior", [False, True], ids=["merge", "prior"])
@pytest.mark.parametrize("name", backends("cpu"))
def test_error_does_not_grow_with_the_number_of_parts(parts: int, prior: bool, name: str):
    """After 3, 16 and 256 parts, finalized to bf16, the error is within 1.2x of rounding the oracle once."""
    for seed in range(3 if parts < 256 else 1):
        data = Case(Full(), (64, 1024), batch=1, head_dim=16, seed=seed).tensors()
        merged = in_parts(data, parts, name, prior)
        whole = reference_attention(data.q, data.k, data.v, torch.ones(2, 64, 1024))
        error = merged.finalize(torch.bfloat16).double() - whole.out
        once = whole.out.to(torch.bfloat16).double() - whole.out
        assert error.norm() <= 1.2 * once.norm()
        assert error.abs().max() <= 1.2 * once.abs().max()
        assert_near(merged.lse, whole.lse, 1e-5, 1e-5, "lse")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_state_is_as_wide_as_it_must_be(dtype: torch.dtype):
    """float32 until finalize, float64 for float64; lse as wide."""
    q = torch.randn(1, 4, 2, 8).to(dtype)
    state = attend(q, q, q, Full())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert state.out.dtype == state.lse.dtype == wide == state_dtype(dtype)
    assert state.finalize(dtype).dtype == dtype
    narrow = attend(q, q, q, Full(), out_dtype=dtype)
    assert narrow.out.dtype == dtype and narrow.lse.dtype == wide
    prior = AttentionState.empty(q)
    for leaf in (q, q.clone().requires_grad_()):
        assert attend(leaf, q, q, Full(), prior=prior, out_dtype=dtype).out.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_states_are_refused(dtype: torch.dtype):
    """merge and prior both say that rounding loses precision."""
    state = make_state(False, 1)
    rounded = AttentionState(state.out.to(dtype), state.lse)
    with pytest.raises(TypeError, match=r"second\.out must be float32 or float64 .*got .*float16"):
        merge(state, rounded)
    q = torch.randn(SHAPE)
    for leaf in (q, q.clone().requires_grad_()):
        with pytest.raises(TypeError, match=r"prior\.out must be float32 for q of float32"):
            attend(leaf, q, q, Full(), prior=rounded)


@pytest.mark.parametrize(
    ("second", "error", "words"),
    [
        ((torch.zeros(SHAPE), torch.zeros(SHAPE[:3])), TypeError, "second must be an AttentionState, got tuple"),
        (
            AttentionState(torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2)),
            ValueError,
            "second must have the shapes of first",
        ),
        (AttentionState(torch.zeros(SHAPE), torch.zeros(2, 3)), ValueError, "second must have the shapes of first"),
    ],
)
def test_merge_names_a_bad_argument(second, error, words):
    with pytest.raises(error, match=words):
        merge(make_state(False, 1), second)


def test_an_empty_state_has_seen_nothing():
    empty = AttentionState.empty(torch.ones(SHAPE, dtype=torch.bfloat16))
    assert not empty.out.any() and (empty.lse == -torch.inf).all()
    assert empty.out.dtype == empty.lse.dtype == torch.float32
