"""Attention by name: the presets' own conventions, and xFormers'."""

import copy
import pickle
from dataclasses import asdict, dataclass, fields

import pytest
import torch

from longattn.attention import (
    DilatedAttention,
    MultiheadDilatedAttention,
    RingBufferAttention,
    RingBufferConfig,
    SparsePatternConfig,
)
from longattn.attention.integrations.attention_config import (
    AttentionConfig,
    BlockSparseConfig,
    DilatedConfig,
    MultiheadConfig,
)
from longattn.attention.integrations.factory import (
    build_attention,
    create_attention,
    find_attention,
    register_attention,
    registered_attentions,
    registered_name,
)
from longattn.attention.testing import MULTIHEAD_PRESETS, PRESET_FLAGS, PRESETS, small_inputs, small_preset

ALL = {**PRESETS, **MULTIHEAD_PRESETS}
SHAPE = {"segment_lengths": (8, 16), "dilation_rates": (1, 2)}


@dataclass
class ScaledConfig(AttentionConfig):
    """A config of a user's own."""

    gain: float = 2.0


class ScaledAttention(torch.nn.Module):
    """A user's own attention."""

    def __init__(self, dropout=0.0, gain=1.0):
        super().__init__()
        self.gain = gain

    def forward(self, q, k, v, att_mask=None, key_padding_mask=None):
        hidden = torch.zeros(k.shape[:2], dtype=torch.bool) if key_padding_mask is None else key_padding_mask
        return (v.masked_fill(hidden[:, :, None, None], 0) * self.gain).sum(1, keepdim=True)


@pytest.mark.parametrize("name", ALL)
def test_create_attention_is_the_constructor(name):
    """By the class's name and by the registered one: the same class, the same numbers, native padding."""
    sizes = {"embed_dim": 16, "num_heads": 2} if name in MULTIHEAD_PRESETS else {}
    flags = dict.fromkeys(PRESET_FLAGS[name], True)
    for spelling in (name, registered_name(name)):
        module = create_attention(spelling, **sizes, **SHAPE, causal=True, **flags)
        assert type(module) is ALL[name] and module._resources.wiring.enable_memory_pool
    if name in PRESETS and not name.startswith("BlockSparse"):
        x = small_inputs(name)
        padding = torch.rand(1, 21) > 0.6
        expected = small_preset(name, causal=True)(*x, key_padding_mask=padding)
        assert torch.equal(create_attention(name, **SHAPE, causal=True)(*x, key_padding_mask=padding), expected)


@pytest.mark.parametrize("name", ALL)
def test_opposite_padding_masks_equal_results(name):
    """What the factory builds takes True = keep; the native module True = padding."""
    options = {"segment_lengths": (8, 16), "dilation_rates": (1, 2)}
    if name in MULTIHEAD_PRESETS:
        options |= {"embed_dim": 16, "num_heads": 2}
    if name.startswith("BlockSparse"):
        options["sparse_config"] = SparsePatternConfig("local_window", block_size=4, local_window_size=4)
    built = build_attention({"name": registered_name(name), **options})
    native = ALL[name](**options)
    native.load_state_dict(built.state_dict())
    x, padding = small_inputs(name), torch.rand(1, 21) > 0.6
    mask = torch.rand(21, 21) > 0.2
    expected = native(*x, key_padding_mask=padding, attention_mask=mask)
    assert torch.equal(built(*x, key_padding_mask=~padding, att_mask=mask), expected)
    assert not torch.equal(built(*x, key_padding_mask=padding, att_mask=mask), expected)
    assert torch.equal(built(*x), native(*x))
    blanks = (None,) * (6 - len(x) - 1)  # by place, too: query, key, value, is_causal, attention_mask, key_padding_mask
    assert torch.equal(built(*x, *blanks, ~padding), native(*x, *blanks, padding))
    for twin in (copy.deepcopy(built), pickle.loads(pickle.dumps(built))):
        assert torch.equal(twin(*x, key_padding_mask=~padding, att_mask=mask), expected)


def test_configs_are_objects_or_mappings():
    """The same module from either; fields are the constructor's, so their defaults are too."""
    config = DilatedConfig("dilated", 0.1, (8, 16), (1, 2), causal=True)
    for given in (config, asdict(config)):
        module = build_attention(given)
        assert type(module) is DilatedAttention and module.dropout == 0.1 and module.pattern.causal
    assert build_attention({"name": "dilated"}).pattern == DilatedAttention().pattern
    sparse = SparsePatternConfig("bigbird", block_size=4)
    module = build_attention(BlockSparseConfig("block_sparse_ring_dilated", sparse_config=sparse))
    assert module.pattern.b == sparse.layout()
    many = build_attention(MultiheadConfig("multihead_dilated", 0.0, 16, 2, options={"causal": True, "kv_heads": 1}))
    assert type(many) is MultiheadDilatedAttention and many.kv_heads == 1


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_has_every_argument_of_its_preset(name):
    """Flags included; none that it does not take."""
    _, config = find_attention(name)
    found = {f.name for f in fields(config)}
    assert set(PRESET_FLAGS[name]) == {f for f in found if f in {flag for fs in PRESET_FLAGS.values() for flag in fs}}
    assert {"name", "dropout", "segment_lengths", "dilation_rates", "heads", "causal"} <= found


def test_ring_buffer_by_name():
    """From its config, from a mapping, by create_attention: the class; what is built takes True = keep, and hides no attribute."""
    config = RingBufferConfig(num_heads=2, head_dim=8, buffer_size=16, dropout=0.0)
    q, k, v = torch.randn(3, 1, 21, 2, 8)
    padding = torch.rand(1, 21) > 0.6
    mask = torch.rand(21, 21) > 0.2
    direct = [RingBufferAttention(config), RingBufferAttention.from_config(config)]
    direct.append(create_attention("RingBufferAttention", num_heads=2, head_dim=8, buffer_size=16, dropout=0.0))
    expected, _ = direct[0](q, k, v, key_padding_mask=padding, att_mask=mask)
    for module in direct:
        assert type(module) is RingBufferAttention and module.config == config
        assert torch.equal(module(q, k, v, key_padding_mask=padding, att_mask=mask)[0], expected)
    for given in (config, {"name": "ring_buffer", **asdict(config)}):
        built = build_attention(given)
        assert type(built) is RingBufferAttention and built.config == config
        assert built.tiling_processor.tile_order == direct[0].tiling_processor.tile_order
        assert torch.equal(built(q, k, v, key_padding_mask=~padding, att_mask=mask)[0], expected)
        assert not torch.equal(built(q, k, v, key_padding_mask=padding, att_mask=mask)[0], expected)
    assert find_attention("ring_buffer") == (RingBufferAttention, RingBufferConfig)


def test_a_users_own_attention_is_registered_and_built():
    """By the decorator; a second registration of the class is the same one, of another class is refused."""
    register_attention("scaled", ScaledConfig)(ScaledAttention)
    assert register_attention("scaled", ScaledConfig)(ScaledAttention) is ScaledAttention
    assert "scaled" in registered_attentions()
    v = torch.ones(1, 5, 1, 1)
    keep = torch.tensor([[True, True, False, False, False]])
    assert build_attention({"name": "scaled", "gain": 3.0})(v, v, v, key_padding_mask=keep).item() == 6
    assert build_attention(ScaledConfig("scaled"))(v, v, v).item() == 10
    assert create_attention("scaled", gain=3.0)(v, v, v, key_padding_mask=keep).item() == 9
    with pytest.raises(ValueError, match="name must not be taken, got 'dilated'"):
        register_attention("dilated")(ScaledAttention)


def test_a_built_module_compiles():
    """In one graph, the hook included."""
    torch._dynamo.reset()
    built = build_attention({"name": "dilated", **SHAPE})
    x, keep = small_inputs("DilatedAttention"), torch.rand(1, 21) > 0.3
    compiled = torch.compile(built, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*x, key_padding_mask=keep), built(*x, key_padding_mask=keep))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: create_attention("flash"), ValueError, "name must be one of dilated, .*, got 'flash'"),
        (lambda: create_attention(DilatedAttention), TypeError, "name must be a string"),
        (lambda: create_attention("dilated", colour=1), TypeError, "unexpected keyword argument 'colour'"),
        (lambda: create_attention("dilated", use_pattern_cache=True), TypeError, "does not take use_pattern_cache"),
        (
            lambda: build_attention({"name": "dilated", "colour": 1}),
            TypeError,
            "config must have entries among .* got colour",
        ),
        (lambda: build_attention({"dropout": 0.1}), TypeError, "name must be a string, got None"),
        (lambda: build_attention(3), TypeError, "config must be a mapping with a name"),
        (lambda: build_attention({"name": "multihead_dilated"}), TypeError, "embed_dim must be an integer"),
        (lambda: register_attention(1), TypeError, "name must be a string"),
        (lambda: register_attention("x", dict), TypeError, "config must be a dataclass"),
        (lambda: register_attention("x")(len), TypeError, "constructor must be an nn.Module"),
    ],
)
def test_what_is_wrong_is_named(call, error, words):
    """By its parameter, with what was expected."""
    with pytest.raises(error, match=words):
        call()
