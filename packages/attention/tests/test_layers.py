"""Rotary positions, transformer layers and the small LongNet."""

import copy
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from longattn.attention import pattern_attention
from longattn.attention.models.layers import DilatedTransformerDecoderLayer, DilatedTransformerEncoderLayer
from longattn.attention.models.longnet import LongNet
from longattn.attention.multihead import MultiheadPatternAttention
from longattn.attention.sequences.alibi import alibi_bias, alibi_slopes
from longattn.attention.sequences.rotary import rotary_angles, rotate
from longattn.kernels import Alibi
from longattn.patterncache import Full, Window

SHAPE = {"segment_lengths": (8, 16), "dilation_rates": (1, 2)}


def small_model(**options):
    """A LongNet of two layers."""
    return LongNet(50, 16, 2, 2, **SHAPE, dim_feedforward=32, **options)


def test_angles_are_exact_far_out():
    """At position 10 million, against Python's own floats; float32 products are off by more than 0.1 there."""
    position, base = 10_000_019, 10000.0
    found = rotary_angles(torch.tensor([position]), 8, base)
    assert found.dtype == torch.float64
    assert found[0].tolist() == pytest.approx([position * base ** (-2 * i / 8) for i in range(4)], rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotated_scores_depend_on_distance_alone(dtype):
    """q at i, k at j: the product is that of i + 1000 and j + 1000; lengths stay."""
    q, k = torch.randn(2, 1, 6, 2, 8, dtype=torch.float64)
    rows = torch.arange(6)
    near, far = (
        torch.einsum("bihd,bjhd->bhij", *(rotate(x.to(dtype), rows + shift).double() for x in (q, k)))
        for shift in (0, 1000)
    )
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.15}[dtype]
    torch.testing.assert_close(near, far, atol=tolerance, rtol=0)
    assert rotate(q.to(dtype), rows).dtype == dtype
    torch.testing.assert_close(rotate(q, rows).norm(dim=-1), q.norm(dim=-1))


def test_rotary_positions_per_element():
    """(batch, seq) positions, as left padding has them."""
    x = torch.randn(2, 4, 1, 8)
    positions = torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8]])
    assert torch.equal(rotate(x, positions)[1], rotate(x, positions[1])[1])
    with pytest.raises(ValueError, match="head_dim must be even"):
        rotate(torch.randn(1, 2, 1, 7), torch.arange(2))


def test_rotary_attention_is_blind_to_a_shift():
    """A module with rotary_base over a window: what comes before the window changes nothing, so positions are relative."""
    module = MultiheadPatternAttention(16, 2, Window(4), rotary_base=10000.0, dtype=torch.float64)
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    torch.testing.assert_close(module(x)[:, 13:], module(x[:, 10:])[:, 3:])
    plain = MultiheadPatternAttention(16, 2, Window(4), dtype=torch.float64)
    plain.load_state_dict(module.state_dict())
    assert not torch.allclose(plain(x), module(x))
    # Queries are the last positions.
    torch.testing.assert_close(module(x[:, -3:], x), module(x)[:, -3:])


def test_alibi_is_a_bias_of_distances():
    """The paper's slopes; in attention, what adding them to scores gives, for fewer queries than keys too."""
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(6).tolist() == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    q, (k, v) = torch.randn(1, 3, 2, 8).double(), torch.randn(2, 1, 9, 2, 8).double()
    bias = alibi_bias(2, 3, 9, dtype=torch.float64)
    found = pattern_attention(q, k, v, Full(causal=True), attention_mask=bias)
    distance = torch.arange(6, 9)[:, None] - torch.arange(9)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5 - alibi_slopes(2)[:, None, None] * distance
    weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
    torch.testing.assert_close(found, torch.einsum("bhij,bjhd->bihd", weights, v))
    declared = pattern_attention(q, k, v, Full(causal=True), score_terms=Alibi(alibi_slopes(2)))
    torch.testing.assert_close(declared, found)
    for name, words in (
        ("softcap", r"score_terms=longattn.kernels.Softcap\(value\)"),
        ("alibi_slopes", r"Alibi\(slopes\)"),
    ):
        with pytest.raises(TypeError, match=words):
            pattern_attention(q, k, v, Full(), **{name: 1.0})


def test_encoder_layer_is_its_parts():
    """x + attention(norm(x)), then x + feedforward(norm(x))."""
    layer = DilatedTransformerEncoderLayer(16, 2, **SHAPE, dim_feedforward=32, fused_qkv=True)
    x = torch.randn(2, 21, 16)
    y = x + layer.self_attn(layer.norm1(x), is_causal=True)
    y = y + layer.feedforward(layer.norm2(y))
    torch.testing.assert_close(layer(x, is_causal=True), y)
    assert not torch.allclose(layer(x), y)
    wide = layer.feedforward
    torch.testing.assert_close(wide(x), wide.linear2(wide.norm(torch.nn.functional.gelu(wide.linear1(x)))))


def test_padding_reaches_nothing_in_an_encoder_layer():
    """Rows before it are those of the shorter input; NaN in it stays there."""
    layer = DilatedTransformerEncoderLayer(16, 2, **SHAPE, dim_feedforward=32)
    x = torch.randn(1, 20, 16)
    padding = torch.arange(20)[None] >= 15
    expected = layer(x[:, :15])
    x[:, 15:] = float("nan")
    torch.testing.assert_close(layer(x, key_padding_mask=padding)[:, :15], expected)


def test_decoder_layer_sees_its_past_and_all_of_memory():
    """A later token changes nothing before it; each memory token changes everything."""
    layer = DilatedTransformerDecoderLayer(16, 2, **SHAPE, dim_feedforward=32, rotary_base=100.0, dtype=torch.float64)
    tgt, memory = torch.randn(1, 12, 16, dtype=torch.float64), torch.randn(1, 7, 16, dtype=torch.float64)
    out = layer(tgt, memory)
    later = tgt.clone()
    later[:, 8:] += 1
    torch.testing.assert_close(layer(later, memory)[:, :8], out[:, :8])
    other = memory.clone()
    other[:, 6] += 1
    assert (layer(tgt, other) - out).abs().amin(0).amax(-1).min() > 1e-6
    hidden = torch.arange(7)[None] == 6
    torch.testing.assert_close(
        layer(tgt, other, memory_key_padding_mask=hidden), layer(tgt, memory[:, :6]), msg="padded memory shows"
    )
    assert layer.memory_attn.attention.pattern == Full() and layer.memory_attn.rotary_base is None


def test_longnet_is_causal_and_learns():
    """Later tokens change no earlier logits; a few steps on one sequence lower its loss, with checkpointing too."""
    torch.manual_seed(0)
    model = small_model(checkpointing=True)
    tokens = torch.randint(50, (2, 41))
    changed = tokens.clone()
    changed[:, 30:] = (changed[:, 30:] + 1) % 50
    torch.testing.assert_close(model(tokens)[:, :30], model(changed)[:, :30])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_checkpointing_changes_no_gradient():
    """With dropout: the recomputed pairs are the same ones."""
    model = small_model(dropout=0.2)
    twin = small_model(dropout=0.2, checkpointing=True)
    twin.load_state_dict(model.state_dict())
    tokens = torch.randint(50, (1, 30))
    for each in (model, twin):
        torch.manual_seed(5)
        each(tokens).square().mean().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_longnet_copies_pickles_compiles_and_starts_on_meta():
    """One graph over many lengths."""
    torch._dynamo.reset()
    model = small_model(fused_qkv=True)
    tokens = torch.randint(50, (1, 30))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens), model(tokens))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (30, 17, 41):
        tokens = torch.randint(50, (1, length))
        torch.testing.assert_close(compiled(tokens), model(tokens))
    assert counter.frame_count <= 2
    shadow = small_model(device="meta")
    assert shadow(torch.empty(1, 9, dtype=torch.int64, device="meta")).shape == (1, 9, 50)
    shadow.to_empty(device="cpu").load_state_dict(model.state_dict())
    torch.testing.assert_close(shadow(tokens), model(tokens))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: DilatedTransformerEncoderLayer(16, 2, activation="tanh"), "activation must be one of"),
        (lambda: DilatedTransformerEncoderLayer(16, 2, dim_feedforward=0), "dim_feedforward"),
        (lambda: LongNet(0), "num_tokens"),
        (lambda: LongNet(10, num_layers=0), "num_layers"),
        (lambda: LongNet(10, 6, 2), "rotary_base must be None for an odd head_dim, got head_dim=3"),
        (lambda: LongNet(10, 16, 2, dropout=1.5), r"dropout must be in \[0, 1\)"),
    ],
)
def test_a_bad_value_is_named(build, words):
    """By its parameter."""
    with pytest.raises(ValueError, match=words):
        build()
