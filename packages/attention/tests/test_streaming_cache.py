"""`streaming_cache`: transformers' `generate` with it gives what the model gives without a cache."""

import inspect

import pytest
import torch

from longattn.attention import PagePool, streaming_cache, use_pattern
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


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS[:2], ids=lambda p: p.name)
def test_with_a_most_length_a_model_is_compiled_once(pattern):
    """One graph for the prompt and one for all steps, without a break, padded prompts included; memory is there from the first token on."""
    torch._dynamo.reset()
    model, ids, sizes, graphs = llama(pattern), tokens(), set(), []
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    cache = streaming_cache(model, max_cache_len=44)
    assert torch.equal(
        generated(model, ids, attention_mask=mask), generated(model, ids, cache=cache, attention_mask=mask)
    )
    cache.reset()
    assert cache.is_compileable and cache.get_max_length() == 44

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model.forward, fullgraph=True, backend=count)
    with torch.no_grad():
        for step in range(20):
            end = ids.shape[1]
            call = ids if not step else ids[:, -1:]
            there = torch.cat((mask, mask.new_ones(2, 44 - mask.shape[1])), 1)
            there[:, end:] = 0
            where = (there.cumsum(1) - 1).clamp(min=0)[:, end - call.shape[1] : end]
            out = compiled(call, attention_mask=there, position_ids=where, **{KEYWORD: cache})
            sizes.add(cache.layers[0].state.pool.nbytes)
            ids = torch.cat((ids, out.logits[:, -1:].argmax(-1)), 1)
    assert len(graphs) == 2 and len(sizes) == 1
    assert torch.equal(generated(model, tokens(), attention_mask=mask), ids[:, : 21 + 20])


def test_idle_layers_lie_in_host_memory(monkeypatch):
    """Each step fetches a layer's keys and brings them back; the tokens are the same. Every move is a copy here, where all is one device."""
    moves = []

    def move(pool, device):
        moves.append((id(pool), device.type))
        pool.keys, pool.values = (x.grown(len(x.numbers), device) for x in (pool.keys, pool.values))

    model, ids = llama(PATTERNS[1]), tokens()
    expected = generated(model, ids)
    monkeypatch.setattr(PagePool, "move", move)
    cache = streaming_cache(model, offload=True)
    assert torch.equal(expected, generated(model, ids, cache=cache))
    pools = [id(layer.state.pool) for layer in cache.layers]
    assert moves == [(pool, "cpu") for pool in pools for _ in ("there", "back")] * 20
    beams = {"num_beams": 3, "count": 8}
    offloaded = streaming_cache(model, offload=True)
    assert torch.equal(generated(model, ids, **beams), generated(model, ids, cache=offloaded, **beams))


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
    for name, value in (("max_rewind", -1), ("max_cache_len", 0), ("offload", 1)):
        with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
            streaming_cache(model, **{name: value})
    with pytest.raises(ValueError, match="max_cache_len must be at least 21, the tokens of this stream, got 20"):
        model(ids, **{KEYWORD: streaming_cache(model, max_cache_len=20)})
    cache = streaming_cache(model)
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="were never attended to"):
        generated(model, ids, cache=cache)
    options = CONFIG | {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0}
    own = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**options)).eval()
    use_pattern(own, Dilated((8, 16), (1, 2)))
    with pytest.raises(ValueError, match="windows, packed sequences and masks of the model's own"):
        own(tokens(), **{KEYWORD: streaming_cache(own)})
