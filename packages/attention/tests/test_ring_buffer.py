"""What calls of `RingBufferAttention` return: every phase, mask and option, beside the oracle over a list of all tokens."""

import copy
import gc
import io
import pickle
import threading
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longattn.attention import RingBufferAttention, RingBufferConfig, RingBufferState
from longattn.attention.ring_buffer import linear_ring
from longattn.attention.ring_buffer.testing import StreamModel, stale_slots_hold_nan
from longattn.bufmgr import get_global_memory_pool
from longattn.kernels import reference_attention


@pytest.fixture(autouse=True)
def _stale_slots_hold_nan():
    with stale_slots_hold_nan():
        yield


def attention(size=5, heads=2, head_dim=4, **options):
    """A small module without dropout."""
    config = RingBufferConfig(num_heads=heads, head_dim=head_dim, buffer_size=size, **{"dropout": 0.0, **options})
    return RingBufferAttention(config)


def tokens(n, batch=2, heads=2, head_dim=4, seed=0, dtype=torch.float64):
    """q, k, v of n tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, n, heads, head_dim, generator=generator, dtype=torch.float64).to(dtype)


def near(got, expected, tolerance=1e-9):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance, check_dtype=False)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("sinks", [0, 2])
def test_wrap_around_at_every_offset(size, sinks):
    """A chunk of every length from every position, then a token, equals the oracle."""
    module = attention(size, sinks=sinks)
    for position in range(2 * size + sinks + 1):
        for n in range(1, 2 * size + 2):
            model = StreamModel.begin(module.config, 2, 2)
            state = module.new_state(2, dtype=torch.float64)
            for part, decode in ((tokens(position), False), (tokens(n, seed=1), False), (tokens(1, seed=2), True)):
                out = module(*part, buffer_state=state, is_decoder=decode)
                near(out if decode else out[0], model.call(*part, None, decode))


@given(
    cut=st.lists(st.integers(0, 9), max_size=4),
    causal=st.booleans(),
    order=st.sampled_from(["q_major", "k_major"]),
    sizes=st.tuples(*[st.integers(1, 7)] * 4),
)
def test_a_chunked_prefill_is_the_whole_one(cut, causal, order, sizes):
    """Causal results do not depend on where a prompt is cut, and no result on tiles."""
    names = ("tile_size", "block_size", "head_tile_size", "prefill_size")
    module = attention(4, causal=causal, **dict(zip(names, sizes, strict=True)))
    module.tiling_processor.tile_order = type(module.tiling_processor.tile_order)(order)
    module.tiling_processor.least_rows = 1
    model = StreamModel.begin(module.config, 2, 2)
    state, start = None, 0
    q, k, v = tokens(sum(cut) + 5)
    outs = []
    for n in [*cut, 5]:
        part = [x[:, start : start + n] for x in (q, k, v)]
        out, state = module(*part, buffer_state=state, position=start)
        near(out, model.call(*part, None, decode=False))
        outs.append(out)
        start += n
    if causal:
        near(torch.cat(outs, 1), module(q, k, v)[0])


def test_the_last_call_or_a_given_state_is_continued():
    """A decoder call without a state takes the module's only stream, and of two neither; one with a state advances it in place."""
    module = attention()
    x = tokens(9)
    _, first = module(*x[:, :, :8])
    module(*x[:, :, 8:], is_decoder=True)
    copy_of_first = first.clone()
    _, second = module(*x[:, :, :3])
    assert (first.position, second.position) == (9, 3)
    with pytest.raises(ValueError, match="buffer_state must be given where a module has several streams"):
        module(*x[:, :, 8:], is_decoder=True)
    assert (first.position, second.position) == (9, 3)
    module(*x[:, :, 8:], position=9, is_decoder=True, buffer_state=first)
    assert (first.position, copy_of_first.position) == (10, 9)
    module.reset()
    assert module(*x[:, :, :1], position=0, is_decoder=True).shape == (2, 1, 2, 4)


def test_queries_may_be_fewer_than_keys_in_an_encoder_call():
    """They are the last ones; not causal, any number of them sees everything."""
    q, k, v = tokens(7)
    module = attention()
    near(module(q[:, -2:], k, v)[0], module(q, k, v)[0][:, -2:])
    around = attention(causal=False)
    expected = reference_attention(q[:, :3].repeat(1, 4, 1, 1), k, v, torch.ones(2, 12, 7)).out
    near(around(q[:, :3].repeat(1, 4, 1, 1), k, v)[0], expected)


def test_an_autoregressive_loop_lives_on_the_feedback_ring():
    """Without input a decoder call takes its own last output, and the ring returns the last n in order."""
    module = attention(4)
    x = tokens(6)
    _, state = module(*x)
    outs = [module(*tokens(1, seed=1), is_decoder=True, buffer_state=state)]
    other = state.clone()
    for _ in range(6):
        outs.append(module(position=state.position, is_decoder=True, buffer_state=state))
        near(outs[-1], module(outs[-2], outs[-2], outs[-2], is_decoder=True, buffer_state=other))
    assert torch.equal(state.feedback(4), torch.cat(outs[-4:], 1))
    _, k, v = tokens(1, seed=2)
    near(
        module(None, k, v, is_decoder=True, buffer_state=state),
        module(outs[-1], k, v, is_decoder=True, buffer_state=other),
    )
    assert state.feedback(0).shape == (2, 0, 2, 4)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("positions", ["absolute", "cache"])
@pytest.mark.parametrize("sinks", [0, 2])
def test_weights_and_masks_count_attended_keys_from_the_oldest(n, positions, sinks):
    """Weights times values in position order are the output; masks hide by the same order."""
    module = attention(4, sinks=sinks, positions=positions)
    x = tokens(9 + n)
    _, state = module(*x[:, :, :9])
    part = x[:, :, 9:]
    plain = module(*part, is_decoder=True, buffer_state=state.clone())
    out, weights = module(*part, is_decoder=True, buffer_state=state.clone(), needs_weights=True)
    columns = [j for j in range(9 + n) if j < sinks or j > 9 - 4]
    assert weights.shape == (2, 2, n, len(columns))
    near(out, plain)
    near(torch.einsum("bhqk,bkhd->bqhd", weights, x[2][:, columns]), plain)
    mask = torch.rand(2, 2, n, len(columns), generator=torch.Generator().manual_seed(0)) < 0.6
    mask[..., -1] = True
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    masked = weights * mask
    expected = torch.einsum("bhqk,bkhd->bqhd", masked / masked.sum(-1, keepdim=True), x[2][:, columns])
    for name, given_mask in (("att_mask", mask), ("attention_mask", bias)):
        out, seen = module(
            *part, is_decoder=True, buffer_state=state.clone(), output_attentions=True, **{name: given_mask}
        )
        near(out, expected)
        near(seen, masked / masked.sum(-1, keepdim=True))


def test_an_encoder_call_returns_weights_third():
    """And its mask may be as wide as its own tokens."""
    module = attention(4)
    x = tokens(8)
    _, state = module(*x[:, :, :5])
    mask = torch.ones(3, 3, dtype=torch.bool).tril().fill_diagonal_(True)
    out, same, weights = module(*x[:, :, 5:], buffer_state=state, att_mask=mask, needs_weights=True)
    assert same is state
    assert weights.shape == (2, 2, 3, 6)
    near(weights.sum(-1), torch.ones(2, 2, 3))
    near(out, module(*x)[0][:, 5:])


@pytest.mark.parametrize("n", [1, 2])
def test_padding_stays_with_its_tokens(n):
    """Given in one call, it hides in all later ones; what it holds reaches nothing."""
    module = attention(6)
    model = StreamModel.begin(module.config, 2, 2)
    q, k, v = tokens(4)
    hidden = torch.tensor([[True, True, False, False], [False] * 4])
    k[hidden], v[hidden] = torch.nan, torch.inf
    out, state = module(q, k, v, key_padding_mask=hidden)
    near(out, model.call(q, k, v, hidden, decode=False))
    part = tokens(n, seed=1)
    near(module(*part, is_decoder=True, buffer_state=state), model.call(*part, None, decode=True))
    late = torch.zeros(2, state.position + n, dtype=torch.bool)
    late = late[:, -min(6 + n - 1, state.position + n) :]
    late[1, -n - 1] = True
    for row, hides in zip(model.rows, late, strict=True):
        row.hidden[-1] |= hides[-n - 1]
    for seed in (2, 3):
        part = tokens(n, seed=seed)
        options = {"key_padding_mask": late} if seed == 2 else {}
        out = module(*part, is_decoder=True, buffer_state=state, **options)
        near(out, model.call(*part, None, decode=True))


@pytest.mark.parametrize("n", [1, 3])
def test_a_learned_sink_joins_the_softmax_once(n):
    """In prefill and decode."""
    module, logits = attention(4), torch.tensor([0.5, -torch.inf])
    model = StreamModel.begin(module.config, 2, 2)
    x = tokens(6)
    out, state = module(*x, sink_logits=logits)
    near(out, model.call(*x, None, decode=False, sink_logits=logits))
    part = tokens(n, seed=1)
    out, weights = module(*part, is_decoder=True, buffer_state=state.clone(), sink_logits=logits, needs_weights=True)
    expected = model.call(*part, None, decode=True, sink_logits=logits)
    near(out, expected)
    near(module(*part, is_decoder=True, buffer_state=state, sink_logits=logits), expected)
    assert weights[:, 0].sum(-1).max() < 1 - 1e-3
    near(weights[:, 1].sum(-1), torch.ones(2, n))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", [1, 4])
def test_narrow_dtypes_and_grouped_heads(dtype, group):
    """Prefill and decode stay within the tolerance of the dtype, past the end of the ring."""
    module = attention(64, heads=4, head_dim=16)
    model = StreamModel.begin(module.config, 2, 4 // group)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    state = module.new_state(2, kv_heads=4 // group, dtype=dtype)
    for seed, n in enumerate([70, *[1] * 70]):
        q, k, v = tokens(n, heads=4, head_dim=16, seed=seed, dtype=dtype)
        k, v = k[:, :, ::group], v[:, :, ::group]
        out = module(q, k, v, is_decoder=seed > 0, buffer_state=state)
        out = out if seed else out[0]
        assert out.dtype == dtype
        near(out.double(), model.call(q, k, v, None, seed > 0), tolerance)


def test_nothing_comes_of_no_tokens_and_no_rows():
    """Empty calls give empty outputs and change nothing."""
    module = attention()
    _, state = module(*tokens(3))
    out, _ = module(*tokens(0), buffer_state=state)
    assert (out.shape, state.position) == ((2, 0, 2, 4), 3)
    out, state = module(*tokens(3, batch=0))
    assert out.shape == (0, 3, 2, 4)
    assert module(*tokens(1, batch=0), is_decoder=True, buffer_state=state).shape == (0, 1, 2, 4)


def test_a_state_is_a_value():
    """Copies of every kind go on alike and share nothing."""
    module = attention(4, sinks=1)
    _, state = module(*tokens(7))
    module(*tokens(1, seed=1), is_decoder=True, buffer_state=state)
    file = io.BytesIO()
    state.save(file)
    file.seek(0)
    copies = [state.clone(), state.fork(), copy.deepcopy(state), copy.copy(state), pickle.loads(pickle.dumps(state))]
    copies += [RingBufferState.load(file, map_location="cpu"), RingBufferState.from_state_dict(state.state_dict())]
    token = tokens(1, seed=2)
    outs = [module(*token, is_decoder=True, buffer_state=one) for one in (*copies, state)]
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert {one.position for one in (*copies, state)} == {9}
    assert "position=9" in repr(state)


@pytest.mark.parametrize("loaded_first", [True, False])
def test_a_loaded_state_joins_a_live_batch(loaded_first):
    """Before any call is made on it; the batch is the module's, and goes on as the two streams do."""
    module = attention(4, sinks=1)
    _, live = module(*tokens(7, batch=1))
    _, other = module(*tokens(3, batch=1, seed=1))
    for loaded in (pickle.loads(pickle.dumps(other)), RingBufferState.from_state_dict(other.state_dict())):
        states = [loaded, live] if loaded_first else [live, loaded]
        whole, token = RingBufferState.cat(states), tokens(1, batch=2, seed=2)
        assert whole.owner == live.owner
        out = module(*token, is_decoder=True, buffer_state=whole)
        for row, state in enumerate(states):
            part = [x[row : row + 1] for x in token]
            near(out[row : row + 1], module(*part, is_decoder=True, buffer_state=state.clone()))
    unowned = [RingBufferState.from_state_dict(other.state_dict()) for _ in range(2)]
    assert RingBufferState.cat(unowned).owner is None
    _, foreign = attention(4, sinks=1)(*tokens(3, batch=1))
    with pytest.raises(ValueError, match="states must be of one module"):
        RingBufferState.cat([unowned[0], live, foreign])


def test_a_state_moves_between_dtypes_and_devices():
    """`to` copies, or is the state itself; on "meta" shapes stay."""
    module = attention(4)
    _, state = module(*tokens(6))
    assert state.to("cpu") is state
    single = state.to(dtype=torch.float32)
    token = tokens(1, seed=1)
    near(
        module(*token.float(), is_decoder=True, buffer_state=single),
        module(*token, is_decoder=True, buffer_state=state),
        1e-5,
    )
    assert single.dtype == torch.float32
    assert state.to("meta").kv.main.storage.device.type == "meta"


@pytest.mark.parametrize("sinks", [0, 2])
def test_rows_at_different_positions_are_rewound_exactly(sinks):
    """Verified tokens differ from row to row: what each row's window had evicted comes back to it."""
    module = attention(4, sinks=sinks, max_rewind=3)
    model = StreamModel.begin(module.config, 3, 2)
    x = tokens(6, batch=3)
    _, state = module(*x)
    model.call(*x, None, decode=False)
    for seed, amounts in enumerate([[0, 1, 2], [3, 0, 1], [1, 3, 0], [2, 2, 3]]):
        state.rewind(amounts)
        model.rewind(amounts)
        for step in range(3):
            token = tokens(1, batch=3, seed=10 * seed + step)
            near(module(*token, is_decoder=True, buffer_state=state), model.call(*token, None, decode=True))
    assert not state.uniform


def test_memory_is_constant():
    """Any number of steps leaves storages, their addresses and their size as they were."""
    module = attention(8)
    _, state = module(*tokens(20))
    module(*tokens(1), is_decoder=True, buffer_state=state)
    before = (state.kv.main.storage.data_ptr(), state.outputs.storage.data_ptr(), state.nbytes)
    for step in range(50):
        module(*tokens(1, seed=step), is_decoder=True, buffer_state=state)
    assert (state.kv.main.storage.data_ptr(), state.outputs.storage.data_ptr(), state.nbytes) == before
    assert len(state.cursors[0].decoded) == 1


@pytest.mark.parametrize("head_dim", [3, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_begin_at_a_cache_line(head_dim, dtype):
    """Every row of keys and values does; pointers say where the next one goes."""
    module = attention(6, head_dim=head_dim)
    _, state = module(*tokens(8, head_dim=head_dim, dtype=dtype))
    for plane in state.kv.main.planes:
        assert plane.data_ptr() % 64 == 0
        assert all(stride * dtype.itemsize % 64 == 0 for stride in plane.stride()[:3])
    assert len({plane.untyped_storage().data_ptr() for plane in state.kv.main.planes}) == 1
    assert (state.write_pointers, state.read_pointers) == ([2, 2], [2, 2])


def test_rings_are_leases_of_the_global_pool():
    """Keys and values are one buffer of type CACHE, which goes back when the last state that sees it is gone."""
    module = attention(64, head_dim=16)
    with mock.patch.object(linear_ring, "get_global_memory_pool") as pool:
        pool.return_value.empty.side_effect = lambda shape, dtype, device, role: torch.zeros(shape, dtype=dtype)
        module.new_state(2)
        roles = [call.args[3] for call in pool.return_value.empty.call_args_list]
    assert roles == ["cache", "cache"]
    state = module.new_state(2)
    held = get_global_memory_pool().get_stats()["total_allocated"]
    assert held >= state.nbytes
    again = state.kv.main.storage.data_ptr()
    del state
    gc.collect()
    assert module.new_state(2).kv.main.storage.data_ptr() == again


def test_threads_with_states_of_their_own_share_a_module():
    """Each stream is what it would be alone."""
    module = attention(4).eval()
    x = tokens(60)
    expected = module(*x)[0]
    outs: dict[int, torch.Tensor] = {}

    def stream(name):
        state = module.new_state(2, dtype=torch.float64)
        with torch.no_grad():
            parts = [module(*x[:, :, i : i + 1], is_decoder=True, buffer_state=state) for i in range(60)]
        outs[name] = torch.cat(parts, 1)

    threads = [threading.Thread(target=stream, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outs) == 6
    for out in outs.values():
        near(out, expected)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_state_outlives_the_mode_it_was_made_in(mode):
    """Made in inference mode, it goes on outside, and the other way round."""
    module = attention(4)
    model = StreamModel.begin(module.config, 2, 2)
    x = tokens(6)
    with mode():
        out, state = module(*x)
    near(out, model.call(*x, None, decode=False))
    for seed in range(4):
        token = tokens(1, seed=seed)
        with mode(seed % 2 == 0) if mode is torch.inference_mode else mode():
            out = module(*token, is_decoder=True, buffer_state=state)
        near(out, model.call(*token, None, decode=True))


def test_autocast_decides_the_dtype_of_the_ring():
    """As it does for torch's own attention."""
    module = attention(4)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = module(*tokens(6, dtype=torch.float32))
        step = module(*tokens(1, dtype=torch.float32), is_decoder=True, buffer_state=state)
    assert (out.dtype, step.dtype, state.dtype) == (torch.bfloat16,) * 3


def test_a_copy_of_the_module_holds_no_stream():
    """Neither a deep copy nor a pickle; the latest state is not part of the module."""
    module = attention(4)
    _, state = module(*tokens(6))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other._latest is None
        assert other.config == module.config
        other(*tokens(1), is_decoder=True, buffer_state=state.clone())
    assert module._latest is state
    assert not module.state_dict()
