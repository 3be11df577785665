"""`layout="bhnd"`: heads before the sequence, as views, in every call that takes q, k and v; and the warning where axes look exchanged."""

import warnings

import pytest
import torch

from longattn.attention import (
    DilatedAttention,
    PatternAttention,
    Ring,
    RingBufferAttention,
    RingBufferConfig,
    attention_weights,
    pattern_attention,
    sparse_attention_weights,
)
from longattn.kernels import AttentionState, LayoutWarning, Softcap, attend, check
from longattn.patterncache import Dilated, Full, Window

DILATED = Dilated((4, 12), (1, 2), causal=True)


def qkv(length=15, heads=4, kv_heads=2, dtype=torch.float32):
    """(batch, heads, seq, head_dim) leaves."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, length, 8), (2, kv_heads, length, 8), (2, kv_heads, length, 8))
    return [torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes]


def turned(*tensors):
    """With axes 1 and 2 exchanged."""
    return [x.transpose(1, 2) for x in tensors]


PADDING = torch.zeros(2, 15, dtype=torch.bool).index_fill(1, torch.tensor([3]), True)
OPTIONS = [
    {},
    {"schedule": Ring(size=2), "dropout_p": 0.2, "seed": 1},
    {"sink_logits": torch.ones(4), "key_padding_mask": PADDING},
    {"positions_start": torch.tensor([0, 4]), "attention_mask": torch.ones(4, 15, 15, dtype=torch.bool)},
    {"merge_grad": "detached"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_function_takes_and_returns_heads_first(options):
    """Out, lse and gradients, whatever else is asked; the second call is looked up."""
    inputs = qkv()
    expected = turned(*pattern_attention(*turned(*inputs), DILATED, return_lse=True, **options))
    for _ in range(2):
        found = pattern_attention(*inputs, DILATED, return_lse=True, layout="bhnd", **options)
        torch.testing.assert_close(list(found), expected)
        wanted = torch.autograd.grad(expected[0].square().sum(), inputs, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(found[0].square().sum(), inputs), wanted)
    assert torch.equal(pattern_attention(*inputs, DILATED, layout="bhnd", **options), found[0])


def test_nothing_is_copied_for_it():
    """What is returned is a view of what the row wrote, as (batch, seq, heads, head_dim) in memory."""
    out = pattern_attention(*(x.detach() for x in qkv()), Full(), layout="bhnd")
    assert out.shape == (2, 4, 15, 8) and out.transpose(1, 2).is_contiguous()


def test_packed_and_jagged_tensors():
    """(1, heads, total, head_dim) with cu_seqlens, and nested tensors whose lengths stand behind the heads."""
    inputs = [x[:1].detach() for x in qkv()]
    packed = pattern_attention(*inputs, DILATED, cu_seqlens=[0, 6, 15], layout="bhnd")
    expected = pattern_attention(*turned(*inputs), DILATED, cu_seqlens=[0, 6, 15])
    torch.testing.assert_close(packed, expected.transpose(1, 2))
    jagged = [
        torch.nested.nested_tensor([x[0, :, :6].transpose(0, 1), x[0, :, 6:].transpose(0, 1)], layout=torch.jagged)
        for x in inputs
    ]
    found = pattern_attention(*(x.transpose(1, 2) for x in jagged), DILATED, layout="bhnd")
    torch.testing.assert_close(found.transpose(1, 2).values(), expected[0])


def test_attend_and_its_states():
    """The prior too is heads first, and lse is (batch, heads, seq)."""
    inputs = qkv()
    plain = attend(*turned(*inputs), DILATED)
    for _ in range(2):
        state = attend(*inputs, DILATED, layout="bhnd")
        torch.testing.assert_close([state.out, state.lse], turned(plain.out, plain.lse))
    both = attend(*inputs, Window(3), prior=state, layout="bhnd", sink_logits=torch.zeros(4))
    prior = AttentionState(*turned(state.out, state.lse))
    expected = attend(*turned(*inputs), Window(3), prior=prior, sink_logits=torch.zeros(4))
    torch.testing.assert_close([both.out, both.lse], turned(expected.out, expected.lse))


@pytest.mark.parametrize("module", [PatternAttention(DILATED), DilatedAttention((4, 12), (1, 2))])
def test_modules_and_weights(module):
    """Weights are (batch, heads, Nq, Nk) in either layout."""
    inputs = [x.detach() for x in qkv()]
    out, weights = module(*inputs, need_weights=True, layout="bhnd")
    expected = module(*turned(*inputs), need_weights=True)
    torch.testing.assert_close([out, weights], [expected[0].transpose(1, 2), expected[1]])
    for function in (attention_weights, sparse_attention_weights):
        found = function(*inputs[:2], module.pattern, layout="bhnd")
        torch.testing.assert_close(found.to_dense() if found.is_sparse else found, weights)


def test_streams():
    """A ring buffer's calls, prefill and decode, with states that know nothing of it."""
    config = RingBufferConfig(num_heads=4, head_dim=8, buffer_size=6, dropout=0.0)
    one, other = RingBufferAttention(config).eval(), RingBufferAttention(config).eval()
    prompt, token = (torch.randn(2, 4, n, 8) for n in (9, 1))
    out, state = one(prompt, prompt, prompt, layout="bhnd")
    expected, kept = other(*turned(*[prompt] * 3))
    torch.testing.assert_close(out, expected.transpose(1, 2))
    found = one(token, token, token, position=9, is_decoder=True, buffer_state=state, layout="bhnd")
    wanted = other(*turned(*[token] * 3), position=9, is_decoder=True, buffer_state=kept)
    torch.testing.assert_close(found, wanted.transpose(1, 2))


def test_streams_take_score_terms():
    """As in the default layout: none is lost on the way."""
    attention = RingBufferAttention(RingBufferConfig(num_heads=4, head_dim=8, buffer_size=6, dropout=0.0)).eval()
    prompt, terms = torch.randn(2, 4, 9, 8), Softcap(0.5)
    actual, _ = attention(prompt, prompt, prompt, layout="bhnd", score_terms=terms)
    expected, _ = attention(*turned(*[prompt] * 3), score_terms=terms)
    assert torch.equal(expected.transpose(1, 2), actual)


def test_compiled_calls():
    """In one graph."""
    inputs = [x.detach() for x in qkv()]
    compiled = torch.compile(lambda *x: pattern_attention(*x, DILATED, layout="bhnd"), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), pattern_attention(*inputs, DILATED, layout="bhnd"))


@pytest.mark.parametrize("call", [attend, pattern_attention])
def test_another_order_is_refused(call):
    """By name."""
    with pytest.raises(ValueError, match=r"layout must be one of \('bnhd', 'bhnd'\), got 'nbhd'"):
        call(*qkv(), Full(), layout="nbhd")


@pytest.mark.parametrize("call", [attend, pattern_attention])
def test_axes_that_look_exchanged_are_said_once(call, monkeypatch):
    """Fewer positions than heads, and more heads than any model: a warning with the name and the way out, once in a process."""
    monkeypatch.setattr(check, "_warned", False)
    x = torch.randn(1, 4, 130, 2)
    with pytest.warns(
        LayoutWarning, match=r'q has shape \(1, 4, 130, 2\), of which 4 is taken for the sequence.*layout="bhnd"'
    ):
        call(x, x, x, Full())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(x[:, :3], x[:, :3], x[:, :3], Full())


@pytest.mark.parametrize("shape", [(1, 1, 128, 2), (1, 200, 130, 2), (1, 0, 4, 2)])
def test_what_may_be_meant_is_not_warned_of(shape, monkeypatch):
    """A decoder step of many heads, and long sequences."""
    monkeypatch.setattr(check, "_warned", False)
    x = torch.randn(shape)
    pattern_attention(x, x, x, Full())
