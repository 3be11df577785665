"""A saved state may come from anywhere: what was not saved so is refused by name, and no file or call shows memory that nobody wrote."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from longattn.attention import RingBufferAttention, RingBufferConfig, RingBufferState
from longattn.attention.ring_buffer.serialization import from_dict
from longattn.attention.ring_buffer.testing import stale_slots_hold_nan
from longattn.attention.saved_fields import MOST_TOKENS

SIZES = {"num_heads": 4, "head_dim": 4, "buffer_size": 4, "sinks": 1, "max_rewind": 3}


def module_of(**options):
    return RingBufferAttention(RingBufferConfig(**{"dropout": 0.0, **SIZES, **options}))


def tokens(n=1, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, n, heads, 4, generator=generator) for heads in (4, 2, 2)]


def lived(module):
    """A state with padding, feedback, evicted tokens, and rows at different positions."""
    padding = torch.tensor([[True, False, False, False, True, True, False], [False] * 7])
    with stale_slots_hold_nan():
        _, state = module(*tokens(7), key_padding_mask=padding)
        for seed in range(3):
            module(*tokens(seed=seed + 1), is_decoder=True, buffer_state=state)
        return state.rewind([1, 3])


STATE = lived(module_of()).state_dict()


def put(*path, value):
    """A change of one field; `value` is a function of what stood there, or what stands there now."""

    def change(saved):
        for key in path[:-1]:
            saved = saved[key]
        saved[path[-1]] = value(saved.get(path[-1]) if isinstance(saved, dict) else saved) if callable(value) else value

    return change


def drop(*path):
    """A change that removes one field."""

    def change(saved):
        for key in path[:-1]:
            saved = saved[key]
        del saved[path[-1]]

    return change


FORGED = {
    "another format": (put("format", value=True), "saved must be a dictionary of format 1"),
    "no rings": (drop("rings"), "saved must hold .*, got none of rings"),
    "an unknown field": (put("extra", value=1), "saved must hold .* and nothing else, got 'extra'"),
    "an unknown key": (put(3, value=1), "saved must hold .* and nothing else, got 3"),
    "an unknown dtype": (put("dtype", value="load"), "saved.dtype must be one of float16, .*got 'load'"),
    "an integer dtype": (put("dtype", value="int64"), "saved.dtype must be one of"),
    "a wide dtype": (put("dtype", value="float64"), "saved.rings.kv must have dtype float64, got float32"),
    "a list as dtype": (put("dtype", value=[]), "saved.dtype must be one of .*got list of 0"),
    "batch of another size": (put("batch_size", value=3), "saved.clocks must list one clock, or one for each of 3"),
    "a negative batch": (put("batch_size", value=-1), "saved.batch_size must be an integer from 0 to"),
    "a float batch": (put("batch_size", value=2.0), "saved.batch_size must be an integer"),
    "no geometry": (put("geometry", value=None), "saved.geometry must be a dictionary"),
    "a geometry without heads": (drop("geometry", "num_heads"), "saved.geometry must hold .*, got none of num_heads"),
    "a geometry with more": (put("geometry", "group", value=2), "saved.geometry must hold .* and nothing else"),
    "a negative prefix": (put("geometry", "sinks", value=-1), "saved.geometry.sinks must be an integer from 0"),
    "an empty ring": (put("geometry", "buffer_size", value=0), "saved.geometry.buffer_size must be an integer from 1"),
    "a truth as a size": (put("geometry", "head_dim", value=True), "saved.geometry.head_dim must be an integer"),
    "heads that do not divide": (put("geometry", "kv_heads", value=3), "kv_heads must divide num_heads=4, got 3"),
    "a huge ring": (put("geometry", "buffer_size", value=1 << 40), "saved must describe rings of at most"),
    "a huge rewind": (put("geometry", "max_rewind", value=1 << 47), "saved must describe rings of at most"),
    "a size past all": (put("geometry", "head_dim", value=10**30), "head_dim must be .*got an integer of 100 bits"),
    "one head for two": (
        put("rings", "kv", value=lambda x: x[:, :, :1]),
        r"saved.rings.kv must have shape \(2, 2, 2, 5, 4\), .*got \(2, 2, 1, 5, 4\)",
    ),
    "one row for two": (put("rings", "kv", value=lambda x: x[:, :1]), "saved.rings.kv must have shape"),
    "no slots": (put("rings", "kv", value=lambda x: x[..., :0, :]), "saved.rings.kv must have shape"),
    "keys without values": (put("rings", "kv", value=lambda x: x[:1]), "saved.rings.kv must have shape"),
    "no evicted slots": (put("rings", "kv_evicted", value=lambda x: x[..., :1, :]), "saved.rings.kv_evicted must have shape"),
    "no evicted ring": (drop("rings", "kv_evicted"), "saved.rings must hold .*, got none of kv_evicted"),
    "no evicted padding": (drop("rings", "hidden_evicted"), "saved.rings must hold .*, got none of hidden_evicted"),
    "evicted padding alone": (drop("rings", "hidden"), "saved.rings must hold .*got 'hidden_evicted'"),
    "outputs of fewer": (put("rings", "outputs", value=lambda x: x[..., :1, :]), "saved.rings.outputs must have shape"),
    "no outputs": (drop("rings", "outputs"), "saved.rings must hold .*, got none of outputs"),
    "an unknown ring": (put("rings", "more", value=torch.zeros(1)), "saved.rings must hold .*got 'more'"),
    "a list as a ring": (put("rings", "kv", value=lambda x: x.tolist()), "saved.rings.kv must be a dense tensor, got list of 2"),
    "a sparse ring": (put("rings", "kv", value=lambda x: x.to_sparse()), "saved.rings.kv must be a dense tensor"),
    "padding as numbers": (put("rings", "hidden", value=lambda x: x.float()), "saved.rings.hidden must have dtype bool"),
    "rings as a list": (put("rings", value=list), "saved.rings must be a dictionary"),
    "rings on two devices": (put("rings", "outputs", value=lambda x: x.to("meta")), "outputs must be on the device of kv"),
    "no clocks": (put("clocks", value=[]), "saved.clocks must list one clock, or one for each of 2"),
    "clocks for three": (put("clocks", value=lambda x: x + x[:1]), "saved.clocks must list one clock, or one for each of 2"),
    "a clock of another kind": (put("clocks", 0, value=7), r"saved.clocks\[0\] must be a dictionary"),
    "a clock without position": (drop("clocks", 1, "position"), r"saved.clocks\[1\] must hold .*, got none of position"),
    "a later position": (put("clocks", 0, "position", value=10**30), r"clocks\[0\].position must be an integer from 0 to"),
    "a negative position": (put("clocks", 0, "position", value=-1), "position must be an integer from 0 to"),
    "a float position": (put("clocks", 0, "position", value=9.0), "position must be an integer from 0 to"),
    "fewer fed than decoded": (put("clocks", 0, "fed", value=1), "decoded must count at most fed=1 tokens"),
    "negative outputs": (put("clocks", 0, "fed", value=-1), "fed must be an integer from 0 to"),
    "late outputs": (put("clocks", 0, "fed_restorable", value=MOST_TOKENS + 1), "fed_restorable must be an integer"),
    "decoded past the end": (put("clocks", 0, "decoded", value=[[7, 9]]), "decoded must rise and end at position=9"),
    "decoded twice": (put("clocks", 0, "decoded", value=[[7, 1], [7, 1]]), "decoded must rise and end at position=9"),
    "decoded of three": (put("clocks", 0, "decoded", value=[[7, 1, 1]]), "decoded must hold pairs .*got list of 3"),
    "decoded backwards": (put("clocks", 0, "decoded", value=[[8, -1]]), "decoded must be an integer from 0"),
    "decoded too often": (put("clocks", 0, "decoded", value=[[n, 0] for n in range(5)]), "decoded must list at most buffer_size=4"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_state_is_refused(name):
    """By the field's name, from a dictionary, a file and a pickle alike."""
    change, message = FORGED[name]
    saved = copy.deepcopy(STATE)
    change(saved)
    with pytest.raises(ValueError, match=message):
        RingBufferState.from_state_dict(saved)
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    with pytest.raises(ValueError, match=message):
        RingBufferState.load(file)


@pytest.mark.parametrize(
    "saved", [None, [], 3, {}, {"format": 10**5000}, {"format": [1]}], ids=lambda x: type(x).__name__
)
def test_what_is_no_state_is_refused(saved):
    """Whatever it is."""
    with pytest.raises(ValueError, match="saved must be a dictionary of format 1 from state_dict"):
        RingBufferState.from_state_dict(saved)


def leaves(value, path=()):
    """The paths to everything in nested dictionaries and lists."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from leaves(inner, (*path, key))


PATHS = [path for path in leaves(STATE) if path]
ODD = [None, True, -1, 0, 1, 2, 5, 2**31, 2**48, 2**63, 10**30, 1.5, float("nan"), "", "float32", b"", [], [0], [[0, 0]], {}, torch.zeros(0), torch.zeros(2, 2, 2, 5, 4)]  # fmt: skip


@given(path=st.sampled_from(PATHS), value=st.sampled_from(ODD))
@example(path=("clocks", 1, "position"), value=5)  # the window there would hold tokens that are said to be lost
def test_any_value_anywhere_is_refused_or_harmless(path, value):
    """Nothing but ValueError; what is accepted decodes to numbers, rewinds, and shows no memory that was not written."""
    saved = copy.deepcopy(STATE)
    put(*path, value=value)(saved)
    with stale_slots_hold_nan():
        try:
            state = RingBufferState.from_state_dict(saved)
        except ValueError:
            return
        module = module_of(**{name: getattr(state.geometry, name) for name in (*SIZES, "bptt_calls")})
        assert state.feedback(state.feedback_held).isfinite().all()
        out = module(*tokens(), is_decoder=True, buffer_state=state)
        assert out.isfinite().all()
        state.rewind(1)
        assert module(*tokens(3), buffer_state=state)[0].isfinite().all()
        assert written(state)


def written(state):
    """Whether all that a state would save is finite: slots that nobody wrote hold NaN."""
    return all(x.isfinite().all() for x in state.state_dict()["rings"].values())


def test_what_was_never_written_is_not_saved():
    """Of evicted slots, and of outputs that only some rows of the batch have; also where states join."""
    module = module_of()
    with stale_slots_hold_nan():
        _, other = module(*tokens(6, batch=1))
        state = lived(module)
        whole = RingBufferState.cat([state, other])
        assert all(map(written, (state, other, whole, whole.fork(2), whole.reorder([2, 0]))))
        module(*tokens(), is_decoder=True, buffer_state=whole)
        assert written(whole)


def test_padding_and_empty_slots_load_as_zero():
    """Calls rely on it: 0 * NaN is NaN."""
    saved = copy.deepcopy(STATE)
    rings = saved["rings"]
    for kv, hidden in (("kv", "hidden"), ("kv_evicted", "hidden_evicted")):
        assert rings[hidden].any()
        rings[kv].masked_fill_(rings[hidden], torch.nan)
    module = module_of()
    out = module(*tokens(), is_decoder=True, buffer_state=RingBufferState.from_state_dict(saved))
    assert torch.equal(out, module(*tokens(), is_decoder=True, buffer_state=RingBufferState.from_state_dict(STATE)))


def test_a_state_of_every_kind_is_saved_whole():
    """Loading and saving again give the same bits; also of no rows, and rows that were picked away."""
    module = module_of()
    _, empty = module(*tokens(3, batch=0))
    fresh = module_of(max_rewind=0).new_state(2)
    states = [lived(module), module.new_state(1), empty, fresh, lived(module).reorder([])]
    states += [RingBufferState.cat([empty, empty]), lived(module).rewind([9, 7])]
    for state in states:
        again = pickle.loads(pickle.dumps(state))
        first, second = state.state_dict(), again.state_dict()
        rings, copies = first.pop("rings"), second.pop("rings")
        assert first == second and rings.keys() == copies.keys()
        assert all(torch.equal(rings[name], copies[name]) for name in rings)


def test_a_state_goes_to_a_floating_dtype():
    """And to no other; from meta it does not come back."""
    state = lived(module_of())
    with pytest.raises(ValueError, match="dtype must be one of float16, .*got int64"):
        state.to(dtype=torch.int64)
    saved = state.state_dict()
    saved["rings"] = {name: ring.to("meta") for name, ring in saved["rings"].items()}
    with pytest.raises(ValueError, match="saved.rings must hold data to go to cpu, got tensors on meta"):
        from_dict(RingBufferState, saved, torch.device("cpu"))


def test_a_stream_that_begins_again_forgets_what_was_lost():
    """Rewound to its sinks and written on, it keeps as many evicted tokens as any other."""
    module = module_of()
    with stale_slots_hold_nan():
        _, state = module(*tokens(4))
        _, state = module(*tokens(3, seed=1), buffer_state=state)
        module(*tokens(3, seed=2), buffer_state=state)
        state.rewind(3)
        state.rewind(0)
        for _ in range(3):
            module(*tokens(), is_decoder=True, buffer_state=state)
    fresh = state.clone()
    assert all(c.restorable <= max(1, c.position - 4) for c in fresh.cursors)
    RingBufferState.from_state_dict(state.state_dict()).rewind(1)
