"""What modules' calls say about lengths and positions: packed, jagged, padded on the left, q_start, sinks."""

import pytest
import torch

from longattn.attention import (
    DilatedTransformerEncoderLayer,
    LongNet,
    MultiheadPatternAttention,
    PatternAttention,
    pattern_attention,
)
from longattn.patterncache import Dilated

PATTERN = Dilated((4, 8), (1, 2), causal=True)
LENGTHS = (5, 0, 7, 1)
ENDS = [0, 5, 5, 12, 13]
X = torch.zeros(1, 13, 4, 8)


def randn(*shape):
    """float64, with gradient."""
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def multihead(**options):
    """A small module with rotary positions and two kv heads."""
    return MultiheadPatternAttention(32, 4, PATTERN, kv_heads=2, rotary_base=100.0, dtype=torch.float64, **options)


def jagged(parts):
    """Their values, as one jagged nested tensor with gradient."""
    return torch.nested.nested_tensor([x.detach() for x in parts], layout=torch.jagged, requires_grad=True)


@pytest.mark.parametrize(
    "options",
    [
        {"q_start": 3},
        {"positions_start": torch.tensor([4])},
        {"cu_seqlens": ENDS},
        {"cu_seqlens": ENDS, "cu_seqlens_q": [0, 2, 2, 5, 6]},
        {"sink_logits": torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)},
        {"q_start": None, "cu_seqlens": None},
    ],
)
def test_options_reach_the_function(options):
    """A module's call is the function's with the same keywords."""
    q, (k, v) = randn(1, 13, 4, 8), [randn(1, 13, 2, 8) for _ in range(2)]
    if "cu_seqlens" not in options or "cu_seqlens_q" in options:
        q = q[:, :6]
    expected = pattern_attention(q, k, v, PATTERN, **options)
    torch.testing.assert_close(PatternAttention(PATTERN)(q, k, v, **options), expected, rtol=0, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_packed_embeddings_are_each_document_alone(fused):
    """Rotary positions and the pattern restart in each; out and gradients, packed and jagged."""
    module, parts = multihead(fused_qkv=fused), [randn(n, 32) for n in LENGTHS]
    alone = torch.cat([module(x.unsqueeze(0)).squeeze(0) for x in parts])
    expected = torch.autograd.grad(alone.square().sum(), [*parts, *module.parameters()])
    whole = torch.cat(parts).detach().requires_grad_()
    packed = module(whole.unsqueeze(0), cu_seqlens=torch.tensor(ENDS)).squeeze(0)
    torch.testing.assert_close(packed, alone)
    found = torch.autograd.grad(packed.square().sum(), [whole, *module.parameters()])
    torch.testing.assert_close(found, (torch.cat(expected[:4]), *expected[4:]))
    nested = jagged([x for x in parts if len(x)])
    out = module(nested)
    assert out.is_nested and out.layout is torch.jagged
    torch.testing.assert_close(out.values(), alone)
    (gradient,) = torch.autograd.grad(out.values().square().sum(), [nested])
    torch.testing.assert_close(gradient.values(), found[0])


def test_packed_queries_of_their_own():
    """cu_seqlens_q: the last rows of each document, rotary positions included."""
    module, whole = multihead(), randn(1, 13, 32)
    rows = torch.tensor([3, 4, 9, 10, 11, 12])
    expected = module(whole, cu_seqlens=ENDS)[:, rows]
    torch.testing.assert_close(module(whole[:, rows], whole, cu_seqlens=ENDS, cu_seqlens_q=[0, 2, 2, 5, 6]), expected)


@pytest.mark.parametrize("fused", [False, True])
def test_padding_on_the_left_is_as_if_it_were_not_there(fused):
    """Also where it is NaN: out, and the gradients of tokens and parameters."""
    module, parts = multihead(fused_qkv=fused), [randn(n, 32) for n in (9, 4)]
    alone = [module(x.unsqueeze(0)).squeeze(0) for x in parts]
    expected = torch.autograd.grad(sum(x.square().sum() for x in alone), [*parts, *module.parameters()])
    padded = torch.full((2, 9, 32), torch.nan, dtype=torch.float64)
    for x, row in zip(parts, padded, strict=True):
        row[9 - len(x) :] = x.detach()
    padded.requires_grad_()
    out = module(padded, positions_start=torch.tensor([0, 5]))
    loss = sum(out[b, 9 - len(x) :].square().sum() for b, x in enumerate(parts))
    gradient, *parameters = torch.autograd.grad(loss, [padded, *module.parameters()])
    for b, x in enumerate(parts):
        torch.testing.assert_close(out[b, 9 - len(x) :], alone[b])
        torch.testing.assert_close(gradient[b, 9 - len(x) :], expected[b])
    torch.testing.assert_close(parameters, list(expected[2:]))


def test_queries_in_the_middle():
    """q_start with rotary positions: rows of the whole call."""
    module, whole = multihead(), randn(2, 13, 32)
    torch.testing.assert_close(module(whole[:, 3:8], whole, q_start=3), module(whole)[:, 3:8])


def test_sinks_have_gradients():
    """A sink takes weight from every key."""
    module, whole, sinks = multihead(), randn(2, 13, 32), randn(4)
    (gradient,) = torch.autograd.grad(module(whole, sink_logits=sinks).square().sum(), [sinks])
    assert gradient.shape == (4,) and gradient.abs().min() > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_models_take_packed_documents(checkpointing):
    """LongNet and an encoder layer: each document alone."""
    model = LongNet(50, 32, 2, 4, segment_lengths=(4, 8), dilation_rates=(1, 2), checkpointing=checkpointing)
    tokens = torch.randint(50, (1, 13))
    alone = [model(tokens[:, a:b]) for a, b in ((0, 5), (5, 12), (12, 13))]
    torch.testing.assert_close(model(tokens, cu_seqlens=ENDS), torch.cat(alone, 1), rtol=1e-4, atol=1e-5)
    layer, x = DilatedTransformerEncoderLayer(32, 4, (4, 8), (1, 2)), torch.randn(1, 13, 32)
    torch.testing.assert_close(layer(x, cu_seqlens=ENDS)[:, :5], layer(x[:, :5]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"attn_mask": None}, TypeError, "unexpected keyword argument 'attn_mask': attention_mask is the name"),
        ({"softcap": 30.0}, TypeError, r"give score_terms=longattn.kernels.Softcap\(value\) to the call"),
        (
            {"need_weights": True, "cu_seqlens": ENDS},
            ValueError,
            "need_weights must be False where cu_seqlens is given",
        ),
        ({"q_start": -1}, ValueError, "q_start must be None or an integer >= 0"),
        ({"cu_seqlens": [0, 3]}, ValueError, "cu_seqlens must end with the packed length 13"),
        ({"positions_start": [0]}, TypeError, r"positions_start must be an integer tensor \(batch,\)"),
        ({"positions_start": torch.tensor([20])}, ValueError, "positions_start must lie in"),
        ({"sink_logits": torch.zeros(3)}, ValueError, "sink_logits"),
    ],
)
def test_bad_options_are_refused_by_name(options, error, match):
    """By both modules."""
    with pytest.raises(error, match=match):
        PatternAttention(PATTERN)(X, X, X, **options)
    with pytest.raises(error, match=match):
        MultiheadPatternAttention(32, 4, PATTERN, rotary_base=10.0)(X.flatten(2), **options)


def test_jagged_calls_take_no_masks_and_no_weights():
    """They know their lengths."""
    nested, module = jagged([randn(3, 32), randn(2, 32)]), multihead()
    with pytest.raises(ValueError, match="key_padding_mask must be None for jagged"):
        module(nested, key_padding_mask=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="need_weights must be False where a jagged nested tensor is given"):
        module(nested, need_weights=True)
    with pytest.raises(TypeError, match="key must be a jagged nested tensor like the others"):
        module(nested, torch.zeros(2, 3, 32, dtype=torch.float64))
