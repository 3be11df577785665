"""What `attend` means: lengths, positions, padding, heads, priors, and what it never does to its inputs."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longattn.kernels import AttentionState, attend, backends, merge, reference_attention
from longattn.kernels.testing import Case, assert_near, check_backend
from longattn.patterncache import Dilated, Full, Pattern, Span, Window, get_global_pattern_cache
from longattn.patterncache.testing import patterns

LONGNET = Dilated((8, 16), (1, 2), causal=True)
ROWS = pytest.mark.parametrize("name", backends("cpu"))


def close(got: AttentionState, expected: AttentionState) -> None:
    assert_near(got.out, expected.out, 2e-5, 2e-5, "out")
    assert_near(got.lse, expected.lse, 2e-5, 2e-5, "lse")


def gradients(state: AttentionState, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of a weighted sum of out and of lse, where it is finite."""
    weights = torch.linspace(-1, 1, state.out.numel(), dtype=state.out.dtype).view_as(state.out)
    root = (state.out * weights).sum() + state.lse.masked_fill(state.lse == -torch.inf, 0).sum()
    return torch.autograd.grad(root, inputs)


@ROWS
def test_gqa_is_repeated_kv_heads(name: str):
    """Values, and gradients: those of a kv head are the sum over the query heads that share it."""
    data = Case(LONGNET, (21, 21), kv_heads=2, group=3).tensors()
    q, k, v = (x.requires_grad_() for x in (data.q, data.k, data.v))
    grouped = attend(q, k, v, LONGNET, backend=name)
    repeated = attend(q, *(x.repeat_interleave(3, 2) for x in (k, v)), LONGNET, backend=name)
    close(grouped, repeated)
    for got, expected in zip(gradients(grouped, q, k, v), gradients(repeated, q, k, v), strict=True):
        assert_near(got, expected, 1e-4, 1e-4, "gradient")


@ROWS
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("pattern", [Full(), LONGNET, Window(4)], ids=str)
def test_what_padding_holds_reaches_nothing(name: str, poison: float, pattern: Pattern):
    """Same bits of out, lse and gradients as with zeros there, and zero gradients at the padding itself."""
    data = Case(pattern, (16, 16)).tensors()
    padding = torch.zeros(2, 16, dtype=torch.bool)
    padding[0, 9:], padding[1, :3] = True, True
    results = []
    for fill in (0.0, poison):
        k, v = (x.masked_fill(padding[:, :, None, None], fill).requires_grad_() for x in (data.k, data.v))
        q = data.q.clone().requires_grad_()
        state = attend(q, k, v, pattern, key_padding_mask=padding, backend=name)
        results.append((state.out, state.lse, *gradients(state, q, k, v)))
    assert all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(*results, strict=True))
    assert all(not grad[padding].any() for grad in results[1][3:])


@ROWS
def test_rows_that_see_nothing(name: str):
    """Zero out, lse -inf, zero gradients: by the pattern, by the mask, by padding."""
    data = Case(Full(), (6, 6), batch=1).tensors()
    q, k, v = (x.requires_grad_() for x in (data.q, data.k, data.v))
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[2] = False
    everything = torch.ones(1, 6, dtype=torch.bool)
    for pattern, options, blind in (
        (Dilated((6,), (2,)), {"heads": Span(0, 2), "num_heads": 2}, None),
        (Full(), {"attention_mask": mask}, [2]),
        (Full(causal=True), {"q_spans": Span(0, 6), "k_spans": Span(3, 6)}, [0, 1, 2]),
        (Full(causal=True), {"key_padding_mask": everything}, list(range(6))),
    ):
        state = attend(q, k, v, pattern, backend=name, **options)
        unseen = state.lse == -torch.inf
        assert unseen.any() and not state.out[unseen].any()
        assert blind is None or (
            unseen.all(-1)[0].nonzero().flatten().tolist() == blind and unseen.any(-1).sum() == len(blind)
        )
        dq, dk, dv = gradients(state, q, k, v)
        assert not dq[unseen].any() and all(g.isfinite().all() for g in (dq, dk, dv))


@ROWS
def test_queries_are_the_last_positions(name: str):
    """Nq < Nk: the tail of the square, so causal is bottom-right; spans say otherwise."""
    data = Case(LONGNET, (24, 24)).tensors()
    whole = attend(data.q, data.k, data.v, LONGNET, backend=name)
    tail = attend(data.q[:, -7:], data.k, data.v, LONGNET, backend=name)
    close(tail, AttentionState(whole.out[:, -7:], whole.lse[:, -7:]))
    middle = attend(data.q[:, 5:12], data.k, data.v, LONGNET, q_spans=Span(5, 7), backend=name)
    close(middle, AttentionState(whole.out[:, 5:12], whole.lse[:, 5:12]))
    striped = attend(data.q[:, 1::4], data.k, data.v, LONGNET, q_spans=(Span(1, 6, 4),), backend=name)
    close(striped, AttentionState(whole.out[:, 1::4], whole.lse[:, 1::4]))


@ROWS
@pytest.mark.parametrize(
    ("pattern", "is_causal"), [(LONGNET, None), (Window(3), None), (Full(causal=True), None), (Full(), True)], ids=str
)
def test_more_queries_than_keys_need_positions(name: str, pattern: Pattern, is_causal: bool | None):
    q, k = torch.randn(1, 9, 2, 4), torch.randn(1, 5, 2, 4)
    with pytest.raises(ValueError, match=r"q_spans.*must be given.*Nq=9, Nk=5"):
        attend(q, k, k, pattern, is_causal=is_causal, backend=name)
    assert attend(q, k, k, pattern, is_causal=is_causal, q_spans=Span(0, 9), backend=name).out.shape == q.shape


@ROWS
def test_cross_attention_without_positions_is_free(name: str):
    """Full sees all, whatever the lengths; is_causal=False makes Full(causal=True) such."""
    check_backend(name, Case(Full(), (9, 5)))
    check_backend(name, Case(Full(causal=True), (9, 5), is_causal=False))


@ROWS
@given(pattern=patterns(), cut=st.integers(0, 30), step=st.integers(1, 3))
def test_keys_in_two_parts_are_keys_at_once(name: str, pattern: Pattern, cut: int, step: int):
    """Segments cut by the border of a shard, or striped over shards: by prior, by merge, in either order."""
    data = Case(pattern, (30, 30), batch=1).tensors()
    whole = attend(data.q, data.k, data.v, pattern, backend=name)
    spans = (
        [Span(first, (29 - first) // step + 1, step) for first in range(step)]
        if step > 1
        else [Span(0, cut), Span(cut, 30 - cut)]
    )
    parts = [(data.k[:, s.positions()], data.v[:, s.positions()], s) for s in spans]
    for order in (parts, parts[::-1]):
        prior, merged = None, AttentionState.empty(data.q)
        for k, v, span in order:
            options = {"q_spans": Span(0, 30), "k_spans": span, "backend": name}
            prior = attend(data.q, k, v, pattern, prior=prior, **options)
            merged = merge(merged, attend(data.q, k, v, pattern, **options))
        assert prior is not None
        close(prior, whole)
        close(merged, whole)


@ROWS
def test_gradients_flow_through_a_prior(name: str):
    """Two parts by prior have the gradients of the whole; the prior is never written."""
    data = Case(LONGNET, (24, 24)).tensors()
    q, k, v = (x.requires_grad_() for x in (data.q, data.k, data.v))
    whole = gradients(attend(q, k, v, LONGNET, backend=name), q, k, v)
    spans = {"q_spans": Span(0, 24), "backend": name}
    first = attend(q, k[:, :13], v[:, :13], LONGNET, k_spans=Span(0, 13), **spans)
    kept, versions = (first.out.clone(), first.lse.clone()), (first.out._version, first.lse._version)
    second = attend(q, k[:, 13:], v[:, 13:], LONGNET, k_spans=Span(13, 11), prior=first, **spans)
    for got, expected in zip(gradients(second, q, k, v), whole, strict=True):
        assert_near(got, expected, 1e-4, 1e-4, "gradient")
    with torch.no_grad():
        attend(q, k[:, 13:], v[:, 13:], LONGNET, k_spans=Span(13, 11), prior=first, **spans)
    assert torch.equal(first.out, kept[0]) and torch.equal(first.lse, kept[1])
    assert versions == (first.out._version, first.lse._version)


@ROWS
@pytest.mark.parametrize("heads", ["shared", "blocks", "split"])
def test_head_shards_are_slices_of_the_whole(name: str, heads: str):
    """h is the global query head, also under GQA."""
    pattern = Dilated((8, 16, 16), (1, 2, 3), heads=heads)
    data = Case(pattern, (20, 20), kv_heads=4, group=2).tensors()
    whole = attend(data.q, data.k, data.v, pattern, backend=name)
    for first, count in ((0, 2), (2, 4), (6, 2)):
        at, kv = slice(first, first + count), slice(first // 2, (first + count) // 2)
        options = {"heads": Span(first, count), "num_heads": 8, "backend": name}
        part = attend(data.q[:, :, at], data.k[:, :, kv], data.v[:, :, kv], pattern, **options)
        close(part, AttentionState(whole.out[:, :, at], whole.lse[:, :, at]))


@ROWS
def test_results_are_the_callers_own(name: str):
    """No result shares memory with an input, and equal inputs give equal bits, gradients too."""
    data = Case(LONGNET, (24, 24), kv_heads=1, group=4).tensors()
    seen = []
    for _ in range(2):
        q, k, v = (x.clone().requires_grad_() for x in (data.q, data.k, data.v))
        state = attend(q, k, v, LONGNET, backend=name)
        grads = gradients(state, q, k, v)
        memory = {x.untyped_storage().data_ptr() for x in (q, k, v)}
        assert not memory & {x.untyped_storage().data_ptr() for x in (state.out, state.lse, *grads)}
        seen.append((state.out, state.lse, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    empty = attend(data.q, data.k[:, :0], data.v[:, :0], Full(), prior=state, backend=name)
    assert empty.out.data_ptr() != state.out.data_ptr() and torch.equal(empty.out, state.out)


@ROWS
def test_one_tensor_may_be_q_k_and_v(name: str):
    x = torch.randn(1, 12, 2, 8, requires_grad=True)
    leaves = [x.detach().clone().requires_grad_() for _ in range(3)]
    (got,) = gradients(attend(x, x, x, LONGNET, backend=name), x)
    assert_near(
        got, sum(gradients(attend(*leaves, LONGNET, backend=name), *leaves), torch.zeros(())), 1e-5, 1e-5, "gradient"
    )


def test_a_plan_is_built_once():
    """The second call, and backward, find it in the global cache."""
    cache = get_global_pattern_cache()
    pattern = Dilated((17, 51), (1, 3), causal=True)
    q = torch.randn(1, 60, 2, 4, requires_grad=True)
    before = cache.get_stats()
    for _ in range(3):
        attend(q, q, q, pattern).out.sum().backward()
    after = cache.get_stats()
    assert after["misses"] - before["misses"] == 1 and after["hits"] - before["hits"] >= 3


def test_threads_share_nothing_but_the_cache():
    """Eight threads on different shapes, and on the same ones, at once."""

    def work(seed: int) -> None:
        for step in range(6):
            length = 16 + (seed % 4) * 5 + step
            case = Case(Dilated((8, 12), (1, 3), causal=True), (length, length), kv_heads=1 + seed % 3, seed=seed)
            check_backend(backends("cpu")[seed % 2], replace(case, prior=bool(step % 2)))

    get_global_pattern_cache().clear()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_the_oracle_is_torchs_attention():
    """reference_attention on counts of one is scaled_dot_product_attention, gradients too."""
    q, k, v = (torch.randn(2, 9, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    state = reference_attention(q, k, v, torch.ones(3, 9, 9, dtype=torch.int64).tril())
    turned = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(*turned, is_causal=True).transpose(1, 2)
    assert_near(state.out, out, 1e-12, 1e-12, "out")
    for got, expected in zip(
        torch.autograd.grad(state.out.square().sum(), (q, k, v)),
        torch.autograd.grad(out.square().sum(), (q, k, v)),
        strict=True,
    ):
        assert_near(got, expected, 1e-12, 1e-12, "gradient")


def test_the_oracle_counts_a_key_twice_that_is_reached_twice():
    """A count of two is the same as the key standing there twice."""
    q, k, v = (torch.randn(1, 4, 1, 8) for _ in range(3))
    counts = torch.ones(1, 4, 4, dtype=torch.int64)
    counts[..., 1] = 2
    twice = (x[:, [0, 1, 1, 2, 3]] for x in (k, v))
    close(reference_attention(q, k, v, counts), reference_attention(q, *twice, torch.ones(1, 4, 5)))
