"""Decode over cached rows is attention over them, in whatever order they lie: by torch's products, and streamed by the library."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longattn.kernels import backends, explain, reference_attention
from longattn.kernels.decoding import DecodeCache, decode_attention
from longattn.kernels.native import building
from longattn.kernels.native.decode import StreamedCache
from longattn.kernels.triton import availability
from longattn.patterncache import Full

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
NATIVE = pytest.mark.skipif(building.refusal() is not None, reason=str(building.refusal()))


def rows_of(rows, group, n, dim, dtype, seed=0, value_dim=None):
    """q (rows, group, dim), keys and values (rows, n, their own dim), where a row of values is longer than it is wide."""
    generator = torch.Generator().manual_seed(seed)
    q, keys = (torch.randn(rows, k, dim, generator=generator, dtype=torch.float64).to(dtype) for k in (group, n))
    value_dim = value_dim or dim
    values = torch.randn(rows, n, value_dim + 3, generator=generator, dtype=torch.float64).to(dtype)
    return q, keys, values[..., :value_dim]


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


def products(*args, **options):
    """`decode_attention` by torch's products, whatever else there is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamedCache, "attend", lambda *_, **__: None)
        return decode_attention(*args, **options)


@pytest.mark.parametrize("way", [decode_attention, products])
@given(
    rows=st.integers(0, 4),
    group=st.integers(1, 3),
    n=st.integers(1, 40),
    dim=st.sampled_from([1, 3, 16]),
    value_dim=st.sampled_from([None, 2, 20]),
    dtype=st.sampled_from(list(TOLERANCE)),
    options=st.sets(st.sampled_from(["hidden", "logits", "first"])),
    order=st.randoms(use_true_random=False),
)
def test_order_does_not_matter_and_the_oracle_agrees(way, rows, group, n, dim, value_dim, dtype, options, order):
    """With hidden keys, learned sinks and other queries for the first keys; a row that sees nothing is zero."""
    q, keys, values = rows_of(rows, group, n, dim, dtype, value_dim=value_dim)
    cache = DecodeCache(keys, values)
    hidden = torch.rand(rows, 1, n, generator=torch.Generator().manual_seed(1)) < 0.5 if "hidden" in options else None
    logits = torch.randn(rows, group, 1, dtype=torch.float64) if "logits" in options else None
    first = (q * 1, min(2, n)) if "first" in options else None
    got = way(q, cache, n, 0.3, hidden=hidden, sink_logits=logits, first=first)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        got.double(), expected(q, keys, values, 0.3, hidden, logits), atol=tolerance, rtol=tolerance
    )
    shuffled = list(range(n))
    order.shuffle(shuffled)
    if not options:
        again = way(q, DecodeCache(keys[:, shuffled], values[:, shuffled]), n, 0.3)
        torch.testing.assert_close(again, got, atol=2 * tolerance, rtol=2 * tolerance)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_slots_behind_those_held_and_shapes_in_order(dtype):
    """What lies behind the slots in use is not read, and q may come as (batch, 1, heads, head_dim)."""
    q, keys, values = rows_of(6, 2, 50, 13, dtype)
    wanted = decode_attention(q, DecodeCache(keys[:, :37], values[:, :37]), 37, 0.3)
    keys[:, 37:], values[:, 37:] = torch.nan, torch.nan
    got = decode_attention(q.view(3, 1, 4, 13), DecodeCache(keys, values), 37, 0.3)
    assert torch.equal(got, wanted.view(3, 1, 4, 13))


@pytest.mark.parametrize("way", [decode_attention, products])
def test_other_queries_see_the_first_keys(way):
    """Their scores are those of the queries that were given for them."""
    q, keys, values = rows_of(3, 2, 20, 8, torch.float64)
    other = torch.randn_like(q)
    scores = torch.cat([other @ keys[:, :7].mT, q @ keys[:, 7:].mT], -1) * 0.3
    wanted = scores.softmax(-1) @ values
    q, keys, values, other = (x.float() for x in (q, keys, values, other))
    got = way(q, DecodeCache(keys, values), 20, 0.3, first=(other, 7))
    torch.testing.assert_close(got.double(), wanted, atol=2e-5, rtol=2e-5)


def test_gradients():
    """Those of autograd, checked by differences; where the library would serve, torch's products do."""
    hidden = torch.tensor([[[False, True, False, False, False]], [[True] * 5]])

    def attend(q, keys, values, turned, logits):
        cache = DecodeCache(keys, values)
        return decode_attention(q, cache, 5, 0.3, hidden=hidden, first=(turned, 2), sink_logits=logits)

    q, keys, values = rows_of(2, 2, 5, 3, torch.float64)
    inputs = [x.clone().requires_grad_() for x in (q, keys, values, q, q[..., :1])]
    assert torch.autograd.gradcheck(attend, inputs)
    for index in range(len(inputs)):
        singles = [x.detach().float().requires_grad_(i == index) for i, x in enumerate(inputs)]
        assert attend(*singles).requires_grad


@NATIVE
def test_the_library_serves_where_no_gradient_is_wanted(monkeypatch):
    """Switched off, products serve; so they do under a transform and for float64."""
    calls = []
    plain = StreamedCache.attend
    monkeypatch.setattr(StreamedCache, "attend", lambda *a, **o: (calls.append(plain(*a, **o)), calls[-1])[1])
    q, keys, values = rows_of(2, 2, 5, 3, torch.float32)
    cache = DecodeCache(keys, values)
    assert decode_attention(q, cache, 5, 0.3) is calls.pop()
    with torch.no_grad():
        assert decode_attention(q.clone().requires_grad_(), cache, 5, 0.3) is calls.pop()
    mapped = torch.vmap(lambda x: decode_attention(x, cache, 5, 0.3))(torch.stack([q, q]))
    torch.testing.assert_close(mapped[1], decode_attention(q, cache, 5, 0.3))
    calls.clear()
    monkeypatch.setenv("LONGATTN_NATIVE", "0")
    torch.testing.assert_close(decode_attention(q, cache, 5, 0.3), products(q, cache, 5, 0.3))
    assert calls == [None]
    wide = [x.double() for x in (q, keys, values)]
    assert decode_attention(wide[0], DecodeCache(*wide[1:]), 5, 0.3).dtype == torch.float64 and len(calls) == 1


@NATIVE
def test_explain_says_which_row_takes_a_decode_step_and_why_no_other_does():
    """Every row of the table is named; gradients, wide heads and float64 leave torch's products."""
    shapes = (2, 1, 4, 16), (2, 40, 2, 16)
    plain = explain(Full(), *shapes, decode=True)
    assert plain.backend == "native_decode"
    assert {*backends(), "native_decode", "triton_decode", "torch_decode"} == {name for name, _ in plain.rows}
    assert all("decode steps" in " ".join(reasons) for name, reasons in plain.rows if name in backends())
    on_cuda = "torch_decode" if availability.refusal() else "triton_decode"
    for options, reason, serving in (
        ({"requires_grad": True}, "gradients", "torch_decode"),
        ({"dtype": torch.float64}, "dtype=float64", "torch_decode"),
        ({"device": "cuda"}, "device=cuda", on_cuda),
    ):
        found = explain(Full(), *shapes, decode=True, **options)
        assert found.backend == serving and reason in " ".join(dict(found.rows)["native_decode"])
        assert f"{serving}: chosen" in str(found)
    with pytest.raises(ValueError, match="decode must be False"):
        explain(Full(), (2, 2, 4, 16), (2, 40, 2, 16), decode=True)


@NATIVE
def test_explain_says_where_a_call_has_few_queries():
    """The native row streams keys to few query rows, and packs them into tiles for many, or beside a mask."""
    few, many = (explain(Full(), (1, n, 4, 16), (1, 2048, 4, 16)) for n in (2, 512))
    masked = explain(Full(), (1, 2, 4, 16), (1, 2048, 4, 16), attention_mask=True)
    assert [dict(found.forms)["native"] for found in (few, many, masked)] == ["few queries", "tiles", "tiles"]
    assert "few queries" in str(few)
