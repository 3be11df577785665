"""What was refused needlessly, said in another's words, or not at all."""

import pytest
import torch

from longattn.attention import (
    MultiheadPatternAttention,
    PatternAttention,
    Ring,
    RingBufferAttention,
    RingBufferConfig,
    pattern_attention,
)
from longattn.patterncache import Dilated, Full, Span, Window, from_mask_mod


def test_packed_cross_attention_with_more_queries_than_keys():
    """Where positions do not matter, document by document; with them it is refused, and so are queries without keys."""
    q, k, v = torch.randn(1, 9, 2, 4), *torch.randn(2, 1, 6, 2, 4)
    got = pattern_attention(q, k, v, Full(), cu_seqlens=[0, 2, 6], cu_seqlens_q=[0, 5, 9])
    parts = [(slice(0, 5), slice(0, 2)), (slice(5, 9), slice(2, 6))]
    expected = [pattern_attention(q[:, a], k[:, b], v[:, b], Full()) for a, b in parts]
    torch.testing.assert_close(got, torch.cat(expected, 1))
    with pytest.raises(ValueError, match="cu_seqlens_q must give no document more queries than keys, got 5 and 2"):
        pattern_attention(q, k, v, Window(4), cu_seqlens=[0, 2, 6], cu_seqlens_q=[0, 5, 9])
    with pytest.raises(ValueError, match="cu_seqlens_q must give no document queries without keys, got 5 and 0"):
        pattern_attention(q, k, v, Full(), cu_seqlens=[0, 0, 6], cu_seqlens_q=[0, 5, 9])
    module = MultiheadPatternAttention(8, 2, Full())
    x, memory = torch.randn(1, 9, 8), torch.randn(1, 6, 8)
    assert module(x, memory, cu_seqlens=[0, 2, 6], cu_seqlens_q=[0, 5, 9]).shape == (1, 9, 8)


def test_padded_queries_see_the_sink():
    """lse of a row that sees nothing but a sink is its logit, whichever way padding is said; out is zero."""
    q, k, v = torch.randn(3, 2, 6, 3, 4)
    sinks = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
    starts = torch.tensor([2, 0])
    out, lse = pattern_attention(q, k, v, Window(3), positions_start=starts, sink_logits=sinks, return_lse=True)
    assert torch.equal(lse[0, :2], sinks.expand(2, 3)) and not out[0, :2].any()
    hidden = torch.arange(6) < starts[:, None]
    out_by_mask, lse_by_mask = pattern_attention(
        q, k, v, Window(3), key_padding_mask=hidden, sink_logits=sinks, return_lse=True
    )
    torch.testing.assert_close(lse, lse_by_mask)
    torch.testing.assert_close(out, out_by_mask)
    grads = [torch.autograd.grad(x.sum(), sinks)[0] for x in (lse, lse_by_mask)]
    torch.testing.assert_close(*grads)
    _, bare = pattern_attention(q, k, v, Window(3), positions_start=starts, return_lse=True)
    assert (bare[0, :2] == -torch.inf).all()


@pytest.mark.parametrize(
    "mask", [torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.uint8)]
)
def test_multihead_modules_ask_the_padding_mask_its_type(mask: torch.Tensor):
    module = MultiheadPatternAttention(8, 2, Full())
    with pytest.raises(TypeError, match="key_padding_mask must be bool, True = padding, got"):
        module(torch.randn(2, 5, 8), key_padding_mask=mask)


def test_an_encoder_call_of_no_tokens_has_weights():
    """Over nothing, and over what the ring held before."""
    module = RingBufferAttention(RingBufferConfig(buffer_size=8, num_heads=2, head_dim=4))
    x = torch.randn(1, 0, 2, 4)
    out, state, weights = module(x, x, x, needs_weights=True)
    assert out.shape == x.shape and weights.shape == (1, 2, 0, 0)
    y = torch.randn(1, 3, 2, 4)
    module(y, y, y, buffer_state=state)
    assert module(x, x, x, needs_weights=True, buffer_state=state)[2].shape == (1, 2, 0, 3)


@pytest.mark.parametrize(
    ("keyword", "hint"),
    [
        ("causal", "is_causal is the call's name"),
        ("window_size", r"give Window\(size\) as the pattern"),
        ("enable_gqa", "it is always on"),
        ("block_mask", "from_block_mask"),
        ("max_seqlen", "lengths are read from cu_seqlens"),
        ("max_seqlen_q", "lengths are read from cu_seqlens_q"),
        ("attn_mask", "attention_mask is the name here"),
    ],
)
def test_other_libraries_keywords(keyword: str, hint: str):
    """Every call says by name what is meant here."""
    q = torch.randn(1, 4, 2, 4)
    calls = (
        lambda **o: pattern_attention(q, q, q, Full(), **o),
        lambda **o: PatternAttention(Full())(q, q, q, **o),
        lambda **o: MultiheadPatternAttention(8, 2, Full())(q.flatten(2), **o),
    )
    for call in calls:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}': .*{hint}"):
            call(**{keyword: True})


def test_what_is_no_pattern_says_where_it_goes():
    q = torch.randn(1, 4, 2, 4)
    with pytest.raises(TypeError, match=r"got a tensor of shape \(4, 4\): a mask goes to attention_mask"):
        pattern_attention(q, q, q, torch.ones(4, 4, dtype=torch.bool))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a mask_mod goes through longattn.patterncache.from_mask_mod"):
        pattern_attention(q, q, q, lambda b, h, i, j: i >= j)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got 'causal'"):
        pattern_attention(q, q, q, "causal")  # type: ignore[arg-type]


def test_a_group_that_is_not_there_yet():
    with pytest.raises(TypeError, match="WORLD is None until init_process_group"):
        Ring(torch.distributed.group.WORLD)


def test_a_plan_is_for_a_rectangle():
    for pattern in (Window(4), Full(), Dilated((4,), (2,))):
        for value in (8, Span(0, 8), (2, 8, 8)):
            with pytest.raises(TypeError, match="rectangle must be a Rectangle, such as"):
                pattern.plan(value)  # type: ignore[arg-type]


def test_torch_tables_in_a_mask_mod():
    """They want tensors, and the error says how they get them."""
    document = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])

    def mod(b, h, q, k):
        return (q >= k) & (document[q] == document[k])

    with pytest.raises(TypeError, match=r"mask_mod must take int64 arrays .* needs as_tensor=torch.from_numpy, got"):
        from_mask_mod(mod, 8)
    assert from_mask_mod(mod, 8, as_tensor=torch.from_numpy).to_dense(8, 1).sum() == 21
    with pytest.raises(TypeError, match="mask_mod must return booleans; one written with torch"):
        from_mask_mod(lambda b, h, q, k: q - k, 8)
