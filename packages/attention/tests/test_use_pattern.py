"""`use_pattern`: what it proves, what it refuses, what a checkpoint keeps; and the matrix of families."""

import copy
import os
import runpy
from pathlib import Path

import pytest
import torch

from longattn.attention import register_with_transformers, use_pattern
from longattn.patterncache import Dilated, Full, Window

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: the extra of that name brings it"
)

TABLE = runpy.run_path(str(Path(__file__).with_name("transformers_families.py")))
CASES, DEFAULT, FAMILIES, PAGE = (TABLE[name] for name in ("CASES", "DEFAULT", "FAMILIES", "PAGE"))
build, inputs, rows_of, verdict = (TABLE[name] for name in ("build", "inputs", "rows_of", "verdict"))
IDS = torch.randint(4, 60, (2, 21), generator=torch.Generator().manual_seed(1))


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TABLE["SMALL"] | options)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def test_layers_have_their_patterns():
    """All of them, or those of a key; the rest is dense, and a pattern changes what is computed."""
    model = llama()
    dense = logits(model)
    assert use_pattern(model, Window(4)) == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    window = logits(model)
    assert use_pattern(model, {1: Window(4)}) == ("model.layers.1.self_attn",)
    mixed = logits(model)
    assert use_pattern(model, {"*.0.self_attn": Full(), 1: Window(4)}) == tuple(
        f"model.layers.{at}.self_attn" for at in (0, 1)
    )
    torch.testing.assert_close(logits(model), mixed)
    use_pattern(model, Full())
    torch.testing.assert_close(logits(model), dense)
    assert not torch.allclose(window, dense) and not torch.allclose(mixed, dense) and not torch.allclose(mixed, window)


def test_cross_attention_has_no_positions():
    """A pattern with positions is refused there; by name it serves the rest, on padded sources too."""
    model = build("bart", "eager")
    with pytest.raises(ValueError, match=r"pattern must be Full\(\) in cross attention(?s:.*)self_attn"):
        use_pattern(model, Dilated((4,), (1,)))
    assert model.config._attn_implementation == "eager" and not hasattr(model.config, "longattn_pattern")
    layers = use_pattern(model, {"*self_attn": Dilated((4, 8), (1, 2))})
    assert len(layers) == 4 and all(name.endswith("self_attn") for name in layers)
    given, _ = inputs("bart", "left")
    alone = {name: x[:1] for name, x in given.items()}
    alone["input_ids"], alone["attention_mask"] = given["input_ids"][:1, 6:], given["attention_mask"][:1, 6:]
    with torch.no_grad():
        # Positions of the model itself begin at the padding: only what is after it may differ by them.
        assert model(**given).logits.isfinite().all() and model(**alone).logits.isfinite().all()


def test_a_t5_hands_on_its_table(monkeypatch):
    """No dense bias of its own is made; out and gradients are eager's, under a pattern too, and eager is itself again when asked for."""
    given, eager, model = inputs("t5", "left")[0], build("t5", "eager"), build("t5", "longattn")

    def made(t5):
        out = t5(**given).logits
        return out, *torch.autograd.grad(
            out.square().mean(), [t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight]
        )

    kind = type(model.encoder.block[0].layer[0].SelfAttention)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "compute_bias", lambda *_, **__: pytest.fail("a dense bias"))
        found = made(copy.deepcopy(model))
    torch.testing.assert_close(found, made(eager), atol=1e-4, rtol=1e-4)
    use_pattern(model, {"encoder*": Window(4, causal=False)})
    real = given["attention_mask"].bool()
    seen = ((torch.arange(16)[:, None] - torch.arange(16)).abs() < 4) & real[:, None, None]
    expected = eager.encoder(given["input_ids"], attention_mask=torch.where(seen, 0.0, -1e9)).last_hidden_state
    ours = model.encoder(given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
    torch.testing.assert_close(ours[real], expected[real], atol=1e-4, rtol=1e-4)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**given).logits, eager(**given).logits)


@pytest.mark.parametrize("family", ["deberta-v2", "xlnet", "big_bird", "bloom"])
def test_a_model_that_attends_in_its_own_way_is_refused(family):
    """And left as it was."""
    model = build(family, "eager")
    with pytest.raises(ValueError, match="model must hand attention to a registered function"):
        use_pattern(model, Full())
    assert model.config._attn_implementation == "eager" and not hasattr(model.config, "longattn_pattern")


def test_what_a_call_does_not_reach_is_refused():
    """Layers that were not called are named."""
    model = llama()
    model.model.layers[1].forward = lambda x, **_: x
    with pytest.raises(
        ValueError, match=r"inputs must reach every attention layer, got .*layers.1.self_attn \(1 of 2\)"
    ):
        use_pattern(model, Full())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("pattern", "error", "words"),
    [
        ("full", TypeError, "pattern must be a Pattern"),
        (None, ValueError, "pattern must be given"),
        ({1.5: Full()}, TypeError, "layer numbers or names"),
        ({7: Full()}, ValueError, "keys that are layers, such as 'model.layers.0.self_attn', got 7"),
        ({1: Full(), "*.1.*": Window(2)}, ValueError, "must name a layer once"),
    ],
)
def test_what_is_wrong_is_named(pattern, error, words):
    """By its parameter."""
    with pytest.raises(error, match=words):
        use_pattern(llama(), pattern)
    with pytest.raises(TypeError, match="model must be a PreTrainedModel"):
        use_pattern(torch.nn.Linear(2, 2), Full())


def test_a_checkpoint_keeps_its_pattern(tmp_path):
    """One for all comes back by loading; patterns by layer say what is missing."""
    register_with_transformers()
    model = llama()
    use_pattern(model, Window(4))
    model.save_pretrained(tmp_path / "one")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    torch.testing.assert_close(logits(loaded), logits(model))
    use_pattern(model, {1: Window(4)})
    model.save_pretrained(tmp_path / "some")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "some")
    with pytest.raises(ValueError, match=r"unless use_pattern\(model\) is called once after loading, got {"):
        logits(loaded)
    assert use_pattern(loaded) == ("model.layers.1.self_attn",)
    torch.testing.assert_close(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    assert '"attn_implementation": "longattn"' in (tmp_path / "again" / "config.json").read_text(encoding="utf-8")


def test_a_checkpoint_of_a_registered_name_says_which(tmp_path):
    """It loads where the name is registered for its pattern, and nowhere else."""
    register_with_transformers({"longattn_kept": Window(4)})
    config = llama().config
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="longattn_kept").eval()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), expected)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    register_with_transformers({"longattn_kept": Window(5)})
    with pytest.raises(ValueError, match="must be registered for the pattern that the checkpoint was saved with"):
        logits(loaded)
    assert not torch.allclose(logits(model), expected)  # this process registered the name anew
    text = (tmp_path / "config.json").read_text(encoding="utf-8").replace("longattn_kept", "longattn_absent")
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="longattn_absent"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


@pytest.mark.skipif(not PAGE.exists(), reason="the pages are part of a checkout only")
@pytest.mark.parametrize("family", FAMILIES if NIGHTLY else DEFAULT)
def test_a_family_is_what_the_page_says(family):
    """Every case is equal to eager or refused with a reason, as docs/attention/transformers.md has it."""
    said = rows_of(PAGE.read_text(encoding="utf-8"))[family]
    cases = CASES if NIGHTLY else [case for case in CASES if not said[case].startswith("refused") or case == "plain"]
    assert {case: verdict(family, case) for case in cases} == {case: said[case] for case in cases}


@pytest.mark.skipif(not PAGE.exists(), reason="the pages are part of a checkout only")
def test_the_page_has_every_family():
    """And nothing on it is wrong: equal, refused with a reason, or no such thing."""
    rows = rows_of(PAGE.read_text(encoding="utf-8"))
    assert list(rows) == list(FAMILIES)
    verdicts = {said for row in rows.values() for said in row.values()}
    assert all(said == "equal" or said.startswith(("refused: ", "-")) for said in verdicts)
