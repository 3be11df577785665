"""`Ring` in one process: who holds which row, that it gives what `Local` gives, and what it leaves out."""

import copy
import pickle
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from longattn.attention import Local, PatternAttention, Ring, pattern_attention
from longattn.attention.schedules import driver as scheduled
from longattn.attention.schedules.layouts import LAYOUTS, take
from longattn.attention.testing import check_schedule
from longattn.kernels import Alibi, Environment, Softcap, reference_attention
from longattn.kernels.dispatch.prepared import PREPARED
from longattn.patterncache import Dilated, Full, Pattern, PatternCache, Rectangle, Restrict, Span, Window
from longattn.patterncache.testing import patterns, spans

RINGS = st.builds(Ring, size=st.integers(1, 16), layout=st.sampled_from(list(LAYOUTS)))
LONGNET = Dilated((6, 12, 24), (1, 2, 4), causal=True)


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


PRECISIONS = [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)]


def bools(*shape: int, seed: int, chance: float) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < chance


def draw_mask(data: st.DataObject, batch: int, heads: int, nq: int, nk: int) -> torch.Tensor | None:
    """None, or a mask that broadcasts over any of the axes, or lacks the first ones."""
    shape = [n if data.draw(st.booleans()) else 1 for n in (batch, heads, nq, nk)]
    kept = data.draw(st.sampled_from([None, 0, 2, 3]))
    return None if kept is None else bools(*shape[kept:], seed=nq, chance=0.6)


def calls(pattern: Pattern, length: int, schedule: Ring | Local) -> int:
    """How many rectangles one forward on `length` tokens computes."""
    x = randn(1, length, 2, 4, dtype=torch.float32)
    computed: list[object] = []
    attend_step = scheduled.attend_step

    def watch(*args: Any, **kwargs: Any) -> Any:
        state = attend_step(*args, **kwargs)
        computed.extend([] if state is None else [state])
        return state

    PREPARED.clear()  # what was looked up before takes no steps
    with patch.object(scheduled, "attend_step", watch), torch.no_grad():
        pattern_attention(x, x, x, pattern, schedule=schedule)
    return len(computed)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(length=st.integers(0, 70), size=st.integers(1, 16))
def test_a_layout_covers_every_row_once(layout, length, size):
    """Shards partition the rows, differ by one row at most, hold what their spans say, and join into what was cut."""
    placed = LAYOUTS[layout](length, size)
    held = [[int(p) for span in rows for p in span.positions()] for rows in placed.rows()]
    assert len(held) == size and sorted(row for rows in held for row in rows) == list(range(length))
    assert max(map(len, held)) - min(map(len, held)) <= 1
    x = torch.arange(length)[None, :, None]
    shards = placed.cut(x)
    assert [shard.flatten().tolist() for shard in shards] == held
    assert torch.equal(placed.join(shards), x)


def test_layouts_are_what_their_names_say():
    """Zigzag holds a chunk from either end, and neighbouring chunks are one span."""
    assert LAYOUTS["contiguous"](7, 3).rows() == ((Span(0, 3),), (Span(3, 2),), (Span(5, 2),))
    assert LAYOUTS["zigzag"](8, 2).rows() == ((Span(0, 2), Span(6, 2)), (Span(2, 4),))
    assert LAYOUTS["striped"](7, 3).rows() == ((Span(0, 3, 3),), (Span(1, 2, 3),), (Span(2, 2, 3),))
    assert LAYOUTS["zigzag"](9, 1).rows() == LAYOUTS["striped"](9, 1).rows() == ((Span(0, 9),),)


@given(st.lists(spans(), min_size=1, max_size=3), st.integers(1, 16), st.sampled_from(list(LAYOUTS)))
def test_rows_have_the_positions_of_their_spans(whole, size, layout):
    """`take` agrees with indexing the positions, whatever spans a tensor's rows stand at."""
    positions = [int(p) for span in whole for p in span.positions()]
    for rows in LAYOUTS[layout](len(positions), size).rows():
        expected = [positions[r] for span in rows for r in span.positions()]
        assert [int(p) for span in take(tuple(whole), rows) for p in span.positions()] == expected


@given(st.data(), patterns(), RINGS, st.integers(0, 50), st.sampled_from([(1, 1), (4, 2), (3, 1)]))
def test_any_ring_equals_local(data, pattern, ring, length, heads):
    """Random patterns, layouts, sizes, ragged lengths, GQA, padding and masks: out, lse and gradients to 1e-10."""
    width = data.draw(st.sampled_from([4, 2, 7]), "head_dim of v")
    q, k, v = (randn(2, length, heads[n > 0], width if n == 2 else 4, seed=n) for n in range(3))
    padding = bools(2, length, seed=length, chance=0.3) if data.draw(st.booleans(), "padding") else None
    mask = draw_mask(data, 2, heads[0], length, length)
    is_causal = data.draw(st.sampled_from([None, False, True]), "is_causal")
    check_schedule(ring, pattern, q, k, v, key_padding_mask=padding, attention_mask=mask, is_causal=is_causal)


@given(patterns(), RINGS, st.integers(0, 30), st.integers(0, 30), st.sampled_from([None, 0, 3, 40]), st.booleans())
@example(Full(), Ring(size=3), 9, 2, None, True)
def test_any_lengths_equal_local(pattern, ring, nq, nk, q_start, masked):
    """Nq != Nk, with queries last or where q_start puts them; more ranks than rows; no rows at all."""
    if q_start is None and nq > nk and pattern.positional:
        q_start = 0
    q, k, v = randn(1, nq, 2, 4), randn(1, nk, 2, 4, seed=1), randn(1, nk, 2, 4, seed=2)
    mask = bools(nq, nk, seed=3, chance=0.7) if masked else None
    check_schedule(ring, pattern, q, k, v, attention_mask=mask, q_start=q_start)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", [LONGNET, Restrict(LONGNET, Window(9, sinks=2)), Dilated((5, 40), (7, 3), "split")])
@pytest.mark.parametrize("size", [1, 5, 16])
def test_borders_cut_segments(pattern, size, layout):
    """Segments of 6, 12 and 24 on 53 tokens, cut wherever shards end."""
    check_schedule(Ring(size=size, layout=layout), pattern, *(randn(2, 53, 4, 8, seed=n) for n in range(3)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padded_nan_reaches_nothing(layout):
    """NaN in padded keys leaves outputs and gradients finite in every shard."""
    padding = bools(2, 31, seed=5, chance=0.4)
    q = randn(2, 31, 2, 4).requires_grad_()
    kv = [randn(2, 31, 2, 4, seed=n).masked_fill(padding[:, :, None, None], torch.nan).requires_grad_() for n in (1, 2)]
    out = pattern_attention(q, *kv, LONGNET, key_padding_mask=padding, schedule=Ring(size=4, layout=layout))
    grads = torch.autograd.grad(out.square().sum(), (q, *kv))
    assert all(x.isfinite().all() for x in (out, *grads))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", [Full(causal=True), Dilated((64, 256), (1, 4), causal=True)])
def test_error_does_not_grow_with_the_ring(pattern, layout):
    """float32 over 16 steps: within 1.2 of Local's own error against the float64 oracle, in out, lse and gradients."""
    inputs = [randn(2, 256, 4, 16, dtype=torch.float32, seed=n) for n in range(3)]
    counts = pattern.counts(Rectangle(4, Span(0, 256), Span(0, 256)))

    def run(schedule: Ring | Local | None) -> list[torch.Tensor]:
        dtype = torch.float64 if schedule is None else torch.float32
        q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
        if schedule is None:
            state = reference_attention(q, k, v, counts)
            out, lse = state.out, state.lse
        else:
            out, lse = pattern_attention(q, k, v, pattern, schedule=schedule, return_lse=True)
        grads = torch.autograd.grad((out * randn(*out.shape, seed=7).to(out)).sum(), (q, k, v))
        return [x.detach().double() for x in (out, lse, *grads)]

    truth = run(None)
    ring, local = (
        [(x - y).square().mean().sqrt() for x, y in zip(run(schedule), truth, strict=True)]
        for schedule in (Ring(size=16, layout=layout), Local())
    )
    for name, found, bound in zip(("out", "lse", "dq", "dk", "dv"), ring, local, strict=True):
        assert found <= 1.2 * bound, f"{name}: {found / bound:.2f} times Local's error"


def test_nothing_is_launched_where_nobody_sees():
    """Causal contiguous shards launch their own and the past; segments within a shard launch the shard's own alone."""
    assert calls(Full(causal=True), 32, Ring(size=4)) == 4 + 3 + 2 + 1
    assert calls(Full(), 32, Ring(size=4)) == 16
    assert calls(Dilated((8,), (1,)), 32, Ring(size=4)) == 4
    assert calls(Window(4), 32, Ring(size=4)) == 4 + 3
    # Two heads: of the four ranks, only those of residues 0 and 1 see anything.
    assert calls(Dilated((32,), (4,)), 32, Ring(size=4, layout="striped")) == 2
    assert calls(Full(causal=True), 32, Ring(size=4, layout="zigzag")) == 16
    # A whole call is no pass of a schedule: it goes to the row directly.
    assert [calls(Full(), 32, whole) for whole in (Local(), Ring(size=1))] == [0, 0]


@given(patterns(), RINGS, st.integers(0, 40), st.sampled_from([(1, 1), (4, 2)]), st.sampled_from(PRECISIONS))
@example(Dilated((32,), (4,)), Ring(size=4, layout="striped"), 32, (1, 1), PRECISIONS[0])
@example(Dilated((4, 16), (1, 2)), Ring(size=3), 37, (4, 2), PRECISIONS[0])
def test_a_ring_that_was_looked_up_before_equals_local(pattern, ring, length, heads, precision):
    """Its second and third call, without gradients: out and lse of the oracle's, in the row that serves here."""
    dtype, tolerance = precision
    q, k, v = (randn(2, length, heads[n > 0], 4, seed=n).to(dtype) for n in range(3))
    expected = pattern_attention(*(x.double() for x in (q, k, v)), pattern, return_lse=True)
    for _ in range(3):
        found = pattern_attention(q, k, v, pattern, schedule=ring, return_lse=True)
        assert (found[0].dtype, found[1].dtype) == (dtype, torch.float32)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.double(), theirs, atol=tolerance, rtol=tolerance)


def test_a_ring_asks_the_cache_once_for_each_rectangle():
    """The first call, the later ones, and one after the cache was emptied: sixteen look-ups each."""
    cache = PatternCache()
    environment, seen = Environment(cache), []
    x, ring = randn(1, 32, 2, 4, dtype=torch.float32), Ring(size=4)
    for emptied in (False, False, False, True, False):
        if emptied:
            cache.clear()
        before = cache.get_stats()
        found = pattern_attention(x, x, x, LONGNET, schedule=ring, environment=environment)
        after = cache.get_stats()
        asked = [after[name] - (0 if emptied else before[name]) for name in ("hits", "misses")]
        seen.append(tuple(asked))
        torch.testing.assert_close(found, pattern_attention(x, x, x, LONGNET))
    assert seen == [(0, 16), (16, 0), (16, 0), (0, 16), (16, 0)]


def test_a_module_that_holds_a_ring_travels():
    """deepcopy and pickle keep the ring; repr says it shortly."""
    attention = PatternAttention(LONGNET, schedule=Ring(size=3, layout="zigzag"))
    x = randn(1, 20, 2, 4)
    for copied in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert copied.schedule == attention.schedule
        torch.testing.assert_close(copied(x, x, x), attention(x, x, x))
    assert repr(attention.schedule) == "Ring(size=3, layout='zigzag')" and "size=3" in repr(attention)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_functional_gradients_pass_through(layout):
    """torch.func.grad sees through cutting, merging and joining."""
    q, k, v = (randn(1, 22, 2, 4, seed=n) for n in range(3))

    def loss(q: torch.Tensor, schedule: Ring | Local) -> torch.Tensor:
        return pattern_attention(q, k, v, LONGNET, schedule=schedule).square().sum()

    found, expected = (torch.func.grad(loss)(q, s) for s in (Ring(size=5, layout=layout), Local()))
    torch.testing.assert_close(found, expected)


def test_a_compiled_ring_is_right():
    """torch.compile(fullgraph=True) at a second, dynamic length gives the eager numbers."""
    attention = PatternAttention(LONGNET, schedule=Ring(size=2, layout="striped"))
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    for length in (20, 23):
        x = randn(1, length, 2, 4).requires_grad_()
        found, expected = compiled(x, x, x), attention(x, x, x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in (found, expected)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    """Half-precision inputs: states merge in float32, and out is the rounding of what a wider call gives."""
    x = randn(1, 60, 2, 8, dtype=dtype)
    out = pattern_attention(x, x, x, LONGNET, schedule=Ring(size=16))
    assert out.dtype == dtype
    wide = pattern_attention(*(x.float(),) * 3, LONGNET)
    torch.testing.assert_close(out.float(), wide, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, TypeError, "size must be an integer >= 1, got None"),
        ({"size": 0}, ValueError, "size must be an integer >= 1, got 0"),
        ({"size": -2}, ValueError, "size must be an integer >= 1, got -2"),
        ({"size": 2.0}, TypeError, "size must be an integer >= 1, got 2.0"),
        ({"size": True}, TypeError, "size must be an integer >= 1, got True"),
        ({"size": "4"}, TypeError, "size must be an integer >= 1, got '4'"),
        ({"size": 2, "layout": "spiral"}, ValueError, "layout must be one of .*zigzag.*got 'spiral'"),
        ({"size": 2, "layout": None}, TypeError, "layout must be one of"),
        ({"group": object()}, TypeError, "group must be a ProcessGroup or a DeviceMesh of one dimension, got object"),
        ({"group": 3, "size": 2}, TypeError, "group must be a ProcessGroup"),
        ({"size": 2, "lengths": 8}, ValueError, "lengths must be None without a group, got 8"),
    ],
)
def test_a_bad_ring_is_named(options, error, words):
    """The message names the parameter, what was expected and what came."""
    with pytest.raises(error, match=words):
        Ring(**options)


X = torch.zeros(1, 8, 2, 4)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"q": X.numpy()}, TypeError, "q must be a torch.Tensor"),
        ({"k": X[:, :3], "v": X[:, :4]}, ValueError, "v must have the length and heads of k"),
        ({"k": X[:, :4], "v": X[:, :4]}, ValueError, "q_start must be given.*got Nq=8, Nk=4"),
        ({"attention_mask": torch.ones(3, 3, dtype=torch.bool)}, ValueError, "attention_mask .*got \\(3, 3\\)"),
        ({"attention_mask": torch.ones(8, 8).int()}, TypeError, "attention_mask must be"),
        ({"key_padding_mask": torch.ones(1, 7).bool()}, ValueError, r"key_padding_mask .*\(1, 8\), got \(1, 7\)"),
        ({"backend": "cuda"}, ValueError, "backend must be None or one of"),
        ({"is_causal": 1}, TypeError, "is_causal"),
    ],
)
def test_a_bad_call_is_named_as_a_whole(options, error, words):
    """Messages speak of what the caller gave, not of shards."""
    arguments = {"q": X, "k": X, "v": X, "pattern": Window(3), "schedule": Ring(size=3), **options}
    with pytest.raises(error, match=words):
        pattern_attention(**arguments)


def test_repeated_calls_of_a_ring_are_each_of_their_own_options():
    """A ring in one process is one call that the memo knows: options of one signature may not serve another's, nor old values new ones."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 64, 4, 16, generator=generator)
    mask = torch.rand(64, 64, generator=generator) < 0.9
    options: list[dict[str, Any]] = [
        {},
        {"softmax_scale": 0.5},
        {"softmax_scale": torch.tensor([0.1, 0.2, 0.3, 0.4])},
        {"softmax_scale": torch.tensor([0.4, 0.3, 0.2, 0.1])},
        {"score_terms": Softcap(1.0)},
        {"score_terms": Softcap(2.0)},
        {"score_terms": Alibi(torch.tensor([0.1, 0.2, 0.3, 0.4]))},
        {"score_terms": Alibi(torch.tensor([0.4, 0.3, 0.2, 0.1]))},
        {"attention_mask": mask},
        {"attention_mask": ~mask | torch.eye(64, dtype=torch.bool)},
        {"key_padding_mask": torch.arange(64)[None] < 7},
        {"num_heads": 8, "head_start": 4},
        {"is_causal": False},
    ]
    pattern = Dilated((16, 32), (1, 2), causal=True)
    for _ in range(3):
        for some in options:
            expected = pattern_attention(q, k, v, pattern, **some)
            torch.testing.assert_close(pattern_attention(q, k, v, pattern, schedule=Ring(size=4), **some), expected)
