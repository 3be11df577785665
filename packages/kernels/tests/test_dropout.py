"""Dropout: the generator, which pairs are dropped, and that every row, shard, part and gradient agrees on them."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from longattn.kernels import AttentionState, attend, backends, explain, merge
from longattn.kernels.dispatch.table import row
from longattn.kernels.philox import as_seed, keep_scale, philox
from longattn.kernels.testing import Case, assert_near, check_backend, expect_case, run_case
from longattn.patterncache import Dilated, Full, Pattern, Restrict, Span, Strided, Window

LONGNET = Dilated((8, 16), (1, 2), causal=True)
LISTED = Restrict(Restrict(Window(9), Dilated((4,), (2,))), Strided(4))
DROPPING = [name for name in backends("cpu") if row(name).capability.dropout]
ROWS = pytest.mark.parametrize("name", DROPPING)

# Random123's known answers (kat_vectors, philox4x32 10): counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]):
    """Also from the seed as a signed 64-bit number, as a tensor holds it."""
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    seed = key[0] | key[1] << 32
    for given in (seed, seed - 2**64 if seed >= 2**63 else seed):
        assert tuple(int(word) for word in philox((c0, c1, c2, c3), given)) == expected


def known_words(counter: tuple[int, int, int, int], seed: int) -> list[int]:
    """Philox4x32-10 in Python's own integers, from the paper."""
    c, k = list(counter), [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_what_decides_about_a_pair(p: float):
    """counter (j // 4, i, head, batch), lane j % 4, keep iff word >= floor(p * 2^32), for large positions too."""
    seed = 2**62 + 12345
    for batch, head, i, j in ((0, 0, 0, 0), (1, 3, 5, 7), (2, 0, 2**31 + 5, 2**33 + 2), (7, 39, 1, 2**20 + 1)):
        at = [torch.tensor(n) for n in (batch, head, i, j)]
        word = known_words((j // 4, i, head, batch), seed)[j % 4]
        expected = 1 / (1 - p) if word >= int(p * 2**32) else 0.0
        assert float(keep_scale(seed, p, *at, torch.float64)) == expected


CASES = [
    Case(LONGNET, (17, 23), kv_heads=2, group=2, prior=True),
    Case(LONGNET, (24, 24), batch=3, layouts=("heads_first",) * 5, dtype=torch.float64),
    Case(LISTED, (19, 19), kv_heads=1, group=3, mask="bhqk", padding=True),
    Case(Full(), (9, 30), q_spans=(Span(3, 9, 2),), k_spans=(Span(40, 20), Span(7, 10, 3)), shard=(3, 7), mask="+hq"),
    Case(Dilated((8, 12), (1, 3), heads="split"), (20, 20), kv_heads=4, shard=(2, 8), dtype=torch.bfloat16),
    Case(Full(causal=True), (300, 300), batch=1, kv_heads=1, group=2, head_dim=2),
]


@ROWS
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.pattern))
def test_against_the_oracle_under_the_same_mask(name: str, case: Case):
    """Out, undropped lse and gradients: keys and queries in parts, shards of heads, grouped heads, batches, more than a tile."""
    # A row without float64 is asked in float32.
    dtype = case.dtype if case.dtype in row(name).capability.dtypes_on("cpu") else torch.float32
    check_backend(name, replace(case, dropout_p=0.4, seed=5, dtype=dtype))


def test_the_oracle_drops_something():
    """The check above can fail: the oracle with a mask is another one than without, and so is the row."""
    case = replace(CASES[0], dropout_p=0.4)
    plain, dropped = (expect_case(c, c.tensors()) for c in (replace(case, dropout_p=0.0), case))
    assert not torch.allclose(plain.out, dropped.out, atol=0.05) and torch.equal(plain.lse, dropped.lse)
    with pytest.raises(AssertionError):
        assert_near(run_case(case, case.tensors(), seed=case.seed).out, plain.out, 0.05, 0.05, "out")


def kept(name: str | None, p: float, n: int = 64, **options: Any) -> torch.Tensor:
    """(batch, heads, Nq, Nk): how often each key reached each query, times 1 - p, seen through `attend` alone."""
    batch, heads = options.pop("batch", 2), options.pop("local", 4)
    q = torch.zeros(batch, n, heads, n)
    v = torch.eye(n)[None, :, None].expand(batch, n, heads, n).contiguous()
    out = attend(q, q, v, Full(), softmax_scale=1.0, dropout_p=p, backend=name, **options).out
    return out.transpose(1, 2) * n * (1 - p)


@ROWS
def test_the_same_pairs_whoever_asks(name: str):
    """Every row, a shard of heads, a later part of the sequence; and the default row."""
    whole = kept(name, 0.3, seed=9)
    assert_near(kept(None, 0.3, seed=9), whole, 1e-4, 1e-4, "default row")
    assert_near(whole, kept(DROPPING[0], 0.3, seed=9), 1e-4, 1e-4, "rows")
    shard = kept(name, 0.3, seed=9, local=2, heads=Span(1, 2), num_heads=4)
    assert_near(shard, whole[:, 1:3], 1e-4, 1e-4, "heads")
    later = kept(name, 0.3, 32, seed=9, q_spans=Span(1, 32, 2), k_spans=(Span(32, 16), Span(0, 16)))
    assert_near(later, whole[:, :, 1::2][..., [*range(32, 48), *range(16)]], 1e-4, 1e-4, "positions")


def test_statistics_of_the_mask():
    """Rate, and no correlation between heads, batch elements, neighbouring queries, keys, or seeds, within 5 sigma."""
    p, axes = 0.3, (torch.arange(4)[:, None, None, None], torch.arange(4)[:, None, None], torch.arange(128)[:, None])
    mask = (keep_scale(1, p, *axes, torch.arange(128), torch.float64) > 0).double()
    other = (keep_scale(2, p, *axes, torch.arange(128), torch.float64) > 0).double()
    sigma = (p * (1 - p)) ** 0.5
    for part in (mask, *mask, *mask[0], mask[..., ::4], mask[..., 3::4]):
        assert abs(part.mean() - (1 - p)) < 5 * sigma / part.numel() ** 0.5
    centred = (mask - (1 - p)) / sigma
    pairs = [(centred.narrow(axis, 0, n - 1), centred.narrow(axis, 1, n - 1)) for axis, n in enumerate(mask.shape)]
    pairs += [(centred, centred.transpose(2, 3)), (centred, centred.transpose(0, 1)), (centred, (other - 0.7) / sigma)]
    for at, (a, b) in enumerate(pairs):
        # A transposed pair meets itself on the diagonal, and each other pair twice.
        shared = {4: 1 / 128, 5: 1 / 4}.get(at, 0.0)
        assert abs((a * b).mean() - shared) < 5 * 2**0.5 / a.numel() ** 0.5, at


@ROWS
@pytest.mark.parametrize("pattern", [LONGNET, LISTED, Full()], ids=str)
def test_keys_in_parts(name: str, pattern: Pattern):
    """By prior, with gradients through both, and by merge."""
    case = Case(pattern, (30, 30), batch=2, dropout_p=0.4, seed=3)
    data = case.tensors()
    q, k, v = (x.requires_grad_() for x in (data.q, data.k, data.v))
    whole = run_case(case, data, backend=name)
    options: dict[str, Any] = {"q_spans": Span(0, 30), "dropout_p": 0.4, "seed": 3, "backend": name}
    halves = [{"k_spans": Span(0, 11), **options}, {"k_spans": Span(11, 19), **options}]
    first = attend(q, k[:, :11], v[:, :11], pattern, **halves[0])
    both = attend(q, k[:, 11:], v[:, 11:], pattern, prior=first, **halves[1])
    merged = merge(first, attend(q, k[:, 11:], v[:, 11:], pattern, **halves[1]))
    for state in (both, merged):
        assert_near(state.out, whole.out, 2e-5, 2e-5, "out")
        assert_near(state.lse, whole.lse, 2e-5, 2e-5, "lse")
    grads = [torch.autograd.grad(state.out, (q, k, v), data.grad_out) for state in (whole, both)]
    for got, expected in zip(*grads, strict=True):
        assert_near(got, expected, 1e-4, 1e-4, "gradient")


@pytest.mark.parametrize("name", [n for n in DROPPING if torch.float64 in row(n).capability.dtypes_on("cpu")])
def test_gradcheck(name: str):
    leaves = [torch.randn(1, 5, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def outputs(*qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = attend(*qkv, Window(4), dropout_p=0.5, seed=1, backend=name)
        return state.out, state.lse

    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)


def test_seeds():
    """manual_seed repeats, no seed draws another mask each time, a tensor is its integer, and p = 0 draws nothing."""
    q = torch.randn(1, 16, 2, 4)

    def out(**options: Any) -> torch.Tensor:
        return attend(q, q, q, Full(), dropout_p=0.5, **options).out

    torch.manual_seed(4)
    first, second = out(), out()
    torch.manual_seed(4)
    assert torch.equal(out(), first) and not torch.equal(first, second)
    assert torch.equal(out(seed=7), out(seed=torch.tensor(7))) and not torch.equal(out(seed=7), out(seed=8))
    # The key is all 64 bits of it.
    assert not torch.equal(out(seed=7), out(seed=7 + 2**40)) and out(seed=-1).isfinite().all()
    before = torch.get_rng_state()
    attend(q, q, q, Full(), dropout_p=0.0)
    out(seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    out()
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_row_without_dropout_says_so():
    """And is not chosen."""
    q = torch.randn(1, 8, 2, 4)
    with pytest.raises(ValueError, match="backend='sdpa' cannot(?s:.*)dropout is not supported"):
        attend(q, q, q, Full(), dropout_p=0.1, backend="sdpa")
    assert explain(Full(), (1, 8, 2, 4), dropout=True).backend == DROPPING[0]
    state: AttentionState = attend(q, q, q, Full(), dropout_p=0.1, seed=1)
    assert torch.equal(state.out, attend(q, q, q, Full(), dropout_p=0.1, seed=1, backend=DROPPING[0]).out)


@pytest.mark.parametrize(("seed", "fits"), [(-(2**63), True), (2**63 - 1, True), (-(2**63) - 1, False), (2**63, False)])
def test_a_seed_has_64_bits(seed: int, fits: bool):
    """With a sign: both ends are seeds, and what lies beyond is refused."""
    if fits:
        assert int(as_seed(seed)) == seed
    else:
        with pytest.raises(ValueError, match="seed must fit 64 bits"):
            as_seed(seed)
