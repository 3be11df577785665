"""Masks of other libraries become patterns that show exactly the same, or are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longattn.patterncache import Documents, Full, Periodic, Rectangle, Span, Window, from_block_mask, from_mask_mod
from longattn.patterncache.testing import check_pattern


@given(st.integers(1, 70), st.integers(1, 3), st.sampled_from([1, 2, 8, 16]), st.integers(0, 20), st.booleans())
def test_a_mask_mod_is_imported_exactly(length, heads, block, window, causal):
    """Whatever it shows, in any blocks, differing by head, causal or not."""

    def mask_mod(b, h, q, k):
        near = (abs(q // block - k // block) * block <= window + h) & (b == 0)
        return near & (q >= k) if causal else near

    h, q, k = (np.arange(n).reshape(shape) for n, shape in ((heads, (-1, 1, 1)), (length, (-1, 1)), (length, -1)))
    rectangle = Rectangle(heads, Span(0, length), Span(0, length))
    pattern = from_mask_mod(mask_mod, length, heads)
    np.testing.assert_array_equal(pattern.counts(rectangle), mask_mod(0, h, q, k))
    check_pattern(pattern, rectangle)


def test_blocks_are_as_large_as_they_can_be():
    """A prefix that all see is blocks of 32, with triangles after it; a lattice is single cells."""
    found = from_mask_mod(lambda b, h, q, k: (k < 32) | (q // 64 == k // 64), 256)
    assert (found.block_size, found.causal) == (32, False)
    assert from_mask_mod(lambda b, h, q, k: (q - k) % 3 == 0, 100).block_size == 1


DOCUMENTS = np.repeat(np.arange(5), [7, 1, 30, 2, 60])


@pytest.mark.parametrize(
    ("mask_mod", "expected"),
    [
        (lambda b, h, q, k: q >= k, Full(causal=True)),
        (lambda b, h, q, k: (q >= 0) & (k >= 0), Full()),
        (lambda b, h, q, k: (q - k < 9) & (q >= k), Window(9)),
        (lambda b, h, q, k: abs(q - k) < 3, Window(3, causal=False)),
        (lambda b, h, q, k: (q - k < 9) & (k - q < 3), Periodic(1, [(0, 0, -2, 8)], 100)),
        (lambda b, h, q, k: DOCUMENTS[q] == DOCUMENTS[k], Documents([0, 7, 8, 38, 40, 100])),
        (
            lambda b, h, q, k: (DOCUMENTS[q] == DOCUMENTS[k]) & (q >= k) & (q - k < 12),
            Documents([0, 7, 8, 38, 40, 100], Window(12)),
        ),
    ],
)
@pytest.mark.parametrize("heads", [None, 3])
def test_bands_and_documents_are_named(mask_mod, expected, heads):
    """As the pattern that they are, for all heads."""
    assert expected == from_mask_mod(mask_mod, 100, heads, batch=2)


def test_one_pair_more_is_not_overlooked():
    """A window with a single pair beside it is no window."""

    def mask_mod(b, h, q, k):
        return (q >= k) & (q - k < 5) | (q == 90) & (k == 3)

    pattern, i = from_mask_mod(mask_mod, 100), np.arange(100)
    np.testing.assert_array_equal(pattern.to_dense(100, 1)[0], mask_mod(0, 0, i[:, None], i))


LONG = 1 << 17
STARTS = np.sort(np.random.default_rng(0).integers(0, LONG, 40))


@pytest.mark.parametrize(
    ("mask_mod", "expected"),
    [
        (lambda b, h, q, k: (q >= k) & (q - k < 777), Window(777)),
        (
            lambda b, h, q, k: (np.searchsorted(STARTS, q) == np.searchsorted(STARTS, k)) & (q >= k),
            Documents([0, *(STARTS + 1).tolist(), LONG], Full(causal=True)),
        ),
    ],
)
def test_a_long_mask_is_believed_after_samples(mask_mod, expected):
    """A hundred thousand tokens, which no machine compares pair by pair; as many questions as tokens, times a constant."""
    asked = 0

    def counting(b, h, q, k):
        nonlocal asked
        asked += np.broadcast(h, q, k).size
        return mask_mod(b, h, q, k)

    assert expected == from_mask_mod(counting, LONG, verify="samples")
    assert asked <= 250 * LONG


@given(st.sampled_from([16, 32, 128]), st.integers(1, 3), st.booleans(), st.integers(300, 700), st.integers(0, 99))
def test_blocks_are_believed_after_samples(size, heads, causal, length, seed):
    """In blocks that say the same, for heads that differ too; short ones at the end included."""
    blocks = -(-length // size)
    table = np.random.default_rng(seed).random((heads, blocks, blocks)) < 0.4

    def mask_mod(b, h, q, k):
        shown = table[h, q // size, k // size]
        return shown & (q >= k) if causal else shown

    if causal:
        table &= np.tri(blocks, dtype=bool)
    table[:, 0, 0] = True
    found, exact = (from_mask_mod(mask_mod, length, heads, verify=verify) for verify in ("samples", "every"))
    rectangle = Rectangle(heads, Span(0, length), Span(0, length))
    np.testing.assert_array_equal(found.counts(rectangle), exact.counts(rectangle))


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 12), st.integers(1, 4), st.booleans())
def test_a_periodic_mask_mod_is_imported_compactly(length, stride, window, block, causal):
    """Exactly, as runs of residues and distances: plans without index data."""

    def mask_mod(b, h, q, k):
        shown = ((q - k) % stride == 0) | (abs(q // block - k // block) * block < window)
        return shown & (q >= k) if causal else shown

    # Long enough to see a period come again.
    length = max(length, 2 * stride * block)
    i = np.arange(length)
    pattern = from_mask_mod(mask_mod, length, compact=True)
    np.testing.assert_array_equal(pattern.to_dense(length, 1)[0], mask_mod(0, 0, i[:, None], i))
    assert pattern.plan(Rectangle(1, Span(0, length), Span(0, length))).nbytes == 0
    check_pattern(pattern, Rectangle(2, Span(0, length), Span(length // 3, length - length // 3)))


def test_a_compact_window_is_one_run():
    """Of the fewest runs; a stride is one for each residue."""
    window = from_mask_mod(lambda b, h, q, k: (q - k < 9) & (q >= k), 200, compact=True)
    assert window == Periodic(1, [(0, 0, 0, 8)], 200)
    assert len(from_mask_mod(lambda b, h, q, k: (q - k) % 5 == 0, 200, compact=True).runs) == 5


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("length", [96, 50])
def test_a_flex_block_mask_is_imported_exactly(heads, length):
    """Full blocks, partial blocks through the mask_mod, and a short last block."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention")

    def mask_mod(b, h, q, k):
        return ((q - k).abs() < 37 + h) & (q >= k) | (k < 16)

    mask = flex.create_block_mask(mask_mod, None, heads, length, length, device="cpu", BLOCK_SIZE=16)
    pattern = from_block_mask(mask)
    h, q, k = (np.arange(n).reshape(s) for n, s in ((heads or 1, (-1, 1, 1)), (length, (-1, 1)), (length, -1)))
    expected = (abs(q - k) < 37 + h) & (q >= k) | (k < 16)
    np.testing.assert_array_equal(pattern.counts(Rectangle(heads or 1, Span(0, length), Span(0, length))), expected)


def test_a_block_that_the_lists_leave_out_is_hidden():
    """The lists of a BlockMask decide, not its mask_mod alone."""
    torch = pytest.importorskip("torch")
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    number, indices = torch.tensor([[[1, 1]]], dtype=torch.int32), torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32)
    mask = flex.BlockMask.from_kv_blocks(number, indices, BLOCK_SIZE=4)
    assert from_block_mask(mask).mask.tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: from_mask_mod(3, 8), TypeError, "mask_mod must be callable"),
        (lambda: from_mask_mod(lambda b, h, q, k: q - k, 8), TypeError, "mask_mod must return booleans.*, got int64"),
        (lambda: from_mask_mod(lambda b, h, q, k: np.ones(3, bool), 8), ValueError, "broadcasts"),
        (lambda: from_mask_mod(lambda b, h, q, k: q >= k + b, 8, batch=2), ValueError, "another mask for entry 1"),
        (lambda: from_mask_mod(lambda b, h, q, k: q >= k, 1 << 15), ValueError, "at most 268435456"),
        (lambda: from_mask_mod(lambda b, h, q, k: q >= k, 0), ValueError, "N must be an integer >= 1"),
        (lambda: from_mask_mod(lambda b, h, q, k: q >= k, 9, verify="some"), ValueError, "verify must be one of"),
        (
            lambda: from_mask_mod(lambda b, h, q, k: (q - k) % 3 == 0, 99, verify="samples"),
            ValueError,
            "mask_mod must be a band, documents of bands, or blocks",
        ),
        (
            lambda: from_mask_mod(lambda b, h, q, k: q >= k, 99, compact=True, verify="samples"),
            ValueError,
            "verify must be 'every' where a compact plan",
        ),
        (
            lambda: from_mask_mod(lambda b, h, q, k: k < 3, 40, compact=True),
            ValueError,
            "must repeat along its diagonal",
        ),
        (lambda: from_mask_mod(lambda b, h, q, k: q * k % 97 < 50, 99, compact=True), ValueError, "must repeat along"),
        (lambda: from_mask_mod(lambda b, h, q, k: q >= k + h, 40, 2, compact=True), ValueError, "same for all heads"),
        (lambda: Periodic(2, [(2, 0, None, None)], 9), ValueError, "residues below period=2"),
        (lambda: Periodic(2, [(0, 0, 1.5, None)], 9), TypeError, "runs"),
        (
            lambda: Periodic(1, [], 9).plan(Rectangle(1, Span(0, 10), Span(0, 4))),
            ValueError,
            "queries must lie below length=9",
        ),
        (lambda: from_block_mask(np.ones(3)), TypeError, "must be a FlexAttention BlockMask, got ndarray"),
    ],
)
def test_a_bad_value_is_named(call, error, words):
    """The message names the parameter, what was expected and what came."""
    with pytest.raises(error, match=words):
        call()
