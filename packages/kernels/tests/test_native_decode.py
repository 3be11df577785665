"""The library's decode step against the oracle: forms, sizes, ranges, threads, what is hidden, and what is refused."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longattn.kernels import reference_attention
from longattn.kernels.native.building import refusal
from longattn.kernels.native.cpu import levels
from longattn.kernels.native.decode import StreamedCache

pytestmark = pytest.mark.skipif(refusal() is not None, reason=str(refusal()))

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LENGTHS = (1, 2, 15, 31, 33, 63, 64, 65, 257, 1023, 1025, 5000)


@pytest.fixture(params=levels())
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each form of the library."""
    monkeypatch.setenv("LONGATTN_NATIVE", request.param)
    return request.param


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def surrounded(x: torch.Tensor) -> torch.Tensor:
    """The same numbers with NaN on every side: whoever reads beyond a row meets one."""
    room = torch.full((x.shape[0], x.shape[1] + 2, x.shape[2] + 5), torch.nan, dtype=x.dtype)
    room[:, 1:-1, 2:-3] = x
    return room[:, 1:-1, 2:-3]


def made(
    rows: int, group: int, n: int, dim: int, dtype: torch.dtype, value_dim: int | None = None
) -> tuple[torch.Tensor, ...]:
    q, keys = (numbers(rows, m, dim, dtype=dtype, seed=m) for m in (group, n))
    values = numbers(rows, n + 1, value_dim or dim, dtype=dtype, seed=n + 1)
    return q, surrounded(keys), surrounded(values[:, 1:])


def oracle(q, keys, values, scale, hidden=None, first=None, sinks=None, softcap=0.0, added=None) -> torch.Tensor:
    """In float64, from the definition; (rows, group, dim)."""
    q, keys, values = (x.double() for x in (q, keys, values))
    if first is None and sinks is None and not softcap and added is None:
        counts = torch.ones(q.shape[0], 1, 1, keys.shape[1]) if hidden is None else (~hidden)[:, None].double()
        return reference_attention(q[:, None], keys[:, :, None], values[:, :, None], counts, scale).out[:, 0]
    scores = scale * q @ keys.mT
    if first is not None:
        scores[..., : first[1]] = scale * first[0].double() @ keys[:, : first[1]].mT
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if added is not None:
        scores = scores + added
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()], -1)
    weights = scores.softmax(-1).nan_to_num(nan=0.0)[..., : keys.shape[1]]
    return weights @ values


def attended(keys: torch.Tensor, values: torch.Tensor, *asked, **options) -> torch.Tensor:
    """A step over a cache of its own."""
    out = StreamedCache(keys, values).attend(*asked, **options)
    assert out is not None
    return out


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("dim", [1, 7, 32, 64, 80, 96, 128, 200, 256])
@pytest.mark.parametrize("group", [1, 4, 19])
def test_every_form_type_and_size(dtype: torch.dtype, dim: int, group: int):
    """Lengths beside those of tiles and ranges; nothing beside a row is read as a number."""
    for n in (5, 32, 65) if dim != 64 else LENGTHS:
        q, keys, values = made(2, group, n, dim, dtype)
        close(attended(keys, values, q, n, 0.3), oracle(q, keys, values, 0.3))


@pytest.mark.usefixtures("level")
@given(
    n=st.integers(1, 2500),
    held=st.integers(0, 2500),
    group=st.integers(1, 18),
    dim=st.sampled_from([3, 16, 33, 64, 100]),
    value_dim=st.sampled_from([None, None, 5, 64, 130]),
    dtype=st.sampled_from(list(TOLERANCE)),
    hides=st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]),
    first=st.integers(0, 40),
    options=st.sets(st.sampled_from(["hidden", "first", "sinks", "nan", "softcap", "added"])),
    scale=st.sampled_from([0.1, -1.0, 4.0]),
)
def test_everything_at_once(n, held, group, dim, value_dim, dtype, hides, first, options, scale):
    """Hidden keys may hold NaN and reach nothing; rows that see nothing are zero; sinks take their share once."""
    held = min(held, n)
    q, keys, values = made(2, group, n, dim, dtype, value_dim)
    seen_k, seen_v = keys[:, :held].clone(), values[:, :held].clone()
    hidden = numbers(2, 1, held).sigmoid() < torch.special.expit(torch.special.ndtri(torch.tensor(hides)))
    if "nan" in options and "hidden" in options:
        for x in (keys, values):
            x[:, :held].masked_fill_(hidden.mT, torch.nan)
        for x in (seen_k, seen_v):
            x.masked_fill_(hidden.mT, 0)
    keys[:, held:], values[:, held:] = torch.nan, torch.nan
    asked = {
        "hidden": hidden if "hidden" in options else None,
        "first": (numbers(*q.shape, dtype=dtype, seed=5), min(first, held)) if "first" in options else None,
        "softcap": 1.5 if "softcap" in options else 0.0,
        "added": numbers(2, group, held, seed=7) if "added" in options else None,
    }
    sinks = numbers(2, group, 1, seed=6) * 5 if "sinks" in options else None
    got = attended(keys, values, q, held, scale, sink_logits=sinks, **asked)
    close(got, oracle(q, seen_k, seen_v, scale, sinks=sinks, **asked))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("group", "first"), [(1, 0), (5, 4)])
def test_same_bits_for_any_threads(dtype: torch.dtype, group: int, first: int, threads):
    """Ranges depend on the number of keys alone, and their parts merge in order."""
    q, keys, values = made(3, group, 30000, 64, dtype)
    outs = []
    for many in (1, 2, 2, 3, 8):
        threads(many)
        outs.append(attended(keys, values, q, 30000, 0.3, first=(q, first)))
    assert all(torch.equal(out, outs[0]) for out in outs)
    close(outs[0], oracle(q, keys, values, 0.3))


def test_a_million_keys_merge_in_float32():
    """Error does not grow with the number of ranges: the mean of a million numbers is that mean."""
    n = 1 << 20
    values = numbers(1, n, 16) + 1
    got = attended(torch.zeros(1, n, 16), values, torch.ones(1, 1, 16), n, 1.0)
    close(got, values.double().mean(1, keepdim=True))


def test_one_key_far_above_the_rest():
    """Wherever it lies, in the first range or the last: the running max moves, and moves no more."""
    q, keys, values = made(1, 2, 5000, 64, torch.float32)
    for at in (0, 1, 2047, 4999):
        high = keys.clone()
        high[0, at] = 20 * q[0, 0]
        close(attended(high, values, q, 5000, 1.0), oracle(q, high, values, 1.0))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("at", [0, 40, 99, 2400])
def test_nan_that_is_seen_is_not_lost(dtype: torch.dtype, at: int):
    """Where a query is NaN so is its row, where a visible key is so are the rows that see it, and no others."""
    q, keys, values = made(2, 3, 2500, 32, dtype)
    q[1, 1, 7] = torch.nan
    got = attended(keys, values, q, 2500, 0.3)
    assert got[1, 1].isnan().all() and got.isnan().sum() == 32
    keys[0, at, 3] = torch.nan
    assert attended(keys, values, q, 2500, 0.3).isnan().sum() == 4 * 32


def test_empty_calls():
    """No rows, no keys, no query heads."""
    for rows, group, n in itertools.product((0, 2), repeat=3):
        q, keys, values = numbers(rows, group, 8), numbers(rows, n, 8), numbers(rows, n, 8)
        got = attended(keys, values, q, n, 0.3)
        assert got.shape == q.shape and (n or not got.any())


def bad(**changed) -> tuple[torch.Tensor, torch.Tensor]:
    good = {"keys": numbers(2, 9, 8), "values": numbers(2, 9, 8)} | changed
    return good["keys"], good["values"]


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        bad(keys=numbers(2, 8, 8)),
        bad(values=numbers(2, 9, 8).bfloat16()),
        bad(keys=numbers(2, 9, 8).double(), values=numbers(2, 9, 8).double()),
        bad(keys=numbers(2, 9, 16)[..., ::2]),
        bad(values=numbers(2, 9, 8).to("meta")),
        bad(keys=numbers(2, 9, 8, 1)),
        bad(keys=numbers(2, 9, 300), values=numbers(2, 9, 300)),
        bad(values=numbers(2, 9, 300)),
    ],
)
def test_caches_that_cannot_be_streamed(keys: torch.Tensor, values: torch.Tensor):
    with pytest.raises(ValueError, match="keys and values must be"):
        StreamedCache(keys, values)


def test_a_cache_that_lost_its_memory():
    keys, values = bad()
    keys.untyped_storage().resize_(16)
    with pytest.raises(ValueError, match="keys must lie within its memory"):
        StreamedCache(keys, values)


@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.int64]),
    name=st.sampled_from(["q", "held", "first", "hidden", "sink_logits"]),
    count=st.integers(-3, 12),
)
def test_any_arguments(shape: list[int], dtype: torch.dtype, name: str, count: int):
    """Refused with a sentence, or of the right shape and finite: nothing else reaches the library."""
    x = torch.zeros(shape, dtype=dtype)
    asked = {"q": numbers(2, 3, 8), "held": 9}
    asked[name] = {"first": (x, count), "held": count}.get(name, x)
    try:
        got = attended(*bad(), scale=0.3, **asked)
    except (ValueError, RuntimeError):
        return
    assert got.shape == asked["q"].shape and got.isfinite().all()
