"""Patterns as other people's code takes them: index arrays, dense counts, FlexAttention's masks."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longattn.patterncache import BlockSparse, Dilated, Full, Rectangle, Restrict, Span, Strided, Window, index_arrays
from longattn.patterncache.testing import dense_counts, patterns, rectangles

LONGNET = ((8, 16, 32), (1, 2, 4))


def square(length, num_heads):
    return Rectangle(num_heads, Span(0, length), Span(0, length))


@given(patterns(), rectangles(), st.booleans())
@example(Dilated((4, 8), (1, 2)), Rectangle(3, (Span(1, 9, 3), Span(40, 6)), Span(2, 12, 2)), True)
def test_index_arrays_hold_the_counts(pattern, rectangle, transposed):
    """Every pair once, ascending, with its multiplicity; by queries or by keys."""
    found = index_arrays(pattern.plan(rectangle), transposed=transposed)
    expected = pattern.counts(rectangle)
    np.testing.assert_array_equal(dense_counts(found, expected.shape), expected)
    assert len(found.indices) == sum(
        np.count_nonzero(expected[list(found.head_class).index(c)]) for c in set(found.head_class)
    )
    assert found.nbytes == sum(a.nbytes for a in (found.head_class, found.indptr, found.indices, found.counts))
    for begin, end in zip(found.indptr[:, :-1].ravel(), found.indptr[:, 1:].ravel(), strict=True):
        assert (np.diff(found.indices[begin:end]) > 0).all()


def test_index_arrays_cannot_be_written():
    """They may be shared."""
    found = index_arrays(Full().plan(square(4, 2)))
    assert not any(a.flags.writeable for a in (found.head_class, found.indptr, found.indices, found.counts))
    assert found.head_class.tolist() == [0, 0] and found.indptr.tolist() == [[0, 4, 8, 12, 16]]


@given(patterns(), st.integers(0, 30), st.integers(1, 4))
def test_to_dense_is_the_counts(pattern, length, num_heads):
    """(heads, N, N)."""
    np.testing.assert_array_equal(pattern.to_dense(length, num_heads), pattern.counts(square(length, num_heads)))


def flex_counts(pattern, length, num_heads, block_size):
    """What FlexAttention is told: (heads, N, N) seen by lists and mask_mod, and the multiplicities of score_mod."""
    torch = pytest.importorskip("torch")
    flex = pattern.to_block_mask(length, num_heads, block_size=block_size)
    mask = flex.block_mask
    h, q, k = (torch.arange(n).reshape(s) for n, s in ((num_heads, (-1, 1, 1)), (length, (-1, 1)), (length, (1, -1))))
    shown = mask.mask_mod(torch.zeros(1, dtype=torch.int64), h, q, k).broadcast_to(num_heads, length, length)
    blocks = -(-length // block_size)
    lists = [torch.zeros(mask.kv_num_blocks.shape[1], blocks, blocks + 1, dtype=torch.bool) for _ in range(2)]
    sides = ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    for flags, (number, indices) in zip(lists, sides, strict=True):
        valid = torch.arange(blocks) < number[0][..., None]
        flags.scatter_(2, torch.where(valid, indices[0].long(), blocks), True)
    rows = torch.arange(length) // block_size
    partial, full = (flags[:, rows][:, :, rows].expand(num_heads, -1, -1) for flags in lists)
    assert not (partial & full).any()
    seen = full | (partial & shown)
    if flex.score_mod is None:
        return seen.long().numpy()
    added = flex.score_mod(torch.zeros(num_heads, length, length, dtype=torch.float64), 0, h, q, k)
    return torch.where(seen, added.exp().round().long(), 0).numpy()


@given(patterns(), st.integers(1, 60), st.integers(1, 4), st.sampled_from([1, 4, 16]))
@example(Dilated(*LONGNET, causal=True), 50, 3, 8)
@example(Dilated((30,), (7,), queries="all"), 60, 2, 4)
@example(Strided(5, causal=False), 37, 2, 8)
@example(BlockSparse(8, np.tri(8, dtype=bool), causal=True) + BlockSparse(8, np.eye(8, dtype=bool)), 60, 2, 4)
@example(Restrict(Window(9), BlockSparse(4, np.tri(16, dtype=bool)[::-1])), 61, 1, 16)
@settings(max_examples=2 * settings().max_examples)
def test_a_block_mask_shows_the_counts(pattern, length, num_heads, block_size):
    """Lists, mask_mod and score_mod together are the counts; a block said to be full is full."""
    expected = pattern.counts(square(length, num_heads))
    np.testing.assert_array_equal(flex_counts(pattern, length, num_heads, block_size), expected)


def test_blocks_that_are_full_or_empty_are_known_from_strides():
    """Causal: the past is full, the diagonal partial, the future absent; and one head serves all."""
    pytest.importorskip("torch")
    mask = Full(causal=True).to_block_mask(1000, 8, block_size=128).block_mask
    assert mask.kv_num_blocks.tolist() == [[[1] * 8]] and mask.full_kv_num_blocks.tolist() == [[list(range(8))]]
    per_head = Dilated((256,), (2,)).to_block_mask(512, 4).block_mask
    assert per_head.kv_num_blocks.shape == (1, 4, 4)


def test_flex_attention_agrees_with_softmax_over_counts():
    """With keys that count twice, under causality."""
    torch = pytest.importorskip("torch")
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    pattern, heads, length = Dilated((16, 32), (1, 2), causal=True), 2, 48
    q, k, v = torch.randn(3, 1, heads, length, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    exported = pattern.to_block_mask(length, heads, block_size=16)
    with pytest.warns(UserWarning, match="flex_attention called without torch.compile"):
        found = flex.flex_attention(q, k, v, score_mod=exported.score_mod, block_mask=exported.block_mask)
    counts = torch.from_numpy(pattern.to_dense(length, heads))
    expected = torch.softmax(q @ k.mT / 4 + counts.log(), -1) @ v
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Full().to_block_mask(0, 1), "N must be an integer >= 1"),
        (lambda: Full().to_block_mask(8, 0), "num_heads"),
        (lambda: Full().to_block_mask(8, 1, block_size=0), "block_size"),
        (lambda: Full().to_dense(-1), "N must be an integer >= 0"),
    ],
)
def test_a_bad_value_is_named(call, words):
    """The message names the parameter."""
    with pytest.raises(ValueError, match=words):
        call()
