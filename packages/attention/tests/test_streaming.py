"""`StreamingAttention`: any split of a stream into calls equals the full forward, and only what later queries see is held."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from longattn.attention import StreamingAttention, StreamingState, pattern_attention
from longattn.kernels.testing import tolerance
from longattn.patterncache import BlockSparse, ByHead, Dilated, Documents, Full, Rectangle, Restrict, Span, Window
from longattn.patterncache.testing import patterns

LENGTH = 24
DILATED = Dilated((4, 12), (1, 2), causal=True)
ROWS = np.tril(np.ones((6, 6), bool)) & ~np.eye(6, k=-2, dtype=bool)
EXAMPLES = [
    DILATED,
    Window(5, sinks=2),
    BlockSparse(4, ROWS, causal=True),
    Documents((0, 7, 8, LENGTH), DILATED),
    ByHead(((Span(0, 2), Window(3)), (Span(2, 2), Full(causal=True)))),
    DILATED + Window(3),
    Restrict(DILATED, Window(6)),
]


def tensors(pattern, batch=2, heads=4, kv_heads=2, dtype=torch.float64, length=LENGTH):
    """A module, q, k, v, and what the whole forward makes of them: out and lse."""
    module = StreamingAttention(pattern, num_heads=heads, head_dim=8, kv_heads=kv_heads, value_head_dim=4)
    q = torch.randn(batch, length, heads, 8, dtype=dtype)
    k, v = (torch.randn(batch, length, kv_heads, width, dtype=dtype) for width in (8, 4))
    return module, (q, k, v), pattern_attention(q, k, v, pattern, return_lse=True)


def in_calls(module, inputs, sizes, state=None):
    """(out, lse, state) of a stream in calls of these sizes."""
    outs, lses, start = [], [], 0
    for size in sizes:
        part = [x[:, start : start + size] for x in inputs]
        (out, lse), state = module(*part, state, return_lse=True)
        outs.append(out)
        lses.append(lse)
        start += size
    return torch.cat(outs, 1), torch.cat(lses, 1), state


def splits(length=LENGTH):
    """Sizes of calls that add up to a length; none, one token and chunks."""
    cuts = st.lists(st.integers(0, length), max_size=8)
    return cuts.map(lambda at: np.diff([0, *sorted(at), length]).tolist())


def seen_later(pattern, heads, kv_heads, position):
    """Positions below `position` that some query from there on, up to LENGTH, sees, for each kv head."""
    counts = pattern.counts(Rectangle(heads, Span(position, LENGTH - position), Span(0, position)))
    seen = (counts > 0).any(1).reshape(kv_heads, heads // kv_heads, position).any(1)
    return [row.nonzero()[0].tolist() for row in seen]


@given(patterns(), splits())
def test_any_split_of_any_pattern_is_the_full_forward(pattern, sizes):
    """Outputs and lse, chunk by chunk and token by token; what is held is what later queries see, or more where no end is known."""
    assume(pattern.with_causal(True).causal)
    pattern = pattern.with_causal(True)
    try:
        module, inputs, (expected, expected_lse) = tensors(pattern)
    except ValueError:
        return  # heads or lengths that the pattern is not for
    out, lse, state = in_calls(module, inputs, sizes)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(lse, expected_lse, atol=1e-10, rtol=1e-10)
    assert [LENGTH] * 2 == state.positions


@pytest.mark.parametrize("pattern", EXAMPLES, ids=lambda p: p.name)
def test_exactly_what_later_queries_see_is_held(pattern):
    """After each token, for each kv head."""
    module, inputs, _ = tensors(pattern)
    state = None
    for position in range(LENGTH):
        _, state = module(*(x[:, position : position + 1] for x in inputs), state)
        if position + 1 < LENGTH:
            later = [set(row) for row in seen_later(pattern, 4, 2, position + 1)]
            held = [set(row) for row in state.positions_held()]
            if pattern.repeats[1] or isinstance(pattern, BlockSparse | Documents):
                assert later == held
            assert all(a <= b for a, b in zip(later, held, strict=True))


def test_dilated_streams_hold_half_of_the_window_at_most_and_a_quarter_on_average():
    """2048/4096/8192 at 1, 2, 4, counted by positions: at most 50 % of 8192 keys of a head, and 27 % on average."""
    last = Dilated((2048, 4096, 8192), (1, 2, 4), causal=True).last_queries(Span(0, 8192), 8)
    steps = np.arange(1, 8193)
    for head in last:
        written = np.arange(8192)
        staying = head > written
        held = np.searchsorted(written[staying], steps) - np.searchsorted(np.sort(head[staying]), steps)
        assert held.max() <= 0.5 * 8192 and held.mean() <= 0.27 * 8192


@pytest.mark.parametrize("pattern", EXAMPLES, ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(pattern, dtype):
    """Within the row's tolerance of the full forward in float64."""
    module, inputs, _ = tensors(pattern, dtype=dtype)
    whole = [x.double() for x in inputs]
    expected = pattern_attention(*whole, pattern)
    out, _, _ = in_calls(module, inputs, [9, 1, 1, 1, 12])
    assert out.dtype == dtype
    atol, rtol = tolerance("native", dtype)
    torch.testing.assert_close(out.double(), expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("pattern", EXAMPLES, ids=lambda p: p.name)
def test_invariant_bits(pattern):
    """The same bits alone and in a batch, in one call and token by token; and the numbers of the full forward."""
    _, inputs, (expected, expected_lse) = tensors(pattern, batch=3, dtype=torch.float32)
    module = StreamingAttention(pattern, num_heads=4, head_dim=8, kv_heads=2, value_head_dim=4, invariant=True)
    out, lse, _ = in_calls(module, inputs, [LENGTH])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    for sizes in ([1] * LENGTH, [5, 1, 1, 10, 7]):
        other, other_lse, _ = in_calls(module, [x[1:2] for x in inputs], sizes)
        assert torch.equal(out[1:2], other) and torch.equal(lse[1:2], other_lse)


@settings(max_examples=20)
@given(
    st.lists(st.sampled_from(["step", "chunk", "rewind", "reorder", "fork", "save"]), max_size=12), st.integers(0, 6)
)
def test_a_life_of_states(actions, pattern_number):
    """Steps, chunks, rewinds, reorders, forks and saves in any order: each row goes on as its own full forward."""
    pattern = EXAMPLES[pattern_number]
    module = StreamingAttention(pattern, num_heads=4, head_dim=8, kv_heads=2, max_rewind=3)
    state = module.new_state(2, dtype=torch.float64)
    history = torch.zeros(3, 2, 0, 4, 8, dtype=torch.float64)
    for action in actions:
        size = {"step": 1, "chunk": 4}.get(action, 0)
        if size and history.shape[2] + size <= LENGTH:
            history = torch.cat((history, torch.randn(3, history.shape[1], size, 4, 8, dtype=torch.float64)), 2)
            q, k, v = history[0], history[1, :, :, :2], history[2, :, :, :2]
            out, state = module(*(x[:, -size:] for x in (q, k, v)), state)
            torch.testing.assert_close(out, pattern_attention(q, k, v, pattern)[:, -size:], atol=1e-10, rtol=1e-10)
        elif action == "rewind":
            amount = min(2, state.tables[0].position - state.tables[0].restorable)
            state.rewind(amount)
            history = history[:, :, : history.shape[2] - amount]
        elif action == "reorder":
            index = [history.shape[1] - 1, 0]
            state.reorder(index)
            history = history[:, index]
        elif action == "fork" and history.shape[1] < 4:
            state = state.fork(2)
            history = history.repeat_interleave(2, 1)
        elif action == "save":
            state = saved_and_loaded(state)
    assert [history.shape[2]] * history.shape[1] == state.positions


def saved_and_loaded(state):
    file = io.BytesIO()
    state.save(file)
    file.seek(0)
    return StreamingState.load(file)


def test_rows_at_positions_of_their_own():
    """Streams of different lengths in one batch: admitted, stepped together or some of them, ended, their rows used again."""
    module, (q, k, v), (expected, _) = tensors(DILATED, batch=3)
    state = module.new_state(2, dtype=torch.float64)
    lengths = {0: 5, 1: 14}
    for row, length in lengths.items():
        _, alone = module(*(x[row : row + 1, :length] for x in (q, k, v)))
        state.admit(row, alone)
    for step in range(6):
        at = [(row, lengths[row] + step) for row in (0, 1)]
        token = [torch.cat([x[row : row + 1, p : p + 1] for row, p in at]) for x in (q, k, v)]
        out, state = module(*token, state)
        torch.testing.assert_close(out, torch.cat([expected[row : row + 1, p : p + 1] for row, p in at]))
    _, state = module(*(x[2:3, :9] for x in (q, k, v)), state.clear(1), rows=[1])
    out, state = module(*(x[2:3, 9:13] for x in (q, k, v)), state, rows=[1])
    torch.testing.assert_close(out, expected[2:3, 9:13])
    assert [11, 13] == state.positions
    out, state = module(*(x[0:1, 11:12] for x in (q, k, v)), state, rows=[0])
    torch.testing.assert_close(out, expected[0:1, 11:12])


def test_memory_does_not_grow():
    """A period's peak, and no more after many periods; empty at its end."""
    module = StreamingAttention(DILATED, num_heads=2, head_dim=8)
    token, state, most, most_bytes = torch.randn(1, 1, 2, 8), None, 0, 0
    for step in range(1, 121):
        _, state = module(token, token, token, state)
        most, most_bytes = max(most, max(map(len, state.positions_held()))), max(most_bytes, state.nbytes)
        if step % 12 == 0:
            assert [[], []] == state.positions_held() and not state.nbytes and not state.pool.pages_held
    assert most <= 8 and state.capacity == 64 and most_bytes == state.pool.nbytes == 2 * 2 * 64 * 8 * 4


def test_copies():
    """`clone`, pickle, deepcopy and files share nothing, and go on with the same numbers."""
    module, inputs, (expected, _) = tensors(DILATED)
    _, _, state = in_calls(module, [x[:, :10] for x in inputs], [7, 1, 1, 1])
    copies = [state.clone(), copy.deepcopy(state), pickle.loads(pickle.dumps(state)), saved_and_loaded(state)]
    for each in [*copies, state]:
        out, _ = module(*(x[:, 10:] for x in inputs), each)
        torch.testing.assert_close(out, expected[:, 10:])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pattern": Dilated((4,), (1,))}, "pattern must be causal"),
        ({"kv_heads": 3}, "kv_heads must divide num_heads=4"),
        ({"num_heads": 0}, "num_heads must be"),
        ({"softmax_scale": -1.0}, "softmax_scale must be"),
        ({"max_rewind": -1}, "max_rewind must be"),
    ],
)
def test_bad_options_are_named(change, words):
    """By the parameter."""
    with pytest.raises(ValueError, match=words):
        StreamingAttention(**({"pattern": DILATED, "num_heads": 4, "head_dim": 8} | change))


def test_a_refused_call_changes_nothing():
    """Wrong shapes, another batch, gradients, positions beyond the pattern: refused by name, and the state is as it was."""
    pattern = Documents((0, 4, 9), Full(causal=True))
    module, (q, k, v), _ = tensors(DILATED)
    module = StreamingAttention(pattern, num_heads=4, head_dim=8, kv_heads=2, value_head_dim=4)
    _, state = module(q[:, :6], k[:, :6], v[:, :6])
    before = state.positions_held()
    for call, words in [
        (lambda: module(q[:, :4], k[:, :4], v[:, :4], state), "queries must lie below"),
        (lambda: module(q[:1, :1], k[:1, :1], v[:1, :1], state), "k must have the batch size of state, 2, got 1"),
        (lambda: module(q[:, :2], k[:, :1], v[:, :1], state), "q must have the length of k, 1, got 2"),
        (lambda: module(q[:, :1].clone().requires_grad_(), k[:, :1], v[:, :1], state), "q must not require gradients"),
        (lambda: module(q[:1, :1], k[:1, :1], v[:1, :1], state, rows=[2]), "rows must lie between 0 and 1"),
        (lambda: module(q[:, :1].float(), k[:, :1].float(), v[:, :1].float(), state), "state must have dtype="),
        (lambda: state.rewind(1), "tokens must be from 0 to 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    assert before == state.positions_held() and [6, 6] == state.positions
