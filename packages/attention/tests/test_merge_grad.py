"""`merge_grad="detached"`: torchscale's gradient, in which the weights that merge branches are constants."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longattn.attention import MultiheadPatternAttention, PatternAttention, Ring, pattern_attention
from longattn.kernels import reference_attention
from longattn.patterncache import BlockSparse, Dilated, Documents, Rectangle, Restrict, Span, Window

DILATED = Dilated((4, 12, 12), (1, 2, 3), causal=True)


def qkv(length=23, heads=4, kv_heads=2, dtype=torch.float64):
    """Leaves with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, length, heads, 8), (2, length, kv_heads, 8), (2, length, kv_heads, 8))
    return [torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes]


def torchscale(q, k, v, branches, **options):
    """out as torchscale's dilated_attention.py merges it, with the oracle for each branch: a softmax of lse under no_grad."""
    whole = Rectangle(q.shape[2], Span(0, q.shape[1]), Span(0, k.shape[1]))
    states = [reference_attention(q, k, v, branch.counts(whole), **options) for branch in branches]
    with torch.no_grad():
        weights = torch.softmax(torch.stack([state.lse for state in states]), 0).nan_to_num(0.0)
    return sum(state.out * weight[..., None] for state, weight in zip(states, weights, strict=True))


def single(pattern):
    """One pattern for each branch, written out again."""
    pairs = zip(pattern.segment_lengths, pattern.dilation_rates, strict=True)
    return [Dilated((s,), (r,), pattern.heads, pattern.queries, pattern.causal) for s, r in pairs]


def gradients(out, leaves):
    """Of a loss that is not symmetric."""
    return torch.autograd.grad((out * torch.linspace(0, 1, out.numel(), dtype=out.dtype).view_as(out)).sum(), leaves)


BRANCHES = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 5)), min_size=2, max_size=4)


@given(
    BRANCHES,
    st.sampled_from(["shared", "blocks"]),
    st.sampled_from(["dilated", "all"]),
    st.booleans(),
    st.integers(1, 30),
)
@example([(4, 1), (8, 2)], "shared", "dilated", True, 21)
@settings(max_examples=30)
def test_gradients_are_torchscales_and_outputs_the_exact_ones(branches, heads, queries, causal, length):
    """For any branches: out and lse as always; dq, dk and dv of the formula with constant weights."""
    pattern = Dilated(*zip(*branches, strict=True), heads, queries, causal)
    inputs = qkv(length)
    out, lse = pattern_attention(*inputs, pattern, return_lse=True, merge_grad="detached")
    torch.testing.assert_close((out, lse), pattern_attention(*inputs, pattern, return_lse=True))
    expected = torchscale(*inputs, single(pattern))
    torch.testing.assert_close(gradients(out, inputs), gradients(expected, inputs))


def test_it_differs_from_the_exact_gradient():
    """In queries and keys, not in values: else nothing was detached."""
    inputs = qkv()
    found, exact = (
        gradients(pattern_attention(*inputs, DILATED, merge_grad=each), inputs) for each in ("detached", "exact")
    )
    assert [torch.allclose(*pair) for pair in zip(found, exact, strict=True)] == [False, False, True]


def test_the_gradient_of_lse_is_exact():
    """Only out has constant weights."""
    inputs = qkv()
    found, exact = (
        pattern_attention(*inputs, DILATED, return_lse=True, merge_grad=each)[1] for each in ("detached", "exact")
    )
    wanted = [x.masked_fill(x == -torch.inf, 0).sum() for x in (found, exact)]
    torch.testing.assert_close(*(torch.autograd.grad(x, inputs[:2]) for x in wanted))


@pytest.mark.parametrize("schedule", [None, Ring(size=3, layout="zigzag")])
def test_masks_bias_and_schedules(schedule):
    """Padding, a floating mask with its gradient, a ring."""
    inputs = qkv()
    bias = torch.randn(1, 4, 23, 23, dtype=torch.float64, requires_grad=True)
    padding = torch.zeros(2, 23, dtype=torch.bool)
    padding[1, 17:] = True
    out = pattern_attention(
        *inputs, DILATED, attention_mask=bias, key_padding_mask=padding, merge_grad="detached", schedule=schedule
    )
    expected = torchscale(*inputs, single(DILATED), bias=bias, key_padding_mask=padding)
    torch.testing.assert_close(gradients(out, [*inputs, bias]), gradients(expected, [*inputs, bias]))


def test_patterns_of_patterns_have_the_branches_of_what_they_are_made_of():
    """Documents, Restrict, and a sum; in documents, under cu_seqlens too."""
    inputs = [x[:1].detach().requires_grad_() for x in qkv()]
    blocks = BlockSparse(4, torch.ones(6, 6).tril().bool().numpy())
    for pattern, branches in (
        (Documents((0, 9, 23), DILATED), [Documents((0, 9, 23), part) for part in single(DILATED)]),
        (Restrict(DILATED, blocks), [Restrict(part, blocks) for part in single(DILATED)]),
        (DILATED + Window(3), [*single(DILATED), Window(3)]),
    ):
        wanted = gradients(torchscale(*inputs, branches), inputs)
        torch.testing.assert_close(
            gradients(pattern_attention(*inputs, pattern, merge_grad="detached"), inputs), wanted
        )
    packed = pattern_attention(*inputs, DILATED, cu_seqlens=[0, 9, 23], merge_grad="detached")
    expected = torchscale(*inputs, [Documents((0, 9, 23), part) for part in single(DILATED)])
    torch.testing.assert_close(gradients(packed, inputs), gradients(expected, inputs))


def test_one_branch_per_head_has_nothing_to_detach():
    """With one branch, and under heads="split"."""
    inputs = qkv()
    for pattern in (Dilated((8,), (2,)), Dilated((4, 12), (1, 2), "split")):
        found, exact = (
            gradients(pattern_attention(*inputs, pattern, merge_grad=each), inputs) for each in ("detached", "exact")
        )
        torch.testing.assert_close(found, exact)


def test_dropout_drops_the_same_pairs_in_every_branch():
    """One seed a call: out is what it is with exact gradients."""
    inputs = qkv()
    outs = [
        pattern_attention(*inputs, DILATED, dropout_p=0.4, seed=3, merge_grad=each) for each in ("detached", "exact")
    ]
    torch.testing.assert_close(*outs)


def test_half_precision_is_rounded_once():
    """Branches stay float32 until they are merged."""
    inputs = [x.detach() for x in qkv(dtype=torch.bfloat16)]
    out = pattern_attention(*inputs, DILATED, merge_grad="detached")
    exact = pattern_attention(*(x.double() for x in inputs), DILATED)
    rounded = exact.to(torch.bfloat16).double()
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).abs().max() <= 1.5 * (rounded - exact).abs().max()


def test_modules_take_it_by_name_compiled_too():
    """PatternAttention and multihead modules, in one graph."""
    inputs = qkv()
    module = PatternAttention(DILATED, merge_grad="detached")
    assert "merge_grad='detached'" in repr(module)
    expected = gradients(torchscale(*inputs, single(DILATED)), inputs)
    torch.testing.assert_close(gradients(module(*inputs), inputs), expected)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled(*inputs), inputs), expected)
    whole = MultiheadPatternAttention(32, 4, DILATED, merge_grad="detached", dtype=torch.float64)
    x = torch.randn(1, 23, 32, dtype=torch.float64, requires_grad=True)
    found = gradients(whole(x), [x])
    whole.attention.merge_grad = "exact"
    assert not torch.allclose(found[0], gradients(whole(x), [x])[0])


@pytest.mark.parametrize(
    ("pattern", "options", "words"),
    [
        (DILATED, {"merge_grad": "torchscale"}, "merge_grad must be 'exact' or 'detached', got 'torchscale'"),
        (Window(4), {"merge_grad": "detached"}, "merge_grad must be 'exact' for a pattern without branches to merge"),
        (
            DILATED,
            {"merge_grad": "detached", "sink_logits": torch.zeros(4, dtype=torch.float64)},
            "sink_logits must be None with merge_grad='detached'",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(pattern, options, words):
    """By name."""
    with pytest.raises(ValueError, match=words):
        pattern_attention(*qkv(), pattern, **options)
