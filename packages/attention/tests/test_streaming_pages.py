"""Pages of streams: taken and given back, shared by forks until one writes, of a bounded pool that refuses and changes nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longattn.attention import PagePool, StreamingAttention, pattern_attention
from longattn.attention.streaming import attending
from longattn.kernels import merge
from longattn.patterncache import Dilated, Full, Window

DILATED = Dilated((16, 64), (1, 4), causal=True)
HEADS, DIM = 4, 8


def attention(pattern=DILATED, **options):
    return StreamingAttention(pattern, num_heads=HEADS, head_dim=DIM, kv_heads=2, **options)


def tokens(n, batch=1):
    """q, k, v in float64."""
    return [torch.randn(batch, n, heads, DIM, dtype=torch.float64) for heads in (HEADS, 2, 2)]


def part(inputs, start, end):
    return [x[:, start:end] for x in inputs]


def extended(inputs, more):
    return [torch.cat(pair, 1) for pair in zip(inputs, more, strict=True)]


def held_by(*states):
    """Pages that some of these states hold, each once."""
    return len({page for state in states for page in state.page_table.pages.reshape(-1).tolist() if page >= 0})


def test_forks_share_pages_until_they_write():
    """A fork and a clone take no page; a token in each copies the one page of each head that it lands in."""
    module = attention(Full(causal=True))
    pool = module.new_pool(page_size=8, dtype=torch.float64)
    prompt = tokens(30)
    _, state = module(*prompt, module.new_state(1, pool=pool))
    assert pool.pages_held == 8 == state.nbytes // pool.page_nbytes
    fork, clone = state.fork(3), state.clone()
    assert pool.pages_held == 8 and 8 == fork.nbytes // pool.page_nbytes
    token = tokens(1, batch=3)
    out, fork = module(*token, fork)
    for row in range(3):
        whole = extended(prompt, [x[row : row + 1] for x in token])
        torch.testing.assert_close(out[row : row + 1], pattern_attention(*whole, module.pattern)[:, -1:])
    # Of each head, one page for each of three rows; the old one is still that of the state and the clone.
    assert pool.pages_held == 8 + 3 * 2 == held_by(state, fork, clone)
    del fork
    assert pool.pages_held == 8
    more = tokens(1)
    out, state = module(*more, state)
    torch.testing.assert_close(out, pattern_attention(*extended(prompt, more), module.pattern)[:, -1:])
    other = tokens(1)
    out, clone = module(*other, clone)
    torch.testing.assert_close(out, pattern_attention(*extended(prompt, other), module.pattern)[:, -1:])
    assert pool.pages_held == 10
    del state, clone
    assert not pool.pages_held


def test_a_common_beginning_is_read_once_and_merged(monkeypatch):
    """Rows that share pages: one call over the beginning for all queries, one over what is behind it; the numbers of the full forward."""
    monkeypatch.setattr(attending, "_WORTH_SHARING", 16)
    merges = []
    monkeypatch.setattr(attending, "merge", lambda *states: merges.append(1) or merge(*states))
    for pattern in (Full(causal=True), DILATED):
        module = attention(pattern)
        pool = module.new_pool(page_size=8, dtype=torch.float64)
        prompt = tokens(30)
        _, state = module(*prompt, module.new_state(1, pool=pool))
        fork, whole = state.fork(4), [x.repeat(4, 1, 1, 1) for x in prompt]
        for step in range(12):
            token = tokens(1, batch=4)
            whole = extended(whole, token)
            rows = [0, 1, 2, 3] if step < 6 else [1, 3]
            out, fork = module(*(x[rows] for x in token), fork, rows=rows if step >= 6 else None)
            if step < 6:
                torch.testing.assert_close(out, pattern_attention(*whole, pattern)[:, -1:])
    assert merges


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.sampled_from(["arrive", "step", "chunk", "leave", "fork", "clone", "reorder"]), st.integers(0, 5)),
        max_size=30,
    )
)
def test_any_life_of_streams_in_a_pool(actions):
    """Arrivals, tokens of some rows, chunks, forks into free rows, departures: each row is its own full forward, and no page is lost or leaks."""
    module = attention(max_rewind=2)
    pool = module.new_pool(page_size=4, dtype=torch.float64)
    state, histories = module.new_state(3, pool=pool), dict[int, list[torch.Tensor]]()
    for action, number in actions:
        row = number % 3
        free = [r for r in range(3) if r not in histories]
        if action == "arrive" and free:
            prompt = tokens(1 + 5 * number)
            _, alone = module(*prompt, module.new_state(1, pool=pool))
            state.admit(free[0], alone)
            del alone
            histories[free[0]] = prompt
        elif action in ("step", "chunk") and histories:
            rows = sorted(histories)[: 1 + number]
            more = tokens(1 if action == "step" else 3, batch=len(rows))
            for index, r in enumerate(rows):
                histories[r] = extended(histories[r], [x[index : index + 1] for x in more])
            out, state = module(*more, state, rows=rows)
            for index, r in enumerate(rows):
                expected = pattern_attention(*histories[r], module.pattern)[:, -out.shape[1] :]
                torch.testing.assert_close(out[index : index + 1], expected)
        elif action == "leave" and row in histories:
            state.clear(row)
            del histories[row]
        elif action == "fork" and histories and free:
            source = sorted(histories)[0]
            before = pool.pages_held
            state.admit(free[0], state, source)
            histories[free[0]] = histories[source]
            assert pool.pages_held == before
        elif action == "clone":
            state = state.clone()
        elif action == "reorder":
            state.reorder([2, 0, 1])
            histories = {new: histories[old] for new, old in enumerate([2, 0, 1]) if old in histories}
        assert pool.pages_held == held_by(state)
        for r, history in histories.items():
            assert state.positions[r] == history[0].shape[1]
    for r in histories:
        state.clear(r)
    assert not pool.pages_held


@pytest.mark.parametrize("invariant", [False, True])
def test_a_full_pool_refuses_and_nothing_has_changed(invariant):
    """A token, a chunk and an arrival: what is held stays, and goes on once there is room."""
    module = attention(Window(8), invariant=invariant)
    pool = module.new_pool(4, page_size=4, dtype=torch.float64)
    first = tokens(8)
    _, state = module(*first, module.new_state(1, pool=pool))
    assert pool.pages_held == 4 == pool.limit and "4 of 4 pages held" in repr(pool)
    held, blocked = state.positions_held(), tokens(5)
    other = module.new_state(1, pool=pool)
    for count in (1, 5):
        with pytest.raises(MemoryError, match="has 0 free of 4 pages where"):
            module(*part(blocked, 0, count), other)
    assert other.positions == [0] and other.positions_held() == [[], []] and state.positions_held() == held
    # A window frees slots of its own pages, so that it goes on in a full pool.
    out, state = module(*blocked, state)
    torch.testing.assert_close(out, pattern_attention(*extended(first, blocked), module.pattern)[:, -5:])
    with pytest.raises(MemoryError, match="where 2 are needed"):
        module(*tokens(1), state.clone())
    state.clear(0)
    out, other = module(*blocked, other)
    torch.testing.assert_close(out, pattern_attention(*blocked, module.pattern))
    elsewhere = module.new_state(1, pool=module.new_pool(page_size=4, dtype=torch.float64))
    _, elsewhere = module(*tokens(8), elsewhere)
    with pytest.raises(MemoryError, match="where 4 are needed"):
        module.new_state(1, pool=pool).admit(0, elsewhere)


@pytest.mark.parametrize("storage", [None, "int8", "fp8"])
def test_pages_of_every_storage(storage):
    """bfloat16 in a bounded pool: 64 tokens of three rows, beside a pool of its own for each."""
    module = attention(storage=storage)
    pool = module.new_pool(64, page_size=8, dtype=torch.bfloat16)
    state, alone = module.new_state(3, pool=pool), [module.new_state(1, dtype=torch.bfloat16) for _ in range(3)]
    for n in (20, 1, 1, 7, 1):
        call = [x.bfloat16() for x in tokens(n, batch=3)]
        out, state = module(*call, state)
        for row in range(3):
            expected, alone[row] = module(*(x[row : row + 1] for x in call), alone[row])
            torch.testing.assert_close(out[row : row + 1], expected, atol=2e-2, rtol=2e-2)
    assert pool.nbytes == 64 * pool.page_nbytes


def test_what_does_not_fit_is_named():
    """Pools of other modules, and sizes that are none."""
    module = attention()
    pool = module.new_pool(2)
    assert isinstance(pool, PagePool) and pool.page_size == 64
    with pytest.raises(TypeError, match="pool must be None or a PagePool, got int"):
        module.new_state(1, pool=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pool must have storage=int8 of this module, got None"):
        attention(storage="int8").new_state(1, pool=pool)
    with pytest.raises(ValueError, match=r"pool must have dtype=torch.float64 of this module, got torch.float32"):
        module.new_state(1, pool=pool, dtype=torch.float64)
    with pytest.raises(ValueError, match="page_size must be a power of two, got 3"):
        module.new_pool(page_size=3)
    with pytest.raises(ValueError, match="pages must be"):
        module.new_pool(0)
    with pytest.raises(ValueError, match="other must be a state with pages of 64 slots, as this one, got 8"):
        module.new_state(1).admit(0, module.new_state(1, pool=module.new_pool(page_size=8)))
