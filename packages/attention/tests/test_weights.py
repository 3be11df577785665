"""Attention weights on request: dense, or sparse for block-sparse presets."""

import pytest
import torch

from longattn.attention import PatternAttention, attention_weights, weights
from longattn.attention.testing import small_inputs, small_preset
from longattn.patterncache import Dilated, Rectangle, Span

PATTERN = Dilated((8, 16), (1, 2), causal=True)
MASKS = {
    "none": {},
    "bool": {"attention_mask": torch.rand(21, 21) > 0.3},
    "bias": {"attention_mask": torch.randn(1, 2, 21, 21)},
    "hiding bias": {"attention_mask": torch.randn(21, 21).masked_fill(torch.rand(21, 21) > 0.5, -torch.inf)},
    "padding": {"key_padding_mask": torch.rand(2, 21) > 0.7},
}


@pytest.mark.parametrize("mask", MASKS)
def test_sparse_weights_are_the_dense_ones(mask, monkeypatch):
    """Values, gradients, and an entry for what is seen and nothing else; over several strips."""
    monkeypatch.setattr(weights, "_CELLS", 2 * 2 * 21 * 4)
    sparse, dense = (PatternAttention(PATTERN, sparse_weights=flag) for flag in (True, False))
    q, k, v = (torch.randn(2, 21, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    options = {n: m.double() if m.is_floating_point() else m for n, m in MASKS[mask].items()}
    out, found = sparse(q, k, v, need_weights=True, **options)
    same, expected = dense(q, k, v, need_weights=True, **options)
    assert torch.equal(out, same) and found.is_coalesced() and found.layout == torch.sparse_coo
    assert torch.equal(found.to_dense() != 0, expected != 0) and found._nnz() == int((expected != 0).sum())
    torch.testing.assert_close(found.to_dense(), expected)
    torch.testing.assert_close(*(torch.autograd.grad(w.to_dense().square().sum(), q)[0] for w in (found, expected)))


def test_weights_times_values_is_the_output():
    """For the sparse weights of a block-sparse preset, too; fewer entries than pairs."""
    module = small_preset("BlockSparseRingDilatedAttention", ring_size=2)
    q, k, v = small_inputs("BlockSparseRingDilatedAttention", 64, dtype=torch.float64)
    out, found = module(q, k, v, need_weights=True)
    torch.testing.assert_close(torch.einsum("bhij,bjhd->bihd", found.to_dense(), v), out)
    seen = module.pattern.counts(Rectangle(2, Span(0, 64), Span(0, 64)))
    assert found._nnz() == (seen > 0).sum() < seen.size


def test_padding_with_nan_reaches_no_weight():
    """What padded keys hold shows nowhere."""
    q, k = torch.randn(2, 1, 9, 2, 8)
    padding = torch.zeros(1, 9, dtype=torch.bool)
    padding[:, 6:] = True
    expected = attention_weights(q, k, PATTERN, key_padding_mask=padding)
    k[:, 6:] = float("nan")
    assert torch.equal(attention_weights(q, k, PATTERN, key_padding_mask=padding), expected)
    assert expected.isfinite().all()


def test_no_queries_have_no_weights():
    """Of the right shape all the same."""
    module = PatternAttention(PATTERN, sparse_weights=True)
    assert module.weights(torch.zeros(2, 0, 2, 8), torch.zeros(2, 5, 2, 8)).shape == (2, 2, 0, 5)
