"""A saved streaming state may come from anywhere: what was not saved so is refused by name, and a file shows nothing of other streams."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longattn.attention import StreamingAttention, StreamingState
from longattn.patterncache import Dilated, Window

PATTERN = Dilated((4, 16), (1, 4), causal=True) | Window(3, sinks=1)


def module_of(storage=None):
    return StreamingAttention(PATTERN, num_heads=2, head_dim=4, max_rewind=2, storage=storage)


def tokens(n=1, batch=2, seed=0):
    return torch.randn(batch, n, 2, 4, generator=torch.Generator().manual_seed(seed))


def lived(storage=None):
    """A state whose rows stand at different positions, so that each has a table of its own."""
    module = module_of(storage)
    _, state = module(tokens(21), tokens(21, seed=1), tokens(21, seed=2))
    return state.rewind([1, 2])


STATES = {None: lived().state_dict(), "int8": lived("int8").state_dict()}


def changed(saved, path, value):
    """A copy with another value in one place; `value` may be a function of what stood there."""
    saved = inner = copy.deepcopy(saved)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value(inner[path[-1]]) if callable(value) else value
    return saved


FORGED = {
    "another format": (("format",), 2, "saved must be a dictionary of format 1"),
    "an unknown field": (("more",), 1, "saved must hold .* and nothing else, got 'more'"),
    "three widths": (("widths",), [4, 4, 4], "saved.widths must list .*got list of 3"),
    "no heads": (("kv_heads",), 0, "saved.kv_heads must be an integer from 1"),
    "many rows": (("batch_size",), 1 << 40, "saved.batch_size must be an integer from 0 to"),
    "a dtype of integers": (("dtype",), "int64", "saved.dtype must be one of"),
    "another storage": (("storage",), "int4", "saved.storage must be None or one of int8, fp8, got 'int4'"),
    "a list as a storage": (("storage",), [], "saved.storage must be None or one of"),
    "keys as a list": (("keys",), [], "saved.keys must be a dictionary with numbers"),
    "keys of one row": (("keys", "numbers"), lambda x: x[:1], "saved.keys.numbers must have shape"),
    "keys expanded": (("keys", "numbers"), lambda x: x[:1, :1].clone().expand(x.shape), "saved.keys.numbers must hold each number in memory"),
    "no values": (("values", "numbers"), None, "saved.values.numbers must be a dense tensor, got None"),
    "values of another width": (("values", "numbers"), lambda x: x[..., :2], "saved.values.numbers must have shape"),
    "keys without memory": (("keys", "numbers"), lambda x: x.to("meta"), "must hold data on one device, got meta"),
    "tables for three": (("tables",), lambda x: x + x[:1], "saved.tables must list one table, or one for each of 2"),
    "a table of another kind": (("tables", 0), 7, r"saved.tables\[0\] must be a dictionary"),
    "a huge position": (("tables", 0, "position"), 10**30, r"saved.tables\[0\].position must be .*got an integer of 100 bits"),
    "more to come back than there is": (("tables", 0, "restorable"), 99, r"restorable must be an integer from 0 to 20"),
    "slots of another dtype": (("tables", 0, "slots"), lambda x: x.int(), "slots must have dtype int64, got int32"),
    "slots of fewer": (("tables", 0, "slots"), lambda x: x[:, :1], "slots must have shape"),
    "positions to come": (("tables", 0, "slots"), lambda x: x + 20, "slots must hold positions below 20"),
    "a position twice": (("tables", 0, "slots"), lambda x: x.clamp(max=1), "slots must hold a position once in a head"),
    "no last query": (("tables", 0, "last"), lambda x: x * 0 - 1, "last must name a query for each slot"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_state_is_refused(name):
    """By the field's name, from a dictionary and from a file."""
    path, value, message = FORGED[name]
    saved = changed(STATES[None], path, value)
    with pytest.raises(ValueError, match=message):
        StreamingState.from_state_dict(saved)
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    with pytest.raises(ValueError, match=message):
        StreamingState.load(file)


def test_a_field_that_is_missing_is_named():
    """Each of them, scales too."""
    for name in STATES["int8"]:
        saved = {key: value for key, value in STATES["int8"].items() if key != name}
        with pytest.raises(ValueError, match="format 1" if name == "format" else f"got none of {name}"):
            StreamingState.from_state_dict(saved)
    saved = changed(STATES["int8"], ("keys",), lambda keys: {"numbers": keys["numbers"]})
    with pytest.raises(ValueError, match=r"saved.keys must hold numbers, scales, got none of scales"):
        StreamingState.from_state_dict(saved)


def leaves(value, path=()):
    """The paths to everything in nested dictionaries and lists."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from leaves(inner, (*path, key))


ODD = [None, True, -1, 0, 1, 2, 2**31, 2**47, 10**30, 1.5, float("nan"), "", "float16", "fp8", b"", [], [0], {}, torch.zeros(0), torch.zeros(2, 2, 9, 4)]  # fmt: skip


@given(storage=st.sampled_from([None, "int8"]), data=st.data(), value=st.sampled_from(ODD))
def test_any_value_anywhere_is_refused_or_harmless(storage, data, value):
    """Nothing but ValueError; what is accepted goes on, rewinds and is saved again."""
    path = data.draw(st.sampled_from([path for path in leaves(STATES[storage]) if path]))
    try:
        state = StreamingState.from_state_dict(changed(STATES[storage], path, value))
    except ValueError:
        return
    module = StreamingAttention(PATTERN, num_heads=2, head_dim=4, max_rewind=state.max_rewind, storage=state.storage)
    out, _ = module(tokens(), tokens(seed=1), tokens(seed=2), state)
    assert out.isfinite().all()
    StreamingState.from_state_dict(state.rewind(0).state_dict())


def test_a_file_shows_nothing_of_other_streams():
    """Pages that another stream gave back, and pages that are not there, hold its keys; what is saved of free slots is 0."""
    module = module_of()
    pool = module.new_pool()
    first, second = module.new_state(1, pool=pool), module.new_state(1, pool=pool)
    secret = torch.full((1, 40, 2, 4), 77.0)
    module(secret, secret, secret, first)
    first.clear(0)
    for n in (21, 1, 1):
        module(tokens(n, 1), tokens(n, 1), tokens(n, 1), second)
    saved = second.state_dict()
    assert not any((part == 77).any() for name in ("keys", "values") for part in saved[name].values())
    free = saved["tables"][0]["slots"] < 0
    assert free.any()
    assert all((saved[name]["numbers"][0][free] == 0).all() for name in ("keys", "values"))


def test_free_slots_load_as_zero():
    """Calls rely on it: 0 * NaN is NaN. The caller's tensors stay as they are."""
    saved = changed(STATES[None], ("keys", "numbers"), lambda x: x)
    free = torch.stack([table["slots"] for table in saved["tables"]]) < 0
    assert free.any()
    for name in ("keys", "values"):
        saved[name]["numbers"][free] = torch.nan
    outs = []
    for each in (saved, STATES[None]):
        outs.append(module_of()(tokens(), tokens(seed=1), tokens(seed=2), StreamingState.from_state_dict(each))[0])
    assert torch.equal(*outs)
    assert saved["keys"]["numbers"][free].isnan().all()
