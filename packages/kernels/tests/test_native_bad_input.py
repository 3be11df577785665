"""Nothing unchecked reaches the C++ side: whatever a call is made of, it is refused with a sentence or computed right."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longattn.kernels.dispatch.call import Call
from longattn.kernels.dispatch.environment import TorchAllocator
from longattn.kernels.native import row
from longattn.kernels.native.building import refusal
from longattn.kernels.native.structures import CallArgument
from longattn.patterncache import Branch, Full, Plan, Rectangle, Span
from longattn.patterncache.indices import Affine, Listed
from longattn.patterncache.plan import Band

pytestmark = pytest.mark.skipif(refusal() is not None, reason=str(refusal()))


def plain(n: int = 12, heads: int = 2) -> Call:
    q = torch.randn(2, n, heads, 8)
    plan = Full().plan(Rectangle(heads, Span(0, n), Span(0, n)))
    nothing: dict[str, Any] = dict.fromkeys(("mask", "bias", "key_padding", "prior"))
    return Call(
        q, q, q, plan, scale=0.3, dropout_p=0.0, seed=0, out_dtype=torch.float32, deterministic=False,
        allocator=TorchAllocator(), **nothing,
    )  # fmt: skip


SHAPES = st.tuples(st.integers(0, 3), st.integers(0, 14), st.integers(0, 3), st.sampled_from([0, 1, 8, 9, 257]))
SMALL = st.integers(-3, 20)
INDEX = st.one_of(
    st.builds(Affine, SMALL, st.integers(0, 3), SMALL, st.integers(0, 6), SMALL),
    st.builds(
        lambda starts, run, step: Listed(np.array(starts, np.int64).reshape(len(starts), -1), run, step),
        st.lists(st.lists(SMALL, min_size=2, max_size=2), min_size=1, max_size=3),
        st.integers(1, 4),
        SMALL,
    ),
)
BRANCHES = st.builds(
    Branch,
    st.builds(Span, st.integers(0, 4), st.integers(0, 4), st.integers(1, 3)),
    INDEX,
    INDEX,
    st.tuples(SMALL, SMALL),
    st.tuples(SMALL, SMALL),
    st.sampled_from([None, Band(0, None), Band(-(1 << 70), 1 << 70), Band(3, -3)]),
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of some shape, dtype and strides, of which most fit no call."""
    shape = draw(SHAPES)
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64, torch.int32]))
    x = torch.zeros(shape, dtype=dtype)
    how = draw(st.sampled_from(["plain", "turned", "expanded", "sliced"]))
    if how == "turned":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "expanded":
        return x[:1].expand(shape) if shape[0] else x
    return (
        torch.zeros((*shape[:3], 2 * shape[3] + 1), dtype=dtype)[..., 1::2][..., : shape[3]] if how == "sliced" else x
    )


def computed_or_refused(call: Call) -> None:
    try:
        out, lse = row.forward(call)
        row.backward(call, torch.ones_like(out), torch.ones_like(lse), out, lse, False)
    except (ValueError, TypeError):
        return  # with a sentence, and before anything was computed
    assert not out[lse == -torch.inf].any()


@given(st.dictionaries(st.sampled_from(["q", "k", "v"]), tensors(), min_size=1))
def test_any_tensors(swapped: dict[str, torch.Tensor]):
    """Shapes that differ, dtypes nobody declared, strides of every kind."""
    computed_or_refused(replace(plain(), **swapped))


@given(
    st.sampled_from(["mask", "bias", "key_padding"]),
    st.lists(st.integers(0, 13), min_size=1, max_size=4),
    st.sampled_from([torch.bool, torch.float32, torch.bfloat16, torch.float64, torch.int64]),
)
def test_any_masks(name: str, shape: list[int], dtype: torch.dtype):
    computed_or_refused(replace(plain(), **{name: torch.zeros(shape, dtype=dtype)}))


@given(st.lists(BRANCHES, min_size=1, max_size=3), st.integers(0, 12), st.integers(1, 3))
def test_any_plan(branches: list[Branch], n: int, heads: int):
    """Rows before the first and behind the last, heads that are not there, lists, backward steps, bands without a middle."""
    call = plain(n, heads)
    computed_or_refused(replace(call, plan=Plan(call.plan.rectangle, tuple(branches))))


@pytest.mark.parametrize(
    ("name", "x"),
    [
        ("shape", torch.zeros(2, 3, 4)),
        ("dtype", torch.zeros(2, 3, 4, 8, dtype=torch.float64)),
        ("device", torch.zeros(2, 3, 4, 8, device="meta")),
        ("layout", torch.zeros(2, 3, 4, 8).to_sparse()),
    ],
)
def test_a_tensor_that_does_not_fit_gives_no_address(name: str, x: torch.Tensor):
    with pytest.raises(ValueError, match="q must be a CPU tensor of shape"):
        CallArgument().point_to("q", x, (2, 3, 4, 8))


def test_strides_that_leave_the_memory_are_refused():
    """What as_strided can make and resize_ can leave behind."""
    x = torch.zeros(2, 3, 4, 8)
    torch.as_strided(x, (2, 3, 4, 8), (96, 32, 8, 1))
    x.untyped_storage().resize_(100)
    with pytest.raises(ValueError, match="q must lie within its memory"):
        CallArgument().point_to("q", x, (2, 3, 4, 8))
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    mask.untyped_storage().resize_(10)
    with pytest.raises(ValueError, match="mask must lie within its memory"):
        CallArgument().look_up("mask", mask, (2, 2, 12, 12))
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding.untyped_storage().resize_(10)
    with pytest.raises(ValueError, match="key_padding must lie within its memory"):
        CallArgument().hide(padding, (2, 12))


def test_a_copy_lives_as_long_as_the_call():
    """A head_dim with a stride is copied, and the copy is not given to somebody else meanwhile."""
    asked = CallArgument()
    x = torch.arange(24.0).view(1, 2, 2, 6)[..., ::2]
    asked.point_to("q", x, (1, 2, 2, 3))
    others = [torch.zeros(1, 2, 2, 3) for _ in range(50)]
    assert all(other.data_ptr() != asked.q.data for other in others) and asked.q.data != x.data_ptr()
