"""Modules and presets: configurations over two final forwards."""

import ast
import copy
import inspect
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from longattn.attention import (
    DilatedAttention,
    MultiheadDilatedAttention,
    MultiheadPatternAttention,
    PatternAttention,
    pattern_attention,
)
from longattn.attention.testing import MULTIHEAD_PRESETS, PRESETS, check_final
from longattn.patterncache import Dilated, Restrict, Window

ALL = {**PRESETS, **MULTIHEAD_PRESETS}
SHAPE = {"segment_lengths": (8, 16), "dilation_rates": (1, 2)}


@pytest.mark.parametrize("name", ALL)
def test_no_preset_overrides_a_forward(name):
    """Presets configure."""
    check_final(ALL[name])


@pytest.mark.parametrize("name", ALL)
def test_a_preset_is_a_configuration(name):
    """It defines a constructor and nothing else, whose body builds a pattern, a schedule and flags in under 25 lines."""
    (preset,) = ast.parse(inspect.getsource(ALL[name])).body
    assert isinstance(preset, ast.ClassDef)
    functions = [node for node in preset.body if not isinstance(node, ast.Expr)]
    assert [getattr(node, "name", None) for node in functions] in ([], ["__init__"])
    for function in functions:
        assert isinstance(function, ast.FunctionDef)
        assert 1 + (function.end_lineno or 0) - function.body[0].lineno < 25


def test_the_check_of_final_forwards_can_fail():
    """A class that does override is caught."""

    class Overriding(PatternAttention):
        def forward(self, query, key, value):  # type: ignore[override]
            return query

    with pytest.raises(AssertionError, match="overrides forward"):
        check_final(Overriding)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", ["shared", "split"])
def test_a_preset_gives_its_patterns_numbers(name, causal, heads):
    """Bit for bit what the functional call gives, and is_causal overrides the constructor."""
    module = PRESETS[name](**SHAPE, causal=causal, heads=heads, softmax_scale=0.3)
    q, k, v = (torch.randn(2, 21, 4, 8) for _ in range(3))
    for is_causal in (None, False, True):
        pattern = Dilated(**SHAPE, heads=heads, causal=causal if is_causal is None else is_causal)
        expected = pattern_attention(q, k, v, pattern, softmax_scale=0.3)
        assert torch.equal(module(q, k, v, is_causal=is_causal), expected)


@pytest.mark.parametrize("name", PRESETS)
def test_defaults_are_the_seeds(name):
    """Segments 2048, 4096, 8192 with rates 1, 2, 4."""
    pattern = PRESETS[name]().pattern
    dilated = pattern.a if isinstance(pattern, Restrict) else pattern
    assert dilated == Dilated((2048, 4096, 8192), (1, 2, 4))


@pytest.mark.parametrize("name", MULTIHEAD_PRESETS)
def test_multihead_shapes_and_weights(name):
    """(B, N, E) in and out; weights on request, rows summing to one."""
    module = MULTIHEAD_PRESETS[name](32, 4, **SHAPE, causal=True)
    x = torch.randn(2, 20, 32)
    out = module(x)
    same, weights = module(x, need_weights=True)
    assert weights.is_sparse == name.startswith("BlockSparse")
    weights = weights.to_dense()
    assert out.shape == x.shape and torch.equal(out, same) and weights.shape == (2, 4, 20, 20)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 20))
    assert not weights.triu(1).any()


def test_weights_are_what_the_forward_used():
    """weights @ values, normalised and projected, is the output."""
    module = MultiheadDilatedAttention(32, 4, **SHAPE, dtype=torch.float64)
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    out, weights = module(x, need_weights=True)
    values = module.v_proj(x).unflatten(-1, (4, 8))
    mixed = torch.einsum("bhij,bjhd->bihd", weights, values).flatten(2)
    torch.testing.assert_close(module.out_proj(module.norm(mixed)), out)


def test_multihead_padding_reaches_nothing():
    """NaN in padded rows of x stays out of every other row and of every parameter's gradient."""
    module = MultiheadDilatedAttention(16, 2, **SHAPE)
    x = torch.randn(1, 20, 16)
    padding = torch.zeros(1, 20, dtype=torch.bool)
    padding[0, 15:] = True
    dirty = x.clone()
    dirty[padding] = float("nan")
    out, expected = module(dirty, key_padding_mask=padding), module(x[:, :15])
    torch.testing.assert_close(out[:, :15], expected)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_magneto_gain_scales_value_and_output_projections():
    """gamma_init is the gain of v_proj and out_proj alone."""
    torch.manual_seed(0)
    small = MultiheadDilatedAttention(64, 4, **SHAPE, gamma_init=0.1)
    torch.manual_seed(0)
    plain = MultiheadDilatedAttention(64, 4, **SHAPE)
    torch.testing.assert_close(small.q_proj.weight, plain.q_proj.weight)
    torch.testing.assert_close(small.v_proj.weight, plain.v_proj.weight * 0.1)
    torch.testing.assert_close(small.out_proj.weight, plain.out_proj.weight * 0.1)


def test_grouped_kv_heads_in_multihead():
    """kv_heads makes smaller k and v projections."""
    module = MultiheadPatternAttention(32, 4, Window(5), kv_heads=2)
    assert module.k_proj.out_features == 16
    assert module(torch.randn(1, 9, 32)).shape == (1, 9, 32)


@pytest.mark.parametrize("name", ALL)
def test_modules_copy_pickle_and_load(name):
    """deepcopy, pickle and state_dict give the same numbers."""
    module = ALL[name](*((16, 2) if name in MULTIHEAD_PRESETS else ()), **SHAPE)
    inputs = (torch.randn(1, 9, 16),) if name in MULTIHEAD_PRESETS else tuple(torch.randn(1, 9, 2, 8) for _ in range(3))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(*inputs), module(*inputs))
    fresh = ALL[name](*((16, 2) if name in MULTIHEAD_PRESETS else ()), **SHAPE)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(*inputs), module(*inputs))
    assert "Dilated" in repr(module)


@pytest.mark.parametrize("name", ALL)
def test_modules_compile_without_a_graph_break(name):
    """One graph over many lengths, with the eager numbers."""
    torch._dynamo.reset()
    module = ALL[name](*((16, 2) if name in MULTIHEAD_PRESETS else ()), **SHAPE)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for length in (20, 33, 17, 48, 9):
        shape = (1, length, 16) if name in MULTIHEAD_PRESETS else (1, length, 2, 8)
        inputs = [torch.randn(shape) for _ in range(1 if name in MULTIHEAD_PRESETS else 3)]
        torch.testing.assert_close(compiled(*inputs), module(*inputs))
    assert counter.frame_count <= 2


Q = torch.zeros(1, 8, 2, 4)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: DilatedAttention((4, 8), (1,)), ValueError, "dilation_rates must have as many entries"),
        (lambda: DilatedAttention([], []), ValueError, "segment_lengths must have at least one entry"),
        (lambda: DilatedAttention((4.5,), (1,)), TypeError, r"segment_lengths\[0\]"),
        (lambda: DilatedAttention((4,), (True,)), TypeError, r"dilation_rates\[0\]"),
        (lambda: DilatedAttention((4,), (1,), dropout=1), ValueError, r"dropout must be in \[0, 1\)"),
        (lambda: DilatedAttention((4,), (1,), softmax_scale=0), ValueError, "softmax_scale must be a number > 0"),
        (lambda: DilatedAttention((4,), (1,), attention_dropout=0.1), TypeError, "dropout is the one name"),
        (lambda: DilatedAttention((4,), (1,), is_causal=True), TypeError, "causal is the constructor's name"),
        (lambda: DilatedAttention((4,), (1,), colour=1), TypeError, "unexpected keyword argument 'colour'"),
        (lambda: PatternAttention((4, 8)), TypeError, "pattern must be a Pattern"),
        (lambda: PatternAttention(Window(3), backend="none"), ValueError, "backend"),
        (lambda: MultiheadDilatedAttention(10, 4), ValueError, "num_heads must divide embed_dim=10, got 4"),
        (lambda: MultiheadDilatedAttention(12, 4, kv_heads=3), ValueError, "kv_heads must divide num_heads=4, got 3"),
        (lambda: MultiheadDilatedAttention(0, 4), ValueError, "embed_dim"),
        (lambda: MultiheadDilatedAttention(8, 2.0), TypeError, "num_heads"),
        (lambda: MultiheadDilatedAttention(8, 2, gamma_init=-1), ValueError, "gamma_init"),
        (lambda: MultiheadDilatedAttention(8, 2, bias=None), TypeError, "bias must be True or False"),
        (
            lambda: MultiheadDilatedAttention(8, 2)(torch.zeros(1, 4, 7)),
            ValueError,
            r"query must have shape \(batch, seq, 8\)",
        ),
        (
            lambda: MultiheadDilatedAttention(8, 2)(torch.zeros(1, 4, 8).int()),
            TypeError,
            "query must have the module's dtype",
        ),
        (
            lambda: DilatedAttention((4,), (1,))(Q, Q, Q[:, :3]),
            ValueError,
            "value must have the length and heads of key",
        ),
        (lambda: DilatedAttention((4,), (1,))(Q[0], Q, Q), ValueError, "query must have shape"),
        (lambda: DilatedAttention((4,), (1,))(Q, Q, Q, is_causal="no"), TypeError, "is_causal must be True or False"),
    ],
)
def test_a_bad_value_is_named(build, error, words):
    """The message names the parameter, what was expected and what came."""
    with pytest.raises(error, match=words):
        build()
