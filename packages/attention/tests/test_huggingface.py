"""Patterns as attention of Hugging Face models: a small Llama with random weights, trained and generating."""

import pytest
import torch

from longattn.attention.integrations.huggingface import DEFAULT_PATTERNS, register_with_transformers
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


def test_a_models_own_window_is_kept():
    """Mistral's sliding window under Full is eager's; with a pattern that has positions, lost positions are refused."""
    models = {}
    for name in ("eager", "longattn_full", "longattn_dilated"):
        torch.manual_seed(0)
        config = transformers.MistralConfig(**CONFIG, sliding_window=5)
        models[name] = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=name).double().eval()
    ids = tokens()
    torch.testing.assert_close(models["longattn_full"](ids).logits, models["eager"](ids).logits)
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = models["eager"].generate(ids, **options)
    assert torch.equal(models["longattn_full"].generate(ids, **options), expected)
    with pytest.raises(ValueError, match="a cache that dropped"):
        models["longattn_dilated"].generate(ids, **options)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="no left padding"):
        models["longattn_dilated"](ids, attention_mask=mask)


def test_what_cannot_be_done_says_so():
    """Bad registrations and soft caps, by name."""
    with pytest.raises(TypeError, match="patterns must have names as keys"):
        register_with_transformers({1: Full()})
    with pytest.raises(TypeError, match="pattern must be a Pattern"):
        register_with_transformers({"longattn_other": "full"})
    with pytest.raises((KeyError, ValueError, ImportError)):
        llama("longattn_other")
    config = transformers.Gemma2Config(**CONFIG, head_dim=8, attn_logit_softcapping=50.0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="longattn_full").eval()
    with pytest.raises(ValueError, match="softcap must be None"):
        model(tokens())


def test_the_default_names():
    """One call registers four patterns, all causal ones."""
    assert set(DEFAULT_PATTERNS) == {"longattn_full", "longattn_dilated", "longattn_window", "longattn_block_sparse"}
    assert all(pattern.causal for pattern in DEFAULT_PATTERNS.values())
