"""Prepared calls: the second call of a signature is looked up, everything that matters is part of the signature, and nothing else changes."""

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from longattn.kernels import (
    Alibi,
    Environment,
    Softcap,
    attend,
    fused_attention,
    prepare,
    prepared_stats,
    reference_attention,
)
from longattn.kernels.dispatch import prepared as prepared_module
from longattn.kernels.dispatch.memo import Memo
from longattn.kernels.dispatch.prepared import LENGTHS, PREPARED
from longattn.kernels.dispatch.table import RowFailure, row
from longattn.patterncache import BlockSparse, Dilated, Full, PatternCache, Rectangle, Span, Window

PATTERN = Dilated((4, 8), (1, 2), causal=True)


def qkv(n: int = 8, heads: int = 2, dim: int = 8, seed: int = 0, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Three contiguous tensors."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, n, heads, dim, generator=generator).to(**options) for _ in range(3))
    return q, k, v


def count_selections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the table is asked from now on."""
    asked: list[Any] = []
    select = prepared_module.select

    def watch(problem: Any, *rest: Any) -> Any:
        asked.append(problem)
        return select(problem, *rest)

    monkeypatch.setattr(prepared_module, "select", watch)
    return asked


def oracle(q: Tensor, k: Tensor, v: Tensor, pattern: Any = PATTERN) -> Tensor:
    """In float64."""
    counts = pattern.counts(Rectangle(q.shape[2], Span(0, q.shape[1]), Span(0, k.shape[1])))
    return reference_attention(q, k, v, torch.from_numpy(counts)).out


def test_a_second_call_of_a_signature_asks_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the table nor a check is asked, and the numbers are those of the new tensors."""
    attend(*qkv(), PATTERN)
    asked = count_selections(monkeypatch)
    monkeypatch.setattr("longattn.kernels.entry.check_qkv", lambda *_: pytest.fail("checked again"))
    other = qkv(seed=1)
    torch.testing.assert_close(attend(*other, PATTERN).out, oracle(*other).float())
    assert asked == []


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], dict[str, Any]]] = {
    "length": lambda _: {"tensors": qkv(9)},
    "v's head_dim": lambda _: {"tensors": (*qkv()[:2], qkv(dim=5)[2])},
    "dtype": lambda _: {"tensors": qkv(dtype=torch.bfloat16)},
    "strides": lambda _: {"tensors": tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv())},
    "gradients": lambda _: {"tensors": tuple(x.requires_grad_() for x in qkv())},
    "pattern": lambda _: {"pattern": Window(3)},
    "causal": lambda _: {"is_causal": False},
    "scale": lambda _: {"softmax_scale": 0.5},
    "mask": lambda _: {"attention_mask": torch.ones(8, 8, dtype=torch.bool)},
    "padding": lambda _: {"key_padding_mask": torch.zeros(1, 8, dtype=torch.bool)},
    "backend": lambda _: {"backend": "gather"},
    "deterministic": lambda _: {"deterministic": True},
    "out dtype": lambda _: {"out_dtype": torch.bfloat16},
    "dropout": lambda _: {"dropout_p": 0.5, "seed": 3},
    "native": lambda patch: patch.setenv("LONGATTN_NATIVE", "0") or {},
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_part_of_a_signature_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that differs in one thing from an earlier one is prepared by itself."""
    attend(*qkv(), PATTERN)
    asked = count_selections(monkeypatch)
    options = CHANGES[name](monkeypatch)
    tensors, pattern = options.pop("tensors", qkv()), options.pop("pattern", PATTERN)
    attend(*tensors, pattern, **options)
    assert len(asked) == 1


GROWING = (Full(), Full(causal=True), Window(7, causal=True, sinks=2), Dilated((4, 8, 16), (1, 2, 4), causal=True))


def cache_of(n: int, contiguous: bool, kv_heads: int = 2) -> tuple[Tensor, Tensor]:
    """The first n slots of two caches of 64, or tensors of that length alone, whose strides grow with it."""
    generator = torch.Generator().manual_seed(5)
    k, v = (torch.randn(2, 64, kv_heads, 8, generator=generator)[:, :n] for _ in range(2))
    return (k.contiguous(), v.contiguous()) if contiguous else (k, v)


def last_queries(n: int, nq: int, q: Tensor, k: Tensor, v: Tensor, pattern: Any) -> Tensor:
    """In float64, of the last nq of n positions."""
    counts = pattern.counts(Rectangle(q.shape[2], Span(n - nq, nq), Span(0, n)))
    return reference_attention(q, k, v, torch.from_numpy(counts)).out.float()


@pytest.mark.parametrize("pattern", GROWING, ids=lambda pattern: pattern.canonical())
@pytest.mark.parametrize("backend", [None, "gather", "tiled"])
@pytest.mark.parametrize(("nq", "contiguous"), [(1, True), (1, False), (3, False)])
def test_a_cache_that_grows_is_checked_once(
    monkeypatch: pytest.MonkeyPatch, pattern: Any, backend: str | None, nq: int, contiguous: bool
) -> None:
    """Later lengths follow from a prepared one: numbers are the oracle's, plans are asked for once a call, and no argument is checked again."""
    cache = PatternCache()
    environment = Environment(cache)
    q = torch.randn(2, nq, 4, 8, generator=torch.Generator().manual_seed(1))
    attend(q, *cache_of(nq, contiguous), pattern, backend=backend, environment=environment)
    monkeypatch.setattr("longattn.kernels.entry.check_qkv", lambda *_: pytest.fail("checked again"))
    for n in (*range(nq + 1, nq + 30), 50, 20):
        k, v = cache_of(n, contiguous)
        state = attend(q, k, v, pattern, backend=backend, environment=environment)
        torch.testing.assert_close(state.out, last_queries(n, nq, q, k, v, pattern), atol=1e-5, rtol=1e-5)
    stats = cache.get_stats()
    # The second call of 20 keys is a hit.
    assert (stats["hits"], stats["misses"]) == (1, 31)


def test_a_length_has_the_row_that_it_would_have_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is asked for each, with the problem that it would be asked with, of listed rows too."""
    asked = count_selections(monkeypatch)
    q, pattern = torch.randn(1, 1, 4, 8), BlockSparse(4, [[True, False, True, False, True, True]] * 6)
    lengths = (5, 6, 7, 14, 20, 21)
    for n in lengths:
        attend(q, *(x[:1] for x in cache_of(n, False)), pattern)
    grown = asked.copy()
    asked.clear()
    for n in lengths:
        LENGTHS.clear()
        PREPARED.clear()
        attend(q, *(x[:1] for x in cache_of(n, False)), pattern)
    assert grown == asked and {problem.listed for problem in asked} == {False, True}


@pytest.mark.parametrize(
    ("lengths", "nq", "match"),
    [((9, 8), 1, "v must have the length"), ((2, 2), 3, "queries outnumber keys")],
)
def test_lengths_that_do_not_fit_are_refused(lengths: tuple[int, int], nq: int, match: str) -> None:
    """Also after calls that they differ from in lengths alone."""
    q = torch.randn(2, nq, 4, 8)
    for n in (10, 11):
        attend(q, *cache_of(n, False), PATTERN)
    with pytest.raises(ValueError, match=match):
        attend(q, cache_of(lengths[0], False)[0], cache_of(lengths[1], False)[1], PATTERN)


def test_masks_terms_gradients_and_dropout_grow_too() -> None:
    """With masks each length is checked; the others are the same calls as those of their length alone."""
    q = torch.randn(2, 1, 4, 8)
    options: list[dict[str, Any]] = [
        {"score_terms": (Softcap(2.0), Alibi(torch.rand(4)))}, {"dropout_p": 0.5, "seed": 3}, {"softmax_scale": -0.3}, {"is_causal": False}
    ]  # fmt: skip
    for n in range(5, 12):
        k, v = cache_of(n, True)
        masks = {"key_padding_mask": torch.arange(n).expand(2, n) < 2}, {"attention_mask": torch.rand(1, n) > 0.2}
        for given in (*options, *masks):
            grown = attend(q, k, v, PATTERN, **given)
            alone = attend(q, k, v, PATTERN, **given, backend="gather")
            torch.testing.assert_close(grown.out, alone.out, atol=1e-5, rtol=1e-5)
        tensors = [x.clone().requires_grad_() for x in (q, k, v)]
        grads = torch.autograd.grad(attend(*tensors, PATTERN).out.sum(), tensors)
        expected = torch.autograd.grad(attend(*tensors, PATTERN, backend="gather").out.sum(), tensors)
        for grad, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, other, atol=1e-5, rtol=1e-5)


def test_threads_and_the_deterministic_flag_are_part_of_a_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are read at every call."""
    threads = torch.get_num_threads()
    attend(*qkv(), PATTERN)
    asked = count_selections(monkeypatch)
    try:
        torch.set_num_threads(threads + 1)
        attend(*qkv(), PATTERN)
    finally:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        attend(*qkv(), PATTERN)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [problem.deterministic for problem in asked] == [False, True]


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"is_causal": True}, {"is_causal": 1}),
        ({"softmax_scale": 1.0}, {"softmax_scale": True}),
        ({"dropout_p": 0.0}, {"dropout_p": False}),
        ({"deterministic": False}, {"deterministic": 0}),
        ({}, {"backend": ["native"]}),
        ({}, {"environment": "mine"}),
        ({}, {"out_dtype": "float32"}),
    ],
)
def test_a_bad_value_that_equals_a_good_one_is_refused(good: dict[str, Any], bad: dict[str, Any]) -> None:
    """1 == True, but a call with 1 is no call that was checked before."""
    attend(*qkv(), PATTERN, **good)
    with pytest.raises(TypeError, match=next(iter(bad))):
        attend(*qkv(), PATTERN, **bad)


def test_the_cache_is_asked_once_a_call_and_a_reset_is_seen() -> None:
    """A prepared call counts one hit of the pattern cache; a plan that the cache no longer holds is built again."""
    cache = PatternCache()
    environment = Environment(cache)
    for _ in range(3):
        attend(*qkv(), PATTERN, environment=environment)
    stats = cache.get_stats()
    assert (stats["hits"], stats["misses"]) == (2, 1)
    cache.clear()
    torch.testing.assert_close(attend(*qkv(), PATTERN, environment=environment).out, oracle(*qkv()).float())
    assert cache.get_stats()["size"] == 1


def test_the_memo_keeps_no_plan_alive() -> None:
    """Only the pattern cache decides how long a plan lives."""
    cache = PatternCache()
    environment = Environment(cache)
    attend(*qkv(), PATTERN, environment=environment)
    plan = weakref.ref(next(iter(cache._cache.values())))
    cache.clear()
    gc.collect()
    assert plan() is None


def test_modes_and_profilers_see_the_op() -> None:
    """An eager call goes straight to the row; where somebody looks on, it goes through the op."""
    attend(*qkv(), PATTERN)
    with torch.profiler.profile(acc_events=True) as seen:
        attend(*qkv(), PATTERN)
    assert any(event.key == "longattn::attend" for event in seen.key_averages())


def test_flags_that_only_the_dispatcher_resolves_are_no_plain_tensors() -> None:
    """A lazily negated view is computed with its numbers."""
    q, k, v = qkv()
    negated = torch.complex(torch.zeros_like(q), -q).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(negated, q)
    attend(q, k, v, PATTERN)
    torch.testing.assert_close(attend(negated, k, v, PATTERN).out, oracle(q, k, v).float())


def test_a_tensor_whose_memory_was_freed_is_refused() -> None:
    """The address is checked at every call."""
    attend(*qkv(), PATTERN)
    q, k, v = qkv()
    k.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="memory"):
        attend(q, k, v, PATTERN)


def test_gradients_of_a_prepared_call_are_the_oracles() -> None:
    """Twice: the first backward and the bound one; with a gradient of lse beside that of out."""
    for seed in (0, 1, 2):
        tensors = tuple(x.requires_grad_() for x in qkv(seed=seed))
        wide = tuple(x.detach().double().requires_grad_() for x in tensors)
        state = attend(*tensors, PATTERN)
        counts = torch.from_numpy(PATTERN.counts(Rectangle(2, Span(0, 8), Span(0, 8))))
        expected = reference_attention(*wide, counts)
        weight = torch.randn(state.out.shape, generator=torch.Generator().manual_seed(seed))
        got = torch.autograd.grad((state.out * weight).sum() + state.lse.sum(), tensors)
        wanted = torch.autograd.grad((expected.out * weight).sum() + expected.lse.sum(), wide)
        for mine, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, theirs.float(), atol=1e-5, rtol=1e-5)


def test_second_derivatives_on_the_direct_way() -> None:
    """The first call of a signature and the next have the same; a row without them says so."""
    q, k, v = (x.requires_grad_() for x in qkv(dtype=torch.float64))
    found = []
    for _ in range(2):
        (dq,) = torch.autograd.grad(attend(q, k, v, PATTERN).out.square().sum(), q, create_graph=True)
        found += torch.autograd.grad(dq.sum(), (q, k, v))
    for first, second in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(first, second)
    q, k, v = (x.requires_grad_() for x in qkv())
    (dq,) = torch.autograd.grad(attend(q, k, v, PATTERN, backend="native").out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not supported by the row native"):
        dq.sum().backward()


def test_dropout_draws_anew_at_each_prepared_call() -> None:
    """The seed is data, not part of the signature."""
    q, k, v = qkv(64)
    first, second = (attend(q, k, v, Full(), dropout_p=0.5).out for _ in range(2))
    same = [attend(q, k, v, Full(), dropout_p=0.5, seed=7).out for _ in range(2)]
    assert not torch.equal(first, second)
    assert torch.equal(*same)


def test_a_row_whose_compiler_fails_in_a_prepared_call_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next row serves that very call."""
    q, k, v = qkv(dtype=torch.float64)
    attend(q, k, v, PATTERN)
    (call,) = {id(c): c for c in PREPARED._values.values()}.values()
    failed: list[int] = []

    def fail(_: Any) -> Any:
        failed.append(1)
        raise RowFailure("no compiler")

    real = call.row
    monkeypatch.setattr(call, "row", type(real)(real.name, real.capability, fail, real.backward))
    torch.testing.assert_close(attend(q, k, v, PATTERN).out, oracle(q, k, v))
    assert failed == [1]


def test_threads_share_prepared_calls() -> None:
    """Eight threads over three signatures: every result is right."""
    wrong: list[str] = []
    expected = {n: oracle(*qkv(n)).float() for n in (8, 12, 16)}

    def work() -> None:
        for turn in range(60):
            n = (8, 12, 16)[turn % 3]
            out = attend(*qkv(n), PATTERN).out
            if not torch.allclose(out, expected[n], atol=1e-5):
                wrong.append(f"length {n}")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class Kept:
    """A value of a memo."""

    def __init__(self) -> None:
        self.used = False


def test_a_full_memo_evicts_what_nobody_asked_for() -> None:
    """And counts it."""
    memo: Memo[Kept] = Memo(2)
    memo.keep("a", Kept())
    memo.keep("b", Kept())
    assert memo.find("a") is not None
    memo.keep("c", Kept())
    assert memo.find("b") is None
    assert memo.find("a") is not None
    stats = memo.get_stats()
    assert (stats["evictions"], stats["size"], stats["hits"], stats["misses"]) == (1, 2, 2, 1)


def test_prepared_stats_count_a_second_call_as_a_hit() -> None:
    """Public statistics of the memo."""
    attend(*qkv(), PATTERN)
    before = prepared_stats()["hits"]
    attend(*qkv(), PATTERN)
    assert prepared_stats()["hits"] == before + 1


def test_prepare_gives_what_attend_gives_without_computing_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed before the first call."""
    ran: list[int] = []
    monkeypatch.setattr("longattn.kernels.dispatch.prepared.PreparedCall.forward", lambda *_: ran.append(1))
    call = prepare(PATTERN, *qkv(), backend="gather")
    assert (ran, call.backend) == ([], row("gather").name)
    monkeypatch.undo()
    torch.testing.assert_close(call(*qkv()).out, oracle(*qkv()).float())


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        (qkv(9), r"q must have the shape that was prepared, \(1, 8, 2, 8\), got \(1, 9, 2, 8\)"),
        ((*qkv()[:2], qkv(dtype=torch.float64)[2]), "v must have the dtype"),
        ((qkv()[0].transpose(1, 2).contiguous().transpose(1, 2), *qkv()[1:]), "q must have the strides"),
        (tuple(x.requires_grad_() for x in qkv()), "gradients"),
        ((1, 2, 3), "plain torch.Tensors, got int"),
    ],
)
def test_a_prepared_call_refuses_another_signature_by_name(tensors: Any, text: str) -> None:
    """The message says what was prepared and what came."""
    call = prepare(PATTERN, *qkv())
    with pytest.raises((ValueError, TypeError), match=text):
        call(*tensors)


def test_a_prepared_call_takes_masks_as_prepared() -> None:
    """One without, or another, is refused."""
    padding = torch.zeros(1, 8, dtype=torch.bool)
    padding[:, 6:] = True
    call = prepare(PATTERN, *qkv(), key_padding_mask=padding)
    expected = attend(*qkv(), PATTERN, key_padding_mask=padding).out
    torch.testing.assert_close(call(*qkv(), key_padding_mask=padding).out, expected)
    with pytest.raises(ValueError, match="key_padding_mask must be as prepared"):
        call(*qkv())


def test_a_prepared_call_under_vmap_is_an_ordinary_one() -> None:
    """It goes through the op."""
    call = prepare(PATTERN, *qkv())
    q, k, v = (torch.stack([x, x + 1]) for x in qkv())
    mapped = torch.vmap(lambda q, k, v: call(q, k, v).out)(q, k, v)
    torch.testing.assert_close(mapped[0], call(*qkv()).out)


def test_a_prepared_call_survives_a_reset_cache() -> None:
    """It finds the new plan, and keeps it."""
    cache = PatternCache()
    call = prepare(PATTERN, *qkv(), environment=Environment(cache))
    for _ in range(3):
        cache.clear()
        torch.testing.assert_close(call(*qkv()).out, oracle(*qkv()).float())


def test_fused_attention_finds_its_prepared_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its patterns are made once."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in qkv())
    fused_attention(q, k, v, causal=True)
    asked = count_selections(monkeypatch)
    fused_attention(q, k, v, causal=True)
    assert asked == []
