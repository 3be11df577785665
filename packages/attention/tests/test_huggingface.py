"""Patterns as attention of Hugging Face models: a small Llama with random weights, trained and generating."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longattn.attention.integrations import transformers_calls
from longattn.attention.integrations.huggingface import (
    DEFAULT_PATTERNS,
    attention_function,
    mask_function,
    register_with_transformers,
)
from longattn.attention.integrations.transformers_calls import HARMLESS
from longattn.patterncache import BlockLayout, Dilated, Full, Rectangle, Span, Window

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: the extra of that name brings it"
)

PATTERNS = {
    "longattn_full": Full(causal=True),
    "longattn_dilated": Dilated((8, 16), (1, 2), causal=True),
    "longattn_window": Window(6, sinks=2),
    "longattn_block_sparse": BlockLayout("bigbird", 4, 0.2, 4, 1, causal=True),
}
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


@pytest.fixture(scope="module", autouse=True)
def _registered():
    assert register_with_transformers(PATTERNS) == tuple(PATTERNS)


def llama(implementation, **options):
    """The same random weights for every implementation, float64."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**CONFIG | options)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).double().eval()


def tokens(batch=2, length=21):
    """Never the padding token."""
    return torch.randint(1, 60, (batch, length), generator=torch.Generator().manual_seed(1))


def eager_logits(implementation, ids):
    """What eager attention gives under the pattern as a mask, log counts included."""
    counts = PATTERNS[implementation].counts(Rectangle(4, Span(0, ids.shape[1]), Span(0, ids.shape[1])))
    bias = torch.from_numpy(counts).double().log().unsqueeze(0).expand(ids.shape[0], -1, -1, -1)
    # transformers adds its masks to scores; rows are never blind here, so -inf is safe.
    return llama("eager")(ids, attention_mask=bias).logits


@pytest.mark.parametrize("implementation", PATTERNS)
def test_logits_are_eagers_under_the_pattern(implementation):
    """And for Full, eager's own."""
    ids = tokens()
    found = llama(implementation)(ids).logits
    torch.testing.assert_close(found, eager_logits(implementation, ids))
    plain = llama("eager")(ids).logits
    assert torch.allclose(found, plain) == (implementation == "longattn_full")


@pytest.mark.parametrize("implementation", PATTERNS)
def test_trains(implementation):
    """The loss falls, and every parameter has a gradient; with dropout and checkpointing."""
    model = llama(implementation, attention_dropout=0.1).train()
    model.activation_checkpointing_enable()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(tokens(), labels=tokens(), use_cache=False).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_training_is_eagers_for_full():
    """The same gradients."""
    grads = []
    for implementation in ("eager", "longattn_full"):
        model = llama(implementation).train()
        model(tokens(), labels=tokens()).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("implementation", PATTERNS)
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_generates_what_the_whole_sequence_says(implementation, cache):
    """Greedy tokens with a cache are those of logits without one, token by token."""
    model, ids = llama(implementation), tokens(2, 9)
    out = model.generate(ids, max_new_tokens=8, do_sample=False, disable_compile=True, **cache)
    for length in range(9, 17):
        assert torch.equal(model(out[:, :length]).logits[:, -1].argmax(-1), out[:, length])


@pytest.mark.parametrize("implementation", PATTERNS)
@pytest.mark.parametrize("beams", [1, 3])
def test_left_padding_changes_nothing(implementation, beams):
    """A padded prompt generates what it generates alone: a pattern's positions begin after the padding."""
    model, ids = llama(implementation), tokens(3, 11)
    mask = torch.ones_like(ids)
    for row, padded in enumerate((4, 0, 7)):
        mask[row, :padded] = 0
    options = {"max_new_tokens": 7, "num_beams": beams, "do_sample": False}
    out = model.generate(ids.masked_fill(mask == 0, 0), attention_mask=mask, **options)
    for row, padded in enumerate((4, 0, 7)):
        alone = model.generate(ids[row : row + 1, padded:], **options)
        assert torch.equal(out[row, padded:], alone[0])


def test_a_padded_step_that_sees_few_keys_reads_those_alone(monkeypatch):
    """Keys of each head by themselves, counts of two included; tokens are those of the prompt alone, with a hole in it too."""
    gathered = []
    original = transformers_calls._gather_keys
    monkeypatch.setattr(transformers_calls, "_gather_keys", lambda x, rows: gathered.append(rows) or original(x, rows))
    model, ids = llama("longattn_dilated"), tokens(2, 80)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    options = {"max_new_tokens": 20, "do_sample": False}
    out = model.generate(ids.masked_fill(mask == 0, 0), attention_mask=mask, **options)
    for row, padded in enumerate((0, 37)):
        assert torch.equal(out[row, padded:], model.generate(ids[row : row + 1, padded:], **options)[0])
    assert gathered and max(rows.shape[-1] for rows in gathered) <= 16


def test_beams_are_eagers_for_full():
    """Beam search, left-padded; in float32, since eager's own mask is NaN for padded rows in float64."""
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "num_beams": 4, "do_sample": False}
    found, expected = (
        llama(name).float().generate(tokens(2, 9), return_dict_in_generate=True, output_scores=True, **options)
        for name in ("longattn_full", "eager")
    )
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores)


def test_right_padding_hides_keys():
    """Logits of real tokens are those without it."""
    model, ids = llama("longattn_dilated"), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[0, :8], model(ids[:1, :8]).logits[0])


def mistral(implementation):
    """The same random weights, with a sliding window of 5 and a window's cache."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(**CONFIG, sliding_window=5)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).double().eval()


def test_a_models_own_window_is_kept():
    """Mistral's sliding window under Full is eager's, also with the cache that drops keys."""
    models = {name: mistral(name) for name in ("eager", "longattn_full")}
    ids = tokens()
    torch.testing.assert_close(models["longattn_full"](ids).logits, models["eager"](ids).logits)
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = models["eager"].generate(ids, **options)
    assert torch.equal(models["longattn_full"].generate(ids, **options), expected)


@pytest.mark.parametrize("implementation", ["longattn_dilated", "longattn_window", "longattn_relative"])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=str)
def test_a_pattern_within_a_models_own_window_keeps_its_positions(implementation, cache):
    """With caches that drop keys or have room, and padding on the left: what is generated is what the whole sequence says."""
    register_with_transformers(PATTERNS | {"longattn_relative": Window(3)})
    model, ids = mistral(implementation), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    out = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, disable_compile=True, **cache)
    for row, begin in ((0, 3), (1, 0)):
        for length in range(9, 17):
            expected = model(out[row : row + 1, begin:length]).logits[0, -1].argmax()
            assert expected == out[row, length]


def test_positions_within_a_models_own_window_are_eagers():
    """The whole sequence under Dilated and Mistral's window is eager under both as one mask."""
    ids, span = tokens(), Span(0, 21)
    counts = PATTERNS["longattn_dilated"].counts(Rectangle(4, span, span))
    counts = torch.from_numpy(counts * Window(5).counts(Rectangle(4, span, span))).double()
    expected = mistral("eager")(ids, attention_mask=counts.log().nan_to_num(neginf=-1e9)[None].expand(2, -1, -1, -1))
    found = mistral("longattn_dilated")(ids).logits
    assert (counts.sum(-1) > 0).all()
    torch.testing.assert_close(found, expected.logits)


def test_what_cannot_be_done_says_so():
    """Bad registrations, by name."""
    with pytest.raises(TypeError, match="patterns must be a mapping with names as keys"):
        register_with_transformers({1: Full()})
    with pytest.raises(TypeError, match="pattern must be a Pattern"):
        register_with_transformers({"longattn_other": "full"})
    with pytest.raises((KeyError, ValueError, ImportError)):
        llama("longattn_other")
    with pytest.raises(ValueError, match="patterns must have names other than use_pattern's, got 'longattn'"):
        register_with_transformers({"longattn": Full()})


@pytest.mark.parametrize("name", ["longattn_full", "longattn_dilated"])
def test_softcaps_are_eagers(name):
    """Gemma 2 caps scores before it masks them: padded, within its sliding window, and the gradients; under a pattern too."""
    # Scores are large enough for the cap to bend them.
    options = CONFIG | {"head_dim": 8, "query_pre_attn_scalar": 1, "initializer_range": 0.3, "sliding_window": 6}

    def gemma(implementation, cap=0.5):
        torch.manual_seed(0)
        config = transformers.Gemma2Config(**options, attn_logit_softcapping=cap)
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)

    models = gemma("eager"), gemma(name)
    ids, mask = tokens(2, 21), torch.ones(2, 21, dtype=torch.int64)
    seen = mask
    if name == "longattn_full":
        mask[0, :5] = 0
    else:
        counts = torch.from_numpy(PATTERNS[name].counts(Rectangle(4, Span(0, 21), Span(0, 21)))).double()
        both = counts * torch.from_numpy(Window(6).counts(Rectangle(4, Span(0, 21), Span(0, 21))))
        full, window = (x.log().nan_to_num(neginf=-1e9).float()[None].expand(2, -1, -1, -1) for x in (counts, both))
        seen = {"full_attention": full, "sliding_attention": window}
    found = [
        model(ids, attention_mask=given).logits[mask > 0] for model, given in zip(models, (seen, mask), strict=True)
    ]
    # In float32: eager's softmax is, and gives NaN for padding in a wider model.
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-3)
    expected, ours = (
        torch.autograd.grad(x.square().sum(), m.model.embed_tokens.weight) for x, m in zip(found, models, strict=True)
    )
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-3)
    assert (gemma(name, None)(ids, attention_mask=mask).logits[mask > 0] - found[1]).abs().max() > 1e-3


def test_the_default_names():
    """One call registers four patterns, all causal ones."""
    assert set(DEFAULT_PATTERNS) == {"longattn_full", "longattn_dilated", "longattn_window", "longattn_block_sparse"}
    assert all(pattern.causal for pattern in DEFAULT_PATTERNS.values())


LAYER = torch.nn.Module()
"""A layer of a decoder, as far as an attention function asks."""
LAYER.is_causal = True


def heads(seed, keys=7, number=3):
    """q, k and v as a layer gives them: (batch, heads, seq, head_dim)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, keys, 8, generator=generator, dtype=torch.float64) for _ in range(number)]


@pytest.mark.parametrize("name", ["indices", "block_indices", "sinks", "cu_seq_lens_q", "max_length_k", "alibi"])
def test_what_a_layer_says_and_we_do_not_know_is_refused(name):
    """By name, with the way out; None and False say nothing."""
    attention = attention_function(Full())
    with pytest.raises(ValueError, match=f"{name} must be None for a pattern(?s:.*)(use|give) "):
        attention(LAYER, *heads(1), None, **{name: torch.zeros(1)})
    attention(LAYER, *heads(1), None, **{name: None}, output_attentions=False)
    with pytest.raises(ValueError, match="output_attentions must be None(?s:.*)eager"):
        attention(LAYER, *heads(1), None, output_attentions=True)


def test_what_is_harmless_is_taken():
    """Every keyword of the table."""
    found, _ = attention_function(Full())(LAYER, *heads(1), None, **dict.fromkeys(HARMLESS, 3))
    torch.testing.assert_close(found, attention_function(Full())(LAYER, *heads(1), None)[0])


@pytest.mark.parametrize("pattern", [Full(), Window(3), Window(3, sinks=1), Dilated((4, 8), (1, 2))], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_a_position_bias_is_added_to_scores(pattern, padded, own):
    """In every form of a mask, with its gradient: the oracle is a softmax over a table."""
    q, k, v = heads(2)
    bias = torch.randn(1, 4, 7, 7, dtype=torch.float64, requires_grad=True)
    there = torch.ones(2, 7, dtype=torch.bool)
    there[0, :2] = not padded
    options = {"mask_function": lambda b, h, i, j: (j <= i) & (j > i - 5)} if own else {}
    mask = mask_function(pattern)(2, 7, 7, attention_mask=there, **options)
    found, _ = attention_function(pattern)(LAYER, q, k, v, mask, scaling=0.3, position_bias=bias)
    table = torch.zeros(2, 4, 7, 7, dtype=torch.float64)
    for b, begin in enumerate((2 * padded, 0)):
        span = Span(0, 7 - begin)
        table[b, :, begin:, begin:] = torch.from_numpy(pattern.with_causal(True).counts(Rectangle(4, span, span)))
    if own:
        table = table * torch.ones(7, 7).triu(-4)
    scores = 0.3 * q @ k.transpose(-1, -2) + bias + table.log()
    expected = (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    (ours,), (theirs,) = (torch.autograd.grad((x * weights).sum(), bias) for x in (found, expected.nan_to_num()))
    torch.testing.assert_close(ours[:, :, 2:], theirs[:, :, 2:])


class Reads(TorchDispatchMode):
    """How often a value is read from a tensor."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize("implementation", ["longattn_full", "longattn_dilated", "longattn_relative"])
def test_padded_steps_read_no_more_where_there_are_more_layers(implementation):
    """The mask is read once a step, and its layers share what it says."""
    register_with_transformers(PATTERNS | {"longattn_relative": Window(3)})
    ids, mask = tokens(2, 9), torch.ones(2, 10, dtype=torch.int64)
    mask[0, :4] = 0
    reads = []
    for layers in (1, 4):
        model = llama(implementation, num_hidden_layers=layers)
        with torch.no_grad():
            cache = model(ids, attention_mask=mask[:, :9], use_cache=True).past_key_values
            with Reads() as found:
                model(ids[:, :1], attention_mask=mask, past_key_values=cache)
        reads.append(found.number)
    assert reads[0] == reads[1]


@pytest.mark.parametrize("implementation", ["longattn_full", "longattn_dilated"])
def test_padded_prompts_compile_in_one_graph(implementation):
    """With a mask, which no graph reads; logits are those without compilation."""
    model, ids, mask = llama(implementation), tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="eager")(ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(found[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()])


def test_a_mask_says_which_way_a_model_looks():
    """A decoder made to look both ways does, though its layers say that they are causal."""
    ids, models = tokens(), [llama(name, is_causal=False) for name in ("longattn_full", "eager")]
    found, expected = (model(ids).logits for model in models)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, llama("eager")(ids).logits)


def test_what_calls_no_attention_function_is_refused_at_its_first_call():
    """Bloom makes masks for attention functions and calls none; what reads masks elsewhere is refused too."""
    with pytest.raises(ValueError, match="'nllb-moe', got a pattern's: its experts read"):
        mask_function(Full())(2, 7, 7, config=transformers.NllbMoeConfig())
    config = transformers.BloomConfig(vocab_size=60, hidden_size=32, n_layer=1, n_head=4)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="longattn_full")
    with pytest.raises(ValueError, match="for 'bloom'(?s:.*)call no registered attention function"):
        model(tokens())


def test_a_causal_mask_is_causal_for_layers_that_do_not_say_so():
    """As those of some decoders do."""
    silent = torch.nn.Module()
    silent.is_causal = False
    q, k, v = heads(3)
    found, expected = (
        attention_function(Full())(layer, q, k, v, mask_function(Full())(2, 7, 7))[0] for layer in (silent, LAYER)
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[:, 0], v[:, :, 0])
