"""Presets: one pattern, the same numbers; a table of flags; bad arguments by name."""

import pytest
import torch

from longattn import attention
from longattn.attention import (
    BlockSparseRingDilatedAttention,
    Ring,
    RingDilatedAttentionV2,
    RingDilatedAttentionV3,
    SparsePatternConfig,
    pattern_attention,
)
from longattn.attention.testing import MULTIHEAD_PRESETS, PRESET_FLAGS, PRESETS, small_inputs, small_preset
from longattn.patterncache import (
    BlockLayout,
    Dilated,
    Restrict,
)

ALL = {**PRESETS, **MULTIHEAD_PRESETS}
SHAPE = {"segment_lengths": (8, 16), "dilation_rates": (1, 2)}
SPARSE = SparsePatternConfig("bigbird", 0.3, block_size=4, local_window_size=4, num_global_tokens=1)
FLAGS = sorted({flag for flags in PRESET_FLAGS.values() for flag in flags})


def everything(name):
    """Every flag that the preset takes, on; but a lightweight pool would lease nothing of this size."""
    return dict.fromkeys(PRESET_FLAGS[name], True) | {"lightweight_pool": False}


@pytest.mark.parametrize("name", [n for n in PRESETS if not n.startswith("BlockSparse")])
@pytest.mark.parametrize("causal", [False, True])
def test_one_pattern_one_answer(name, causal):
    """Every preset over the same pattern gives the same bits, with every flag on or off."""
    q, k, v = small_inputs(name)
    expected = pattern_attention(q, k, v, Dilated(**SHAPE, causal=causal))
    assert torch.equal(small_preset(name, causal=causal)(q, k, v), expected)
    assert torch.equal(small_preset(name, causal=causal, **everything(name))(q, k, v), expected)


@pytest.mark.parametrize("name", MULTIHEAD_PRESETS)
def test_multihead_forms_are_projections_around_the_same(name):
    """With the parameters of MultiheadPatternAttention over the same pattern and schedule: the same bits; flags change nothing."""
    module = small_preset(name)
    options = {"schedule": module.attention.schedule, "fused_qkv": module.fused_qkv}
    plain = attention.MultiheadPatternAttention(16, 2, module.attention.pattern, **options)
    plain.load_state_dict(module.state_dict())
    wired = small_preset(name, **everything(name))
    wired.load_state_dict(module.state_dict())
    x = small_inputs(name)
    assert torch.equal(module(*x), plain(*x)) and torch.equal(wired(*x), plain(*x))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("name", [n for n in PRESETS if "Ring" in n])
def test_a_ring_preset_is_its_pattern_on_a_ring(name, layout):
    """Bit for bit pattern_attention with that schedule, and near Local."""
    module = small_preset(name, ring_size=3, layout=layout, causal=True)
    q, k, v = small_inputs(name, dtype=torch.float64)
    assert module.schedule == Ring(size=3, layout=layout)
    assert torch.equal(
        module(q, k, v), pattern_attention(q, k, v, module.pattern, schedule=Ring(size=3, layout=layout))
    )
    torch.testing.assert_close(module(q, k, v), pattern_attention(q, k, v, module.pattern))


def test_block_sparse_is_dilated_restricted_to_blocks():
    """The pattern is Restrict(Dilated, BlockLayout), any length is served, and other blocks are really hidden."""
    module = BlockSparseRingDilatedAttention((64,), (1,), sparse_config=SPARSE)
    assert module.pattern == Restrict(Dilated((64,), (1,)), BlockLayout("bigbird", 4, 0.3, 4, 1))
    for length in (1, 7, 61):
        q, k, v = small_inputs("DilatedAttention", length)
        expected = pattern_attention(q, k, v, Restrict(Dilated((64,), (1,)), SPARSE.block_sparse(length)))
        torch.testing.assert_close(module(q, k, v), expected)
    assert not torch.allclose(expected, pattern_attention(q, k, v, Dilated((64,), (1,))))


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"pattern_type": "adaptive"}, ValueError, "pattern_type must be one of"),
        ({"pattern_type": None}, TypeError, "pattern_type must be one of"),
        ({"sparsity_ratio": 0.0}, ValueError, "sparsity_ratio must be in"),
        ({"sparsity_ratio": "a tenth"}, TypeError, "sparsity_ratio must be a number"),
        ({"block_size": 0}, ValueError, "block_size must be an integer >= 1"),
        ({"local_window_size": -1}, ValueError, "local_window_size"),
        ({"num_global_tokens": 1.0}, TypeError, "num_global_tokens"),
        ({"seed": -1}, ValueError, "seed"),
    ],
)
def test_a_bad_sparse_config_is_named(fields, error, words):
    """By the name of its field."""
    with pytest.raises(error, match=words):
        SparsePatternConfig(**fields)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("flag", FLAGS)
def test_a_preset_takes_the_flags_of_its_row(name, flag):
    """Those of the table it takes; of others it says that it does not, and which it does."""
    if flag in PRESET_FLAGS[name]:
        assert getattr(small_preset(name, **{flag: True})._resources.wiring, flag) is True
        with pytest.raises(TypeError, match=f"{flag} must be True or False, got 'yes'"):
            small_preset(name, **{flag: "yes"})
    else:
        with pytest.raises(TypeError, match=rf"{name}\(\) does not take {flag}: of the flags it takes [a-z_, ]+$"):
            small_preset(name, **{flag: True})


def test_other_bad_arguments_are_named():
    """Unknown keywords, ring sizes, configs."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'attention_dropout': dropout is the one name"):
        small_preset("RingMultiheadDilatedAttentionV3", attention_dropout=0.1)
    with pytest.raises(ValueError, match="ring_size must be an integer >= 1, got 0"):
        RingDilatedAttentionV2(ring_size=0)
    with pytest.raises(ValueError, match="layout must be one of"):
        RingDilatedAttentionV3(layout="spiral")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sparse_config must be None or a SparsePatternConfig"):
        BlockSparseRingDilatedAttention(sparse_config={"block_size": 4})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ALL)
def test_options_of_the_modules_are_options_of_every_preset(name):
    """A slice of the heads and torchscale's gradient, by the same names; of multihead forms also the width of values."""
    if name in MULTIHEAD_PRESETS:
        module = small_preset(name, value_head_dim=4, rotary_base=100.0, merge_grad="exact")
        assert 4 == module.value_head_dim and module(*small_inputs(name)).shape == (1, 21, 16)
    else:
        module = small_preset(name, head_start=1, num_heads=3)
        assert (1, 3) == (module.head_start, module.num_heads)
        q, k, v = small_inputs(name)
        expected = pattern_attention(
            q, k, v, module.pattern, schedule=module.schedule, head_start=1, num_heads=3, merge_grad="exact"
        )
        assert torch.equal(expected, module(q, k, v))
