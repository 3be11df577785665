"""Score terms in the forward, modules, schedules and ring buffers: what one softmax over all positions gives, with gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from longattn.attention import (
    MultiheadPatternAttention,
    PatternAttention,
    Ring,
    RingBufferAttention,
    RingBufferConfig,
    pattern_attention,
)
from longattn.attention.ring_buffer.testing import StreamModel, stale_slots_hold_nan
from longattn.attention.weights import attention_weights, sparse_attention_weights
from longattn.kernels import Alibi, RelativeBias, Softcap
from longattn.kernels.testing import TERMS, random_terms
from longattn.patterncache import Dilated, Full, Pattern, Window

LONGNET = Dilated((6, 12, 24), (1, 2, 4), causal=True)
PATTERNS = (LONGNET, Window(5, sinks=2), Full())


def qkv(n: int = 29, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(2, n, heads, 4, generator=generator).to(dtype) for heads in (4, 2, 2)]


def everything(tensors: list[Tensor], pattern: Pattern, slopes: Tensor, table: Tensor, **options: Any) -> list[Tensor]:
    """out, lse and all gradients."""
    leaves = [x.clone().requires_grad_() for x in (*tensors, slopes, table)]
    terms = (Softcap(1.5), Alibi(leaves[3]), RelativeBias(leaves[4], max_distance=20))
    out, lse = pattern_attention(*leaves[:3], pattern, score_terms=terms, return_lse=True, **options)
    return [out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_ring_is_the_whole(pattern: Pattern, layout: Any):
    """Positions of shards, whatever their steps."""
    held = torch.rand(4).double(), torch.randn(8, 4).double()
    expected = everything(qkv(), pattern, *held)
    torch.testing.assert_close(everything(qkv(), pattern, *held, schedule=Ring(size=3, layout=layout)), expected)


def test_packed_documents_and_left_padding():
    """Distances are within a document, and from the first token that is there."""
    held = torch.rand(4).double(), torch.randn(8, 4).double()
    terms = (Softcap(1.5), Alibi(held[0]), RelativeBias(held[1], max_distance=20))
    q, k, v = (x[:1] for x in qkv())
    packed = pattern_attention(q, k, v, LONGNET, cu_seqlens=[0, 9, 29], score_terms=terms)
    for part in (slice(0, 9), slice(9, 29)):
        alone = pattern_attention(q[:, part], k[:, part], v[:, part], LONGNET, score_terms=terms)
        torch.testing.assert_close(packed[:, part], alone)
    q, k, v = qkv()
    padded = pattern_attention(q, k, v, LONGNET, positions_start=torch.tensor([0, 7]), score_terms=terms)
    torch.testing.assert_close(padded[0], pattern_attention(q, k, v, LONGNET, score_terms=terms)[0])
    torch.testing.assert_close(
        padded[1, 7:], pattern_attention(*(x[:, 7:] for x in (q, k, v)), LONGNET, score_terms=terms)[1]
    )


@pytest.mark.parametrize("kinds", TERMS[1:], ids="+".join)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_weights_are_those_of_the_output(pattern: Pattern, kinds: tuple[str, ...]):
    """Dense and sparse; by a module, whose call takes terms."""
    q, k, v = qkv(11)
    terms = random_terms(kinds, 4, 1)
    out, weights = PatternAttention(pattern)(q, k, v, score_terms=terms, need_weights=True)
    torch.testing.assert_close(torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(2, 2)), out)
    torch.testing.assert_close(sparse_attention_weights(q, k, pattern, score_terms=terms).to_dense(), weights)
    module = MultiheadPatternAttention(16, 4, pattern, layer_norm=False, rotary_base=100.0).double()
    x = torch.randn(1, 11, 16).double()
    out, weights = module(x, score_terms=terms, need_weights=True)
    value = (weights @ module.v_proj(x).unflatten(2, (4, 4)).transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(module.out_proj(value.flatten(2)), out)
    assert not torch.allclose(module(x), out)


@pytest.mark.parametrize("kinds", TERMS[1:], ids="+".join)
@pytest.mark.parametrize("sinks", [0, 2])
def test_a_stream_is_the_oracle_over_its_tokens(kinds: tuple[str, ...], sinks: int):
    """Prefill in chunks, steps past the wrap, rows of the batch at different positions, and weights."""
    terms = random_terms(kinds, 4, 2)
    config = RingBufferConfig(num_heads=4, head_dim=4, kv_heads=2, buffer_size=5, sinks=sinks, dropout=0.0)
    with stale_slots_hold_nan():
        module, x = RingBufferAttention(config), qkv(13)
        model, state = StreamModel.begin(config, 2, 2), None
        for start, stop in ((0, 3), (3, 10)):
            part = [t[:, start:stop] for t in x]
            out, state, weights = module(*part, buffer_state=state, score_terms=terms, needs_weights=True)
            torch.testing.assert_close(out, model.call(*part, None, False, score_terms=terms))
        assert state is not None and weights.shape[-1] >= 7
        state.rewind([0, 2])
        model.rewind([0, 2])
        for step in range(10, 13):
            part = [t[:, step : step + 1] for t in x]
            expected = model.call(*part, None, True, score_terms=terms)
            copied = state.clone()
            torch.testing.assert_close(module(*part, is_decoder=True, buffer_state=state, score_terms=terms), expected)
            out, weights = module(
                *part, is_decoder=True, buffer_state=copied, score_terms=terms, output_attentions=True
            )
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 1).double())


def test_gradients_of_terms_in_a_stream():
    """Of slopes and tables, through a call that continues a state."""
    config = RingBufferConfig(num_heads=4, head_dim=4, kv_heads=2, buffer_size=8, dropout=0.0)
    x, module = qkv(12), RingBufferAttention(config)
    slopes, table = torch.rand(4).double().requires_grad_(), torch.randn(8, 4).double().requires_grad_()
    terms = (Softcap(1.5), Alibi(slopes), RelativeBias(table, max_distance=20))
    _, state = module(*(t[:, :9] for t in x))
    out, _ = module(*(t[:, 9:] for t in x), buffer_state=state, score_terms=terms)
    expected = pattern_attention(x[0][:, 9:], x[1], x[2], Window(8), score_terms=terms)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), [slopes, table]) for y in (out, expected)))


def test_places_in_a_cache_have_no_distance_of_their_own():
    """A cap is taken there, what reads distances is refused by name."""
    config = RingBufferConfig(
        num_heads=4, head_dim=4, buffer_size=5, sinks=2, positions="cache", dropout=0.0, kv_heads=2
    )
    module, x = RingBufferAttention(config), qkv(12)
    model = StreamModel.begin(config, 2, 2)
    out, state = module(*x, score_terms=Softcap(0.5))
    torch.testing.assert_close(out, model.call(*x, None, False, score_terms=Softcap(0.5)))
    token = qkv(1)
    found = module(*token, is_decoder=True, buffer_state=state, score_terms=Softcap(0.5))
    torch.testing.assert_close(found, model.call(*token, None, True, score_terms=Softcap(0.5)))
    with pytest.raises(ValueError, match="score_terms must be a Softcap where positions='cache'"):
        module(*token, is_decoder=True, buffer_state=state, score_terms=Alibi(torch.rand(4)))


@pytest.mark.parametrize("schedule", [None, Ring(size=3)], ids=str)
def test_key_weights_and_learned_scales(schedule: Any):
    """Column sums are those of the weights, and a scale per head acts before the cap."""
    q, k, v = qkv(11)
    terms, scale = random_terms(TERMS[-1], 4, 1), torch.rand(4).double() + 0.5
    options: dict[str, Any] = {"score_terms": terms, "softmax_scale": scale}
    out, sums = pattern_attention(q, k, v, LONGNET, schedule=schedule, return_key_weights=True, **options)
    weights = attention_weights(q, k, LONGNET, scale, score_terms=terms)
    torch.testing.assert_close(torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(2, 2)), out)
    torch.testing.assert_close(sums, weights.sum(2).unflatten(1, (2, 2)).sum(2))


def test_second_derivatives_are_refused_by_name():
    """What is not made is said."""
    leaves = [x.requires_grad_() for x in qkv(7)]
    out = pattern_attention(*leaves, LONGNET, score_terms=Softcap(1.0), backend="gather")
    (gradient,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not supported with score_terms"):
        torch.autograd.grad(gradient.sum(), leaves)
