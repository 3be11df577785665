"""Score terms: softcap, Alibi and relative bias, by positions, on every row, under the memo, tracing and transforms."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap

from longattn.kernels import (
    Alibi,
    RelativeBias,
    Softcap,
    attend,
    backends,
    explain,
    prepare,
    prepared_stats,
    reference_attention,
)
from longattn.kernels.dispatch.table import row
from longattn.kernels.terms import at_distances, by_distance_of, tensors_in
from longattn.kernels.testing import TERMS, Case, check_backend, random_terms, run_case
from longattn.patterncache import Dilated, Full, Rectangle, Span, Window

LONGNET = Dilated((8, 16), (1, 2), causal=True)
ALL = TERMS[-1]
TAKES_ALL = [name for name in backends("cpu") if row(name).capability.softcap]
TORCH_SAYS = pytest.mark.filterwarnings(
    "ignore:<class .torch.autograd.function.Function.> should not be instantiated:DeprecationWarning"
)


def qkv(n: int = 19, heads: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, n, h, 8, generator=generator).to(dtype) for h in (heads, heads // 2, heads // 2)]


def oracle(q: Tensor, k: Tensor, v: Tensor, terms: Any, pattern: Any = LONGNET) -> Tensor:
    counts = pattern.counts(Rectangle(q.shape[2], Span(k.shape[1] - q.shape[1], q.shape[1]), Span(0, k.shape[1])))
    return reference_attention(q, k, v, counts, score_terms=terms).out


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("count", "most"), [(32, 128), (8, 20), (5, 9), (4, 2)])
def test_buckets_are_the_papers(bidirectional: bool, count: int, most: int):
    """One distance to a bucket up to half, then logarithmic steps up to the largest distance, and one bucket for all beyond."""
    if most <= count // (4 if bidirectional else 2):
        pytest.skip("no step is logarithmic")
    term = RelativeBias(torch.zeros(count, 1), bidirectional, most)
    side = count // 2 if bidirectional else count
    exact = side // 2

    def expected(distance: int) -> set[int]:
        far = abs(distance) if bidirectional else max(0, -distance)
        own = side if bidirectional and distance > 0 else 0
        if far < exact:
            return {own + far}
        step = math.log(far / exact) / math.log(most / exact) * (side - exact)
        # Where a step is a whole number, float32 may say the one before.
        return {own + min(exact + int(step + nudge), side - 1) for nudge in (-1e-5, 0, 1e-5)}

    distances = torch.arange(-3 * most, 3 * most + 1)
    for distance, bucket in zip(distances.tolist(), term.buckets(distances).tolist(), strict=True):
        assert bucket in expected(distance), distance


def test_by_distance_says_what_the_terms_say():
    """At every distance, also beyond the largest; a table and a slope add up."""
    alibi, relative = Alibi(torch.rand(3)), RelativeBias(torch.randn(8, 3), max_distance=11)
    distance = torch.tensor([[-(2**40), -30, -11, -4, 0], [1, 5, 11, 12, 2**40]])
    linear = -alibi.slopes.double()[:, None, None] * distance.abs()
    table = relative.table.double()[relative.buckets(distance)].movedim(-1, 0)
    for terms, expected in (((alibi,), linear), ((relative,), table), ((relative, alibi), linear + table)):
        found = by_distance_of(terms, torch.float64)
        assert found is not None and found.shape[1] <= 2 + 2 * 11
        torch.testing.assert_close(at_distances(found, distance), expected)


@pytest.mark.parametrize("name", backends("cpu"))
@pytest.mark.parametrize("terms", TERMS[1:], ids="+".join)
def test_positions_are_those_of_spans(name: str, terms: tuple[str, ...]):
    """Shards with steps, far from 0, and two spans; lists; a negative scale; everything else at once."""
    q_spans, k_spans = (Span(2**33, 7, 3), Span(9, 5)), (Span(0, 20), Span(2**33 + 1, 9, 2))
    far = Case(Full(causal=True), (12, 29), group=2, terms=terms, q_spans=q_spans, k_spans=k_spans)
    if name != "triton" and "alibi" not in terms:
        check_backend(name, far)
    near = Case(LONGNET, (12, 29), group=2, terms=terms, q_spans=(Span(40, 12, 2),), k_spans=(Span(3, 29, 2),))
    check_backend(name, near)
    check_backend(name, Case(Window(9) & LONGNET, (30, 30), terms=terms, softmax_scale=-0.7, mask="+qk", padding=True))


@pytest.mark.parametrize("name", backends("cpu"))
def test_more_keys_than_a_tile(name: str):
    """Rows of the tiled rows, tiles of the native one, and strips of torch's."""
    check_backend(name, Case(Window(300), (310, 530), batch=1, group=2, terms=ALL, seed=3))


@pytest.mark.parametrize("name", [n for n in backends("cpu") if n != "triton"])
def test_scores_far_from_zero_keep_their_digits(name: str):
    """A slope over a billion positions: lse has none left in float32, weights and gradients are right."""
    case = Case(Full(causal=True), (3, 8), terms=("alibi",), q_spans=(Span(10**9, 3),), k_spans=(Span(0, 8),))
    data = case.tensors()
    assert float(run_case(case, data, backend=name).lse.abs().max()) > 2**20
    expected = reference_attention(
        data.q,
        data.k,
        data.v,
        case.counts(),
        score_terms=data.terms,
        distance=case.positions()[1] - case.positions()[0][:, None],
    )
    torch.testing.assert_close(run_case(case, data, backend=name).out.double(), expected.out, atol=1e-5, rtol=1e-5)


def test_a_row_says_what_it_cannot_do():
    """By name, and in `explain`, without data."""
    q, k, v = qkv()
    with pytest.raises(ValueError, match="score_terms with a Softcap is not supported"):
        attend(q, k, v, LONGNET, score_terms=Softcap(3.0), backend="sdpa")
    slopes = torch.rand(4, requires_grad=True)
    with pytest.raises(ValueError, match="gradient of an Alibi's slopes or a RelativeBias's table is not supported"):
        attend(q, k, v, LONGNET, score_terms=Alibi(slopes), backend="sdpa")
    said = str(explain(LONGNET, q.shape, k.shape, score_terms=(Softcap(3.0), Alibi(slopes)), requires_grad=True))
    assert "softcap by_distance by_distance_grad" in said
    on_gpu = explain(
        LONGNET, q.shape, score_terms=Alibi(slopes), device="cuda", architecture="sm_90", requires_grad=True
    )
    assert on_gpu.backend == "gather"


def test_the_memo_knows_terms():
    """A second call with other terms is another call; with other numbers in them, the same one, with these numbers."""
    tensors = qkv()
    relative = random_terms(("relative",), 4, 1)[0]
    assert isinstance(relative, RelativeBias)
    calls = [(), Softcap(1.0), Softcap(0.3), Alibi(torch.rand(4)), Alibi(torch.rand(4)), relative]
    calls += [RelativeBias(relative.table, False, 9), RelativeBias(relative.table, True, 30), (Softcap(0.3), relative)]
    calls += [RelativeBias(relative.table * 2), [relative, Alibi(torch.rand(4))]]
    for _ in range(2):
        for terms in calls:
            found = attend(*tensors, LONGNET, score_terms=terms).out
            torch.testing.assert_close(found.double(), oracle(*tensors, terms), atol=2e-5, rtol=2e-5)
    before = prepared_stats()
    found = attend(*tensors, LONGNET, score_terms=Alibi(torch.rand(4))).out
    after = prepared_stats()
    assert (after["hits"], after["misses"]) == (before["hits"] + 1, before["misses"])  # type: ignore[operator]
    leaves = [x.clone().requires_grad_() for x in tensors]
    terms = (Softcap(0.3), relative)
    grads = torch.autograd.grad(attend(*leaves, LONGNET, score_terms=terms).out.square().sum(), leaves)
    expected = torch.autograd.grad(oracle(*leaves, terms).square().sum(), leaves)
    torch.testing.assert_close(grads, expected, atol=1e-4, rtol=1e-4)


def test_a_prepared_call_keeps_its_terms():
    """What their tensors hold is read at each call; a gradient of theirs cannot be prepared."""
    tensors, slopes = qkv(), torch.rand(4)
    terms = (Softcap(0.5), Alibi(slopes))
    step = prepare(LONGNET, *tensors, score_terms=terms)
    for _ in range(2):
        torch.testing.assert_close(step(*tensors).out.double(), oracle(*tensors, terms), atol=2e-5, rtol=2e-5)
        slopes *= 3
    with pytest.raises(ValueError, match="score_terms must hold tensors that require no grad"):
        prepare(LONGNET, *tensors, score_terms=Alibi(torch.rand(4, requires_grad=True)))


def test_gradients_reach_half_precision_tables_and_products_of_parameters():
    """Terms are made in float32; what they are made of has its gradient in its own dtype."""
    tensors = qkv(dtype=torch.float64)
    table, factor = torch.randn(8, 4).bfloat16().requires_grad_(), torch.rand((), requires_grad=True)
    made: list[tuple[Any, ...]] = []
    for compute in (
        lambda terms: attend(*tensors, LONGNET, score_terms=terms).out,
        lambda terms: oracle(*tensors, terms),
    ):
        terms = (RelativeBias(table * 2), Alibi(factor.double() * torch.arange(1.0, 5.0)))
        made.append(torch.autograd.grad(compute(terms).square().sum(), [table, factor]))
    assert made[0][0].dtype == torch.bfloat16
    torch.testing.assert_close(*made)


def everything(q: Tensor, slopes: Tensor, table: Tensor) -> Tensor:
    terms = (Softcap(2.0), Alibi(slopes), RelativeBias(table, max_distance=20))
    return attend(q, q, q, LONGNET, score_terms=terms).out


@TORCH_SAYS
def test_terms_in_one_graph_for_any_length():
    """Made inside, with their gradients; two graphs serve all lengths."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(everything, backend=counter, fullgraph=True)
    for n in (17, 24, 33, 40):
        leaves = [torch.randn(2, n, 2, 4), torch.rand(2), torch.randn(8, 2)]
        grads = []
        for function in (everything, compiled):
            own = [x.clone().requires_grad_() for x in leaves]
            out = function(*own)
            grads.append((out, *torch.autograd.grad(out.square().sum(), own)))
        torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)
    assert counter.frame_count <= 2


MAPPED: dict[str, tuple[Callable[..., Any], tuple[int | None, ...]]] = {
    "queries": (everything, (0, None, None)),
    "slopes": (everything, (None, 0, None)),
    "all": (everything, (0, 0, 0)),
    "gradients": (grad(lambda *x: everything(*x).square().sum(), argnums=(0, 1, 2)), (0, None, None)),
    "all gradients": (grad(lambda *x: everything(*x).square().sum(), argnums=(1, 2)), (0, 0, 0)),
}


@pytest.mark.parametrize("kind", MAPPED)
def test_vmap_is_a_loop(kind: str):
    """Whichever of the tensors is mapped."""
    function, dims = MAPPED[kind]
    leaves = [torch.randn(3, 2, 13, 2, 4), torch.rand(3, 2), torch.randn(3, 8, 2)]
    inputs = [x if dim == 0 else x[0] for x, dim in zip(leaves, dims, strict=True)]
    found = vmap(function, in_dims=dims)(*inputs)
    each = [function(*(x[n] if dim == 0 else x for x, dim in zip(inputs, dims, strict=True))) for n in range(3)]
    expected = torch.stack(each) if isinstance(each[0], Tensor) else tuple(map(torch.stack, zip(*each, strict=True)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Softcap(0.0), ValueError, "value must be a finite number > 0, got 0.0"),
        (lambda: Softcap(math.inf), ValueError, "value must be a finite number > 0, got inf"),
        (lambda: Softcap(True), TypeError, "value must be a finite number > 0, got True"),
        (lambda: Alibi([0.5]), TypeError, "slopes must be a floating torch.Tensor"),  # type: ignore[arg-type]
        (lambda: Alibi(torch.ones(2, dtype=torch.int64)), TypeError, "slopes must be a floating torch.Tensor"),
        (lambda: Alibi(torch.ones(2, 2)), ValueError, r"slopes must have shape \(heads,\), got \(2, 2\)"),
        (lambda: RelativeBias(torch.ones(3, 2)), ValueError, "table must have at least 4 buckets, got 3"),
        (lambda: RelativeBias(torch.ones(32, 2), max_distance=8), ValueError, "max_distance must be an integer over 8"),
        (lambda: RelativeBias(torch.ones(32, 2), 1), TypeError, "bidirectional must be True or False"),  # type: ignore[arg-type]
    ],
)
def test_bad_terms(make: Callable[[], Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("terms", "error", "words"),
    [
        (0.5, TypeError, "score_terms must be None, a Softcap, Alibi or RelativeBias, or a tuple of those, got 0.5"),
        ((Softcap(1.0), Softcap(2.0)), ValueError, "score_terms must have each kind of term once, got 2 of Softcap"),
        (Alibi(torch.rand(3)), ValueError, "score_terms must have slopes for the heads of q, 4, got"),
        (RelativeBias(torch.rand(4, 8)), ValueError, "score_terms must have a table for the heads of q, 4, got"),
        (Alibi(torch.rand(4, device="meta")), ValueError, "score_terms must be on the device of q, cpu, got meta"),
    ],
)
def test_terms_that_do_not_fit(terms: Any, error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        attend(*qkv(), LONGNET, score_terms=terms)


def test_the_tensors_of_terms_are_found():
    """In order, and none of a cap."""
    slopes, table = torch.rand(2), torch.rand(4, 2)
    assert [id(x) for x in tensors_in((RelativeBias(table), Softcap(1.0), Alibi(slopes)))] == [id(table), id(slopes)]
