"""The one forward, against the oracle: outputs, lse, gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longattn.attention import Local, pattern_attention
from longattn.attention.testing import check_schedule
from longattn.kernels import reference_attention
from longattn.patterncache import Dilated, Full, Rectangle, Span, Window
from longattn.patterncache.testing import patterns


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@given(patterns(), st.integers(0, 40), st.integers(1, 4), st.sampled_from([None, False, True]), st.integers(0, 99))
@settings(max_examples=2 * settings().max_examples)
def test_any_pattern_equals_the_oracle(pattern, length, heads, is_causal, seed):
    """Output, lse and the gradients of q, k and v."""
    q, k, v = (randn(2, length, heads, 4, seed=seed + n).requires_grad_() for n in range(3))
    out, lse = pattern_attention(q, k, v, pattern, is_causal=is_causal, return_lse=True)
    meant = pattern if is_causal is None else pattern.with_causal(is_causal)
    expected = reference_attention(q, k, v, meant.counts(Rectangle(heads, Span(0, length), Span(0, length))))
    torch.testing.assert_close((out, lse), (expected.out, expected.lse))
    grads, wanted = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected.out))
    torch.testing.assert_close(grads, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_output_has_the_dtype_of_the_input(dtype):
    """out in q's dtype, lse in float32 (float64 for float64)."""
    x = randn(1, 20, 2, 8, dtype=dtype)
    out, lse = pattern_attention(x, x, x, Dilated((8, 16), (1, 2)), return_lse=True)
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_queries_are_the_last_positions_unless_told_otherwise():
    """Causal is bottom-right; q_start moves it."""
    q, k, v = randn(1, 3, 2, 4), randn(1, 9, 2, 4, seed=1), randn(1, 9, 2, 4, seed=2)
    whole = pattern_attention(torch.cat([randn(1, 6, 2, 4, seed=3), q], 1), k, v, Full(causal=True))
    torch.testing.assert_close(pattern_attention(q, k, v, Full(causal=True)), whole[:, 6:])
    first = pattern_attention(q, k, v, Full(causal=True), q_start=0)
    torch.testing.assert_close(first, pattern_attention(q, k[:, :3], v[:, :3], Full(causal=True)))


def test_padding_reaches_nothing_and_moves_nobody():
    """NaN in padded keys leaves outputs and gradients as if those keys were hidden by a mask."""
    q, k, v = (randn(2, 24, 2, 4, seed=n) for n in range(3))
    padding = torch.zeros(2, 24, dtype=torch.bool)
    padding[0, 5:9] = padding[1, 20:] = True
    dirty = [x.masked_fill(padding[:, :, None, None], float("nan")).requires_grad_() for x in (k, v)]
    clean = [x.clone().requires_grad_() for x in (k, v)]
    out = pattern_attention(q, *dirty, Dilated((8, 24), (1, 3)), key_padding_mask=padding)
    expected = pattern_attention(q, *clean, Dilated((8, 24), (1, 3)), attention_mask=~padding[:, None, None, :])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), dirty), torch.autograd.grad(expected.square().sum(), clean)
    )


@pytest.mark.parametrize("pattern", [Window(5, sinks=1), Dilated((6, 12), (1, 2), causal=True), Full()])
def test_local_is_a_schedule(pattern):
    """The kit that judges schedules passes the one that is here."""
    check_schedule(Local(), pattern, *(randn(2, 17, 4, 4, seed=n) for n in range(3)))


def test_grouped_heads_equal_repeated_ones():
    """GQA: neighbouring query heads share a kv head."""
    q, k, v = randn(1, 30, 6, 4), randn(1, 30, 2, 4, seed=1), randn(1, 30, 2, 4, seed=2)
    pattern = Dilated((8, 16), (1, 2), causal=True)
    repeated = pattern_attention(q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2), pattern)
    torch.testing.assert_close(pattern_attention(q, k, v, pattern), repeated)


X = torch.zeros(1, 8, 2, 4)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"pattern": "dilated"}, TypeError, "pattern must be a Pattern"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p"),
        ({"dropout_p": "0"}, TypeError, "dropout_p must be a number"),
        ({"return_lse": 1}, TypeError, "return_lse"),
        ({"q_start": -1}, ValueError, "q_start"),
        ({"q_start": 1.0}, TypeError, "q_start"),
        ({"is_causal": 1}, TypeError, "is_causal"),
        ({"softmax_scale": "big"}, TypeError, "softmax_scale"),
        ({"backend": "cuda"}, ValueError, "backend must be None or one of"),
        ({"attn_mask": None}, TypeError, "attention_mask is the name here, and True = may see"),
        ({"window": 3}, TypeError, "unexpected keyword argument 'window'"),
        ({"attention_mask": torch.ones(3, 3, dtype=torch.bool)}, ValueError, "attention_mask must be broadcastable"),
        ({"key_padding_mask": torch.ones(1, 8)}, TypeError, "key_padding_mask must be bool, True = padding"),
        ({"q": X.int()}, TypeError, "q must have one of the dtypes"),
        ({"q": X[0]}, ValueError, "q must have shape"),
        ({"k": X[:, :3], "v": X[:, :4]}, ValueError, "v must have the length and heads of k"),
        ({"k": X[..., :2], "v": X[..., :2]}, ValueError, "k must have the head_dim of q, 4, got 2"),
        ({"k": X.double(), "v": X}, TypeError, "k must have the dtype of q, float32, got float64"),
        ({"v": X.numpy()}, TypeError, "v must be a torch.Tensor"),
        ({"k": X[:, :4], "v": X[:, :4]}, ValueError, "q_start"),
    ],
)
def test_a_bad_value_is_named(options, error, words):
    """The message names the parameter, what was expected and what came."""
    arguments = {"q": X, "k": X, "v": X, "pattern": Window(3), **options}
    with pytest.raises(error, match=words):
        pattern_attention(**arguments)
