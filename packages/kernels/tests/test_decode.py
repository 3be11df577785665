"""Decode over cached rows is attention over them, in whatever order they lie."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longattn.kernels import decode, reference_attention
from longattn.kernels.decode import Bags, decode_attention, decode_scores

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def rows_of(rows, group, n, dim, dtype, seed=0):
    """q (rows, group, dim), keys and values (rows, n, dim), where a row of values is longer than it is wide."""
    generator = torch.Generator().manual_seed(seed)
    q, keys = (torch.randn(rows, k, dim, generator=generator, dtype=torch.float64).to(dtype) for k in (group, n))
    values = torch.randn(rows, n, dim + 3, generator=generator, dtype=torch.float64).to(dtype)
    return q, keys, values[..., :dim]


def expected(q, keys, values, scale, hidden=None, logits=None):
    """The oracle, each row a batch element and each query of its group a head."""
    counts = torch.ones(q.shape[0], q.shape[1], 1, keys.shape[1])
    counts = counts if hidden is None else counts * ~hidden.expand(q.shape[0], q.shape[1], -1)[:, :, None]
    k, v = (x.unsqueeze(2) for x in (keys, values))
    state = reference_attention(q.unsqueeze(1), k, v, counts, scale)
    if logits is not None:
        return (
            state.out * torch.sigmoid(state.lse - logits.double().transpose(1, 2)).nan_to_num(nan=0.0).unsqueeze(-1)
        )[:, 0]
    return state.out[:, 0]


@given(
    rows=st.integers(0, 4),
    group=st.integers(1, 3),
    n=st.integers(1, 40),
    dim=st.sampled_from([1, 3, 16]),
    dtype=st.sampled_from(list(TOLERANCE)),
    options=st.sets(st.sampled_from(["hidden", "logits", "first"])),
    order=st.randoms(use_true_random=False),
)
def test_order_does_not_matter_and_the_oracle_agrees(rows, group, n, dim, dtype, options, order):
    """With hidden keys, learned sinks and scores that are given; a row that sees nothing is zero."""
    q, keys, values = rows_of(rows, group, n, dim, dtype)
    hidden = torch.rand(rows, 1, n, generator=torch.Generator().manual_seed(1)) < 0.5 if "hidden" in options else None
    logits = torch.randn(rows, group, 1, dtype=torch.float64) if "logits" in options else None
    m = min(2, n)
    first = decode_scores(q, keys[:, :m], 0.3) if "first" in options else None
    got = decode_attention(q, keys, values, 0.3, hidden=hidden, sink_logits=logits, first=first)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        got.double(), expected(q, keys, values, 0.3, hidden, logits), atol=tolerance, rtol=tolerance
    )
    shuffled = list(range(n))
    order.shuffle(shuffled)
    if not options:
        again = decode_attention(q, keys[:, shuffled], values[:, shuffled], 0.3)
        torch.testing.assert_close(again, got, atol=2 * tolerance, rtol=2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bags_and_streamed_keys_are_the_same_products(dtype, monkeypatch):
    """What large caches take gives what small ones take; columns behind head_dim may hold anything."""
    q, keys, values = rows_of(6, 1, 300, 13, dtype)
    plain = decode_attention(q, keys, values, 0.3)
    monkeypatch.setattr(decode, "STREAM_BYTES", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    whole = torch.full((6, 300, 16), torch.nan, dtype=dtype)
    whole[..., :13] = values
    assert Bags.serve(whole)
    assert not Bags.serve(whole[:, 1:])
    with torch.no_grad():
        got = decode_attention(q, keys, whole[..., :13], 0.3, bags=Bags(whole))
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got, plain, atol=tolerance, rtol=tolerance)


def test_gradients_without_bags():
    """Those of autograd, checked by differences."""
    q, keys, values = (x.clone().requires_grad_() for x in rows_of(2, 2, 5, 3, torch.float64))
    hidden = torch.tensor([[[False, True, False, False, False]], [[True] * 5]])
    assert torch.autograd.gradcheck(lambda *x: decode_attention(*x, 0.3, hidden=hidden), (q, keys, values))
