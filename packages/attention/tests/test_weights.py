"""Attention weights on request: dense, or sparse for block-sparse presets."""

import pytest
import torch

from longattn.attention import PatternAttention, Ring, attention_weights, pattern_attention, weights
from longattn.attention.testing import small_inputs, small_preset
from longattn.kernels import backends
from longattn.patterncache import Dilated, Full, Rectangle, Span

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


@pytest.mark.parametrize("schedule", [None, Ring(size=3), Ring(size=4, layout="zigzag")], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"mask": True}, {"bias": True}, {"padding": True}, {"sinks": True}, {"dropout_p": 0.4, "seed": 1}],
    ids=str,
)
def test_key_weights_are_the_column_sums(schedule, options):
    """Of the dense weights, over queries and the heads of a kv head, under any schedule; nothing else changes, and no gradient flows."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, n, h, 4, generator=generator, dtype=torch.float64) for n, h in ((9, 4), (13, 2), (13, 2)))
    pattern, given = Dilated((4, 8), (1, 2), causal=True), dict(options)
    masks = {}
    if given.pop("mask", False):
        masks["attention_mask"] = torch.rand(4, 9, 13, generator=generator) < 0.7
    if given.pop("bias", False):
        masks["attention_mask"] = torch.randn(9, 13, generator=generator, dtype=torch.float64)
    if given.pop("padding", False):
        masks["key_padding_mask"] = torch.rand(2, 13, generator=generator) < 0.3
    dense = attention_weights(q, k, pattern, **masks)
    if given.pop("sinks", False):
        given["sink_logits"] = torch.randn(4, generator=generator, dtype=torch.float64)
        _, lse = pattern_attention(q, k, v, pattern, return_lse=True)
        share = torch.sigmoid(lse - given["sink_logits"]).nan_to_num(nan=0.0)
        dense = dense * share.transpose(1, 2).unsqueeze(-1)
    given |= masks | {"schedule": schedule}
    out, lse, found = pattern_attention(
        q.requires_grad_(), k, v, pattern, return_lse=True, return_key_weights=True, **given
    )
    torch.testing.assert_close(found, dense.unflatten(1, (2, 2)).sum((2, 3)))
    assert not found.requires_grad and out.requires_grad
    plain, plain_lse = pattern_attention(q, k, v, pattern, return_lse=True, **given)
    torch.testing.assert_close((out, lse), (plain, plain_lse))
    assert len(pattern_attention(q, k, v, pattern, return_key_weights=True, **given)) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_key_weights_in_less_precision(dtype):
    """Rounded once to q's dtype; every row of the table; in a compiled graph."""
    q, k, v = (torch.randn(1, 40, 2, 8, generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(3))
    expected = attention_weights(q.double(), k.double(), Full(causal=True)).sum(2)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    for name in backends("cpu"):
        found = pattern_attention(q, k, v, Full(causal=True), return_key_weights=True, backend=name)[1]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    compiled = torch.compile(pattern_attention, backend="aot_eager", fullgraph=True)
    again = compiled(q, k, v, Full(causal=True), return_key_weights=True)[1]
    torch.testing.assert_close(again.double(), expected, atol=tolerance, rtol=tolerance)


def test_key_weights_where_they_are_refused():
    """By name, with the way out."""
    x = torch.randn(1, 4, 1, 4)
    with pytest.raises(
        ValueError, match="return_key_weights must be False for DTensors, nested tensors and with positions_start"
    ):
        pattern_attention(x, x, x, Full(), positions_start=torch.tensor([1]), return_key_weights=True)
    with pytest.raises(TypeError, match="return_key_weights must be True or False"):
        pattern_attention(x, x, x, Full(), return_key_weights=1)  # type: ignore[call-overload]
