"""`streaming_cache`: transformers' `generate` with it gives what the model gives without a cache."""

import inspect

import pytest
import torch

from longattn.attention import streaming_cache, use_pattern
from longattn.patterncache import BlockLayout, Dilated, Full, Window

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: the extra of that name brings it"
)

KEYWORD = (
    "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"
)
"""What transformers calls the cache: the older name warns where the newer one is there."""

PATTERNS = [Full(), Dilated((8, 16), (1, 2)), Window(6, sinks=2), BlockLayout("bigbird", 4, 0.2, 4, 1)]
CONFIG = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def llama(pattern=None, **options):
    """The same random weights each time, in float64, with a pattern."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**CONFIG | options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    if pattern is not None:
        use_pattern(model, pattern)
    return model


def tokens(batch=2, length=21):
    """Never the padding token."""
    return torch.randint(1, 60, (batch, length), generator=torch.Generator().manual_seed(1))


def generated(model, ids, count=20, cache=None, **options):
    """Greedy tokens, with a cache or without any."""
    options |= {"use_cache": False} if cache is None else {KEYWORD: cache}
    return model.generate(ids, max_new_tokens=count, do_sample=False, **options)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
def test_generate_equals_the_model_without_a_cache(pattern):
    """Alone, with padding on the left, and with beams."""
    model, ids = llama(pattern), tokens()
    cache = streaming_cache(model)
    assert torch.equal(generated(model, ids), generated(model, ids, cache=cache))
    assert 40 == cache.get_seq_length() and all(layer.state.positions == [40, 40] for layer in cache.layers)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    padded = {"attention_mask": mask}
    expected = generated(model, ids.masked_fill(mask == 0, 0), **padded)
    assert torch.equal(
        expected, generated(model, ids.masked_fill(mask == 0, 0), cache=streaming_cache(model), **padded)
    )
    beams = {"num_beams": 3, "count": 8}
    assert torch.equal(generated(model, ids, **beams), generated(model, ids, cache=streaming_cache(model), **beams))


@pytest.mark.parametrize("pattern", PATTERNS[1:3], ids=lambda p: p.name)
def test_assisted_decoding_rewinds(pattern):
    """Candidates of a lookup and of an assistant are taken back, within max_rewind; beyond it, that is said."""
    model, ids = llama(pattern), tokens(batch=1)
    expected = generated(model, ids)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": llama()}):
        cache = streaming_cache(model, max_rewind=30)
        assert torch.equal(expected, generated(model, ids, cache=cache, **options))
    with pytest.raises(ValueError, match="tokens must be from 0 to 0, those that can come back"):
        generated(model, ids, cache=streaming_cache(model), prompt_lookup_num_tokens=3)


def test_a_window_holds_no_more_than_its_keys():
    """However long the stream; a reset cache serves another prompt."""
    model, ids = llama(Window(6, sinks=2)), tokens()
    cache = streaming_cache(model)
    generated(model, ids, cache=cache)
    held = cache.layers[0].state.positions_held()
    assert all([0, 1, *range(35, 40)] == head for head in held)
    cache.reset()
    assert torch.equal(generated(model, ids[:1]), generated(model, ids[:1], cache=cache))


def test_what_does_not_work_is_refused_by_name():
    """Another attention, holes in the mask, soft caps, windows of the model's own, offloading."""
    with pytest.raises(
        ValueError, match="model must have a pattern of longattn as its attn_implementation, got 'eager'"
    ):
        streaming_cache(llama())
    model, ids = llama(Full()), tokens()
    mask = torch.ones_like(ids)
    mask[0, 5] = 0
    with pytest.raises(ValueError, match="attention_mask must have its padding on the left"):
        model(ids, attention_mask=mask, **{KEYWORD: streaming_cache(model)})
    cache = streaming_cache(model)
    with pytest.raises(NotImplementedError, match="does not move its layers"):
        cache.offload(0)
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="were never attended to"):
        generated(model, ids, cache=cache)
    options = CONFIG | {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0}
    own = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**options)).eval()
    use_pattern(own, Dilated((8, 16), (1, 2)))
    with pytest.raises(ValueError, match="windows, packed sequences and masks of the model's own"):
        own(tokens(), **{KEYWORD: streaming_cache(own)})
