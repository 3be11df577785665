"""`ReachWarning`, and the defaults that join what they are given: what presets say of tokens apart, and what LongNet sees."""

import warnings

import pytest
import torch

from longattn.attention import (
    DilatedAttention,
    DilatedTransformerEncoderLayer,
    LongNet,
    MultiheadDilatedAttention,
    PatternAttention,
    ReachWarning,
    Ring,
    RingDilatedAttentionV3,
    balanced_lengths,
    choose,
    reaching,
)
from longattn.attention.integrations.huggingface import DEFAULT_PATTERNS
from longattn.patterncache import Dilated

BRANCHES = (4, 8), (1, 2)


@pytest.fixture(autouse=True)
def _nothing_judged(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reaching, "_JUDGED", set())


def heads(length: int) -> torch.Tensor:
    return torch.zeros(1, length, 2, 4)


@pytest.mark.parametrize(
    "attend",
    [
        lambda: DilatedAttention(*BRANCHES, causal=True)(*(heads(20),) * 3),
        lambda: RingDilatedAttentionV3(*BRANCHES, ring_size=2, causal=True)(*(heads(20),) * 3),
        lambda: MultiheadDilatedAttention(8, 2, *BRANCHES, causal=True)(torch.zeros(1, 20, 8)),
        lambda: DilatedTransformerEncoderLayer(8, 2, *BRANCHES, 8, causal=True)(torch.zeros(1, 20, 8)),
        lambda: LongNet(9, 8, 2, 1, *BRANCHES)(torch.zeros(1, 20, dtype=torch.int64)),
    ],
)
def test_a_preset_says_once_that_tokens_stand_apart(attend):
    """The text holds the call that mends it, and that call does."""
    with pytest.warns(ReachWarning, match=r"leaves 3 islands .* at 20 tokens and 2 heads") as said:
        attend()
    call = str(said[0].message).partition("Dilated.for_length")[2].partition(", in Pattern")[0]
    pattern = eval("Dilated.for_length" + call, {"Dilated": Dilated, "LAYERS": 3})
    assert pattern.causal and pattern.reach(3, 20, 2).complete and pattern.lint(20, 2, depth=1).shares.direct == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend()


@pytest.mark.parametrize("causal", [True, False])
def test_the_call_shows_every_token_at_a_part_of_the_pairs(causal: bool):
    """At 4096 tokens and 8 heads."""
    with pytest.warns(ReachWarning) as said:
        reaching.warn_apart(Dilated((64, 128), (1, 2), causal=causal), 4096, 8)
    call = str(said[0].message).partition("Dilated.for_length")[2].partition(", in Pattern")[0]
    pattern = eval("Dilated.for_length" + call, {"Dilated": Dilated, "LAYERS": 2})
    verdict = pattern.lint(4096, 8, depth=1)
    assert pattern.causal == causal and verdict.shares.direct == 1.0
    assert verdict.mean_keys < 4096 * (0.5 if causal else 1) / 5


def test_what_is_joined_and_what_asks_for_nothing_is_silent():
    """One segment; a pattern that the caller chose; packed documents."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DilatedAttention(*BRANCHES, causal=True)(*(heads(4),) * 3)
        PatternAttention(Dilated(*BRANCHES, causal=True))(*(heads(20),) * 3)
        borders = torch.tensor([0, 12, 20], dtype=torch.int32)
        DilatedAttention(*BRANCHES, causal=True)(*(heads(20),) * 3, cu_seqlens=borders)
        LongNet(9, 8, 2, 2)(torch.zeros(1, 20, dtype=torch.int64))


@pytest.mark.parametrize(("nhead", "layers"), [(2, 2), (8, 6)])
def test_every_earlier_token_is_seen_by_default(nhead: int, layers: int):
    """By some head of each layer of a LongNet, at any length up to the longest; and by the pattern for transformers."""
    model = LongNet(9, 8 * nhead, nhead, layers, max_length=512)
    for pattern in (model.layers[0].self_attn.attention.pattern, DEFAULT_PATTERNS["longattn_dilated"]):
        for length in (100, 512):
            assert (
                pattern.lint(length, max(nhead, 8) if "32768" in str(pattern) else nhead, depth=1).shares.direct == 1.0
            )


def test_a_budget_is_a_budget():
    """Keys a query in the mean, at the longest length."""
    pattern = LongNet(9, 16, 2, 2, max_length=512, budget=40).layers[0].self_attn.attention.pattern
    assert 20 < pattern.lint(512, 2).mean_keys <= 40


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: LongNet(9, 8, 2, 2**31), "num_layers must be at most"),
        (lambda: LongNet(9, 8, 2, 2, (4, 8)), "dilation_rates must be given with"),
        (lambda: LongNet(9, 8, 2, 2, max_length=0), "max_length"),
        (lambda: LongNet(9, 8, 2, 2, budget=1), "budget must be at least"),
        (lambda: choose(2, Dilated(*BRANCHES), 2**40, 2), "length must be at most 4294967296"),
        (lambda: Ring(size=2**31), "size must be at most 1024 ranks"),
        (lambda: balanced_lengths(Dilated(*BRANCHES), 64, 2**31, 2), "ranks must be at most 1024"),
        (lambda: balanced_lengths(Dilated(*BRANCHES), 2**40, 2, 2), "length must be at most 4294967296"),
        (lambda: choose(2**31, Dilated(*BRANCHES), 64, 2), "group must have at most 1024 ranks"),
    ],
)
def test_a_bad_argument_is_named(build, words: str):
    """At once."""
    with pytest.raises(ValueError, match=words):
        build()
