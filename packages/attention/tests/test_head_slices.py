"""`head_start`: modules that hold some of the heads, as tensor-parallel ranks do, count heads as the whole module does."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longattn.attention import (
    MultiheadDilatedAttention,
    MultiheadPatternAttention,
    PatternAttention,
    Ring,
    attention_weights,
    pattern_attention,
    sparse_attention_weights,
)
from longattn.patterncache import Dilated, Full
from longattn.patterncache.testing import patterns

DILATED = Dilated((4, 12), (1, 3), "blocks", causal=True)


def qkv(length=17, heads=6, kv_heads=3):
    """float64 leaves with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, length, heads, 4), (2, length, kv_heads, 4), (2, length, kv_heads, 4))
    return [torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def sliced(inputs, first, count):
    """Query heads [first, first + count), and their key heads."""
    q, *rest = inputs
    group = q.shape[2] // rest[0].shape[2]
    return [q[:, :, first : first + count], *(x[:, :, first // group : (first + count) // group] for x in rest)]


@given(patterns(), st.integers(0, 3), st.floats(0, 0.6), st.integers(1, 20))
@settings(max_examples=40)
def test_slices_are_parts_of_the_whole(pattern, cut, dropout, length):
    """Any pattern, dropout included: out, lse and gradients of two slices are those of the whole, head by head."""
    inputs = qkv(length)
    options = {"dropout_p": dropout, "seed": 5, "return_lse": True}
    whole = pattern_attention(*inputs, pattern, **options)
    bounds = [(0, 2 * cut), (2 * cut, 6 - 2 * cut)]
    parts = [
        pattern_attention(*sliced(inputs, first, count), pattern, head_start=first, num_heads=6, **options)
        for first, count in bounds
        if count
    ]
    found = [torch.cat(each, 2) for each in zip(*parts, strict=True)]
    torch.testing.assert_close(found, list(whole))
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), inputs) for x in (found[0], whole[0])))


@pytest.mark.parametrize("schedule", [None, Ring(size=2, layout="striped")])
def test_a_module_of_some_heads(schedule):
    """PatternAttention, weights included, under a ring too."""
    inputs = qkv()
    whole = PatternAttention(DILATED)(*inputs, need_weights=True)
    module = PatternAttention(DILATED, head_start=2, num_heads=6, schedule=schedule)
    assert "head_start=2, num_heads=6" in repr(module)
    out, weights = module(*sliced(inputs, 2, 4), need_weights=True)
    torch.testing.assert_close(out, whole[0][:, :, 2:])
    torch.testing.assert_close(weights, whole[1][:, 2:])
    q, k, _ = sliced(inputs, 2, 4)
    for function in (attention_weights, sparse_attention_weights):
        found = function(q, k, DILATED, head_start=2, num_heads=6)
        torch.testing.assert_close(found.to_dense() if found.is_sparse else found, weights)


@pytest.mark.parametrize(("kv_heads", "cuts"), [(4, (0, 1, 4)), (2, (0, 2, 4)), (1, (0, 2, 4)), (2, (0, 1, 2, 4))])
@pytest.mark.parametrize("fused", [False, True])
def test_slices_of_a_multihead_module_add_up_to_it(kv_heads, cuts, fused):
    """Rows of the projections, columns of the output's, its bias once; key heads with their query heads; dropout is the whole's."""
    options = {"dropout": 0.3, "layer_norm": False, "kv_heads": kv_heads, "rotary_base": 10.0, "dtype": torch.float64}
    whole = MultiheadPatternAttention(16, 4, DILATED, **options)
    torch.nn.init.normal_(whole.out_proj.bias)
    x = torch.randn(2, 19, 16, dtype=torch.float64)
    torch.manual_seed(1)
    expected, total = whole(x), 0
    group = 4 // kv_heads
    for first, end in pairwise(cuts):
        part = MultiheadPatternAttention(
            16, 4, DILATED, head_start=first, local_heads=end - first, fused_qkv=fused, **options
        )
        k_rows = slice(first // group * 4, -(-end // group) * 4)
        rows = {"q_proj": slice(first * 4, end * 4), "k_proj": k_rows, "v_proj": k_rows}
        state = {f"{n}.{kind}": getattr(getattr(whole, n), kind)[rows[n]] for n in rows for kind in ("weight", "bias")}
        state["out_proj.weight"] = whole.out_proj.weight[:, first * 4 : end * 4]
        part.load_state_dict(state | ({} if first else {"out_proj.bias": whole.out_proj.bias}))
        torch.manual_seed(1)
        total = total + part(x)
    torch.testing.assert_close(total, expected)


def test_presets_take_it_too():
    """By the same names."""
    part = MultiheadDilatedAttention(16, 4, (4, 8), (1, 2), layer_norm=False, head_start=2, local_heads=2)
    assert part(torch.randn(1, 9, 16)).shape == (1, 9, 16) and part.out_proj.bias is None


def test_a_compiled_slice_is_one_graph():
    """The heads' numbers are constants of it."""
    inputs = qkv()
    module = PatternAttention(DILATED, head_start=4, num_heads=6)
    part = [x.detach() for x in sliced(inputs, 4, 2)]
    torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(*part), module(*part))


X = torch.zeros(1, 8, 2, 4)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"head_start": 2}, ValueError, "num_heads must be given with head_start"),
        ({"num_heads": 4}, ValueError, "head_start must be given with num_heads"),
        ({"head_start": 3, "num_heads": 4}, ValueError, "num_heads must be >= 5, the heads up to the last of q, got 4"),
        ({"head_start": -1, "num_heads": 4}, ValueError, "head_start must be None or an integer >= 0"),
        ({"head_start": 0, "num_heads": 4.0}, TypeError, "num_heads must be an integer"),
    ],
)
def test_a_bad_value_is_named(options, error, words):
    """In functions, and in modules when they are made where it is known there."""
    for call in (
        lambda: pattern_attention(X, X, X, Full(), **options),
        lambda: attention_weights(X, X, Full(), **options),
        lambda: PatternAttention(Full(), **options)(X, X, X),
    ):
        with pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head_start": 0}, "head_start and local_heads must be given together"),
        ({"head_start": 2, "local_heads": 3}, "num_heads must be >= 5"),
        ({"head_start": 0, "local_heads": 2}, "layer_norm must be False for a slice of heads"),
        ({"head_start": 1, "local_heads": 2, "kv_heads": 2}, "must be multiples of 2, the query heads of a key head"),
    ],
)
def test_a_slice_that_is_none_is_refused(options, words):
    """When the module is made."""
    with pytest.raises(ValueError, match=words):
        MultiheadPatternAttention(16, 4, DILATED, **options)


def test_projections_that_make_other_heads_are_refused():
    """As a tensor-parallel plan with local outputs does: which heads they are is not known."""
    module = MultiheadPatternAttention(16, 4, DILATED)
    for name in "qkv":
        setattr(module, f"{name}_proj", torch.nn.Linear(16, 8))
    with pytest.raises(ValueError, match="use_local_output=False"):
        module(torch.randn(1, 5, 16))
