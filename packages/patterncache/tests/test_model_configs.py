"""Models and libraries, read from their configurations: exact counts or a refusal."""

import inspect
import os
from pathlib import Path
from types import SimpleNamespace as Config

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from longattn.patterncache import Dilated, Full, Window, from_bigbird, from_hf, from_natten
from longattn.patterncache.analysis.propagation import square
from longattn.patterncache.testing import check_pattern


def mistral(**more):
    return Config(model_type="mistral", num_hidden_layers=4, **more)


@pytest.mark.parametrize(
    ("config", "layer", "expected"),
    [
        (mistral(sliding_window=4096), 3, Window(4096)),
        (mistral(sliding_window=None), 0, Full(causal=True)),
        (Config(model_type="qwen2", num_hidden_layers=4, sliding_window=8, use_sliding_window=False), 1, Full(causal=True)),
        (Config(model_type="qwen2", num_hidden_layers=4, sliding_window=8, max_window_layers=2), 1, Full(causal=True)),
        (Config(model_type="qwen2", num_hidden_layers=4, sliding_window=8, max_window_layers=2), 2, Window(8)),
        (Config(model_type="gemma3", text_config=Config(model_type="gemma3_text", layer_types=["sliding_attention"], sliding_window=512)), 0, Window(512)),
        (Config(model_type="llama4_text", layer_types=["chunked_attention", "full_attention"], attention_chunk_size=64), 0, Dilated((64,), (1,), causal=True)),
        (Config(model_type="llama4_text", layer_types=["chunked_attention", "full_attention"], attention_chunk_size=64), 1, Full(causal=True)),
        (Config(model_type="gpt_neo", attention_layers=["global", "local"], window_size=256), 1, Window(256)),
        (Config(model_type="modernbert", layer_types=["full_attention", "sliding_attention"], sliding_window=64), 0, Full()),
        (Config(model_type="modernbert", layer_types=["full_attention", "sliding_attention"], sliding_window=64), 1, Window(65, causal=False)),
        (Config(model_type="bert", num_hidden_layers=12), 11, Full()),
        (Config(model_type="bert", num_hidden_layers=12, is_decoder=True), 0, Full(causal=True)),
        (Config(model_type="llama", num_hidden_layers=2), 0, Full(causal=True)),
        (Config(model_type="llama", num_hidden_layers=2, is_causal=False), 0, Full()),
        (mistral(sliding_window=8, is_causal=False), 0, Window(9, causal=False)),
        (Config(model_type="ultrabert", layer_types=["sliding_attention"], sliding_window=128), 0, Window(129, causal=False)),
        (Config(model_type="embedding_gemma2", text_config=Config(model_type="embedding_gemma2_text", layer_types=["sliding_attention"], sliding_window=8)), 0, Window(9, causal=False)),
        (Config(model_type="qwen2_moe", layer_types=["full_attention"], sliding_window=None, decoder_sparse_step=1, chunk_size_feed_forward=0), 0, Full(causal=True)),
    ],
)  # fmt: skip
def test_a_layer_of_a_model(config, layer, expected):
    """What transformers' own masks show, layer by layer."""
    assert from_hf(config, layer) == expected


def test_a_pattern_that_joins_a_models_tokens():
    """As many layers and heads as the model has, looking both ways where it does."""
    decoder = mistral(sliding_window=8, num_attention_heads=4, max_position_embeddings=512)
    assert Dilated.for_config(decoder) == Dilated.for_length(512, layers=4, num_heads=4)
    assert Dilated.for_config(Config(model_type="gemma3", text_config=decoder), 128, 40.0) == Dilated.for_length(
        128, 4, 40.0, 4
    )
    encoder = Config(model_type="bert", num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)
    assert Dilated.for_config(encoder).reach(2, 64, 2).complete and not Dilated.for_config(encoder).causal
    with pytest.raises(TypeError, match="num_attention_heads must be an integer"):
        Dilated.for_config(mistral(sliding_window=8), 64)
    with pytest.raises(TypeError, match="max_position_embeddings must be an integer"):
        Dilated.for_config(mistral(sliding_window=8, num_attention_heads=4))


@pytest.mark.parametrize(
    ("config", "layer", "error", "words"),
    [
        (3, 0, TypeError, "config must be a transformers configuration"),
        (mistral(sliding_window=8), 4, ValueError, "layer must be below 4"),
        (mistral(sliding_window=8), -1, ValueError, "layer must be an integer >= 0"),
        (Config(model_type="longformer", attention_window=[512]), 0, ValueError, "must not have attention_window"),
        (Config(model_type="t5", is_encoder_decoder=True), 0, ValueError, "must not have is_encoder_decoder"),
        (
            Config(model_type="gemma3_text", use_bidirectional_attention=True),
            0,
            ValueError,
            "use_bidirectional_attention",
        ),
        (
            Config(model_type="olmo3", layer_types=["linear_attention"]),
            0,
            ValueError,
            "layer_types must be .*linear_attention",
        ),
        (
            Config(model_type="olmo3", layer_types=["sliding_attention"]),
            0,
            TypeError,
            "sliding_window must be an integer",
        ),
        (Config(model_type="reformer"), 0, ValueError, "a model_type of .*got 'reformer'"),
        (Config(model_type="big_bird"), 0, ValueError, "from_bigbird"),
        (Config(model_type="x", layer_types=["sliding_attention"]), 0, ValueError, "a model_type of .*got 'x'"),
        (Config(model_type="olmo3"), 0, ValueError, "must have layer_types"),
        (Config(model_type="llama", num_hidden_layers={"vision": 2}), 0, TypeError, "num_hidden_layers must be"),
        (Config(model_type="llama", sliding_window=8), 0, ValueError, "must not have sliding_window"),
        (Config(model_type="llama", attention_block_size=8), 0, ValueError, "must not have attention_block_size"),
        (mistral(sliding_window=8, dilation_rates=[1]), 0, ValueError, "must not have dilation_rates"),
        (
            Config(
                model_type="llama4_text", layer_types=["chunked_attention"], attention_chunk_size=4, is_causal=False
            ),
            0,
            ValueError,
            "is_causal must not be False",
        ),
        (
            Config(model_type="t5gemma", is_encoder_decoder=True, text_config=Config(model_type="llama")),
            0,
            ValueError,
            "is_encoder_decoder",
        ),
    ],
)
def test_what_is_no_exact_pattern_is_refused(config, layer, error, words):
    """The message names what stands in the way."""
    with pytest.raises(error, match=words):
        from_hf(config, layer)


def test_every_configuration_of_transformers_is_read_or_refused():
    """By name; and what is said to look back only makes causal masks, in the code of its model. Nightly all of them, else some."""
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    invalid = pytest.importorskip("huggingface_hub.errors").StrictDataclassClassValidationError
    nightly = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
    both_ways = ("ultrabert", "ultravbert", "embedding_gemma2", "modernbert", "bert", "albert")
    names = list(auto.CONFIG_MAPPING)
    made, read, refused = 0, {}, {}
    for name in (
        names if nightly else {*names[::25], *both_ways, "neomme", "lxmert", "deepseek_v32", "gpt_oss", "qwen2_vl"}
    ):
        try:
            config = auto.CONFIG_MAPPING[name]()
        except (TypeError, ValueError, AttributeError, invalid):  # nothing without arguments
            continue
        made += 1
        try:
            read[name] = from_hf(config), config
        except (TypeError, ValueError) as error:
            refused[name] = str(error)
    assert (made > 400 and len(read) > 80) if nightly else (made > 20 and len(read) > 7)
    named = ("config must", "layer_types must", "_layers must")
    assert [name for name, words in refused.items() if not any(each in words for each in named)] == []
    for name, (pattern, config) in read.items():
        text = getattr(config, "text_config", None) or config
        home = inspect.getfile(type(text)).replace("configuration_", "modeling_")
        code = Path(home).read_text(encoding="utf-8")
        makes = "create_causal_mask" in code or "create_sliding_window_causal_mask" in code
        assert not pattern.causal or makes, f"{name}: {pattern}"
    assert not any(read[name][0].causal for name in both_ways)


def bigbird_by_hand(blocks, size, length, rand):
    """Row by row, as the concatenations of transformers' BigBirdBlockSparseAttention list their key blocks."""
    counts = np.zeros((len(rand), length, length), np.int64)
    for head, drawn in enumerate(rand):
        for a in range(blocks):
            if a in (0, blocks - 1):
                seen = list(range(blocks))
            elif a == 1:
                seen = [0, 1, 2, blocks - 1, *drawn[0]]
            elif a == blocks - 2:
                seen = [0, blocks - 3, blocks - 2, blocks - 1, *drawn[-1]]
            else:
                seen = [0, a - 1, a, a + 1, *drawn[a - 1], blocks - 1]
            for b in seen:
                counts[head, a * size : (a + 1) * size, b * size : (b + 1) * size] += 1
    return counts


@given(st.data(), st.integers(1, 3), st.integers(0, 3), st.integers(1, 4), st.booleans(), st.integers(0, 3))
def test_bigbird_is_what_transformers_computes(data, size, drawn, heads, trained, more):
    """Blocks that are drawn and seen already count again; in evaluation block 0 counts for every draw."""
    length = (5 + 2 * drawn) * size + 1 + more
    blocks = -(-length // size)
    config = Config(attention_type="block_sparse", block_size=size, num_random_blocks=drawn)
    rand = np.zeros((heads, blocks - 2, drawn), np.int64)
    if trained:
        cells = st.lists(st.integers(0, blocks - 1), min_size=rand.size, max_size=rand.size)
        rand = np.array(data.draw(cells), np.int64).reshape(rand.shape)
    pattern = from_bigbird(config, length, rand if trained else None)
    np.testing.assert_array_equal(pattern.to_dense(length, heads), bigbird_by_hand(blocks, size, length, rand))
    check_pattern(pattern, square(length, heads))


def test_a_short_bigbird_is_dense():
    """Up to (5 + 2 r) blocks, and with original_full."""
    config = Config(attention_type="block_sparse", block_size=64, num_random_blocks=3)
    assert from_bigbird(config, 11 * 64) == Full() != from_bigbird(config, 11 * 64 + 1)
    assert from_bigbird(Config(**{**vars(config), "attention_type": "original_full"}), 9999) == Full()


def natten_by_hand(size, kernel, stride, dilation, causal):
    """One axis, query by query: the neighborhood of the query that leads its group."""
    seen = np.zeros((size, size), np.int64)
    for residue in range(dilation):
        members = list(range(residue, size, dilation))
        for at, query in enumerate(members):
            group = members[at // stride * stride :][:stride]
            if causal:
                leader = members.index(group[-1])
                keys = [k for k in members[max(0, leader - kernel + 1) :] if k <= query]
            else:
                leader = members.index(group[min(stride // 2, len(group) - 1)])
                begin = min(max(leader - kernel // 2, 0), len(members) - kernel)
                keys = members[begin : begin + kernel]
            seen[query, keys] = 1
    return seen


@st.composite
def axis(draw):
    """(size, kernel_size, stride, dilation, is_causal) that NATTEN takes."""
    dilation, kernel = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    size = draw(st.integers(kernel * dilation, kernel * dilation + 5))
    return size, kernel, draw(st.integers(1, kernel)), dilation, draw(st.booleans())


@given(st.lists(axis(), min_size=1, max_size=2))
@example([(11, 4, 2, 2, False), (6, 3, 3, 1, True)])
def test_natten_axis_by_axis(axes):
    """A neighborhood of several axes is the product of one for each."""
    sizes, kernels, strides, dilations, causals = zip(*axes, strict=True)
    pattern = from_natten(sizes, kernels, stride=strides, dilation=dilations, is_causal=causals)
    expected = np.ones((1, 1), np.int64)
    for one in axes:
        expected = np.kron(expected, natten_by_hand(*one))
    np.testing.assert_array_equal(pattern.to_dense(len(expected), 1)[0], expected)


def test_a_causal_neighborhood_is_a_window():
    """Of any length; and one value serves all axes."""
    assert from_natten(1 << 20, 128, is_causal=True) == Window(128)
    assert from_natten((4, 4), 3) == from_natten((4, 4), (3, 3), stride=(1, 1), is_causal=(False, False))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: from_natten((2, 2, 2, 2), 1), "shape must have one to three axes"),
        (lambda: from_natten(8, 3, dilation=3), "kernel_size must be at least its stride"),
        (lambda: from_natten(8, 3, stride=4), "kernel_size must be at least its stride"),
        (lambda: from_natten((8, 8), (3, 3, 3)), "kernel_size must be one value, or one for each of 2 axes"),
        (lambda: from_natten(1 << 15, 3), "at most 268435456"),
        (lambda: from_bigbird(Config(attention_type="block_sparse", block_size=0, num_random_blocks=1), 99), "block_size"),
        (lambda: from_bigbird(Config(attention_type="block_sparse", block_size=1, num_random_blocks=1), 9, [[0]]), "rand_attn must be"),
        (lambda: from_bigbird(Config(attention_type="block_sparse", block_size=1, num_random_blocks=1), 9, [[9]] * 7), "rand_attn must name"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named(call, words):
    """The message names the parameter."""
    with pytest.raises(ValueError, match=words):
        call()
