"""A decoder step of a model of transformers after prompts that are padded on the left, beside the same model under sdpa.

The model is a llama of random weights, 4 layers of 8 heads of 64, made from its configuration. Four prompts of up to `seq_len` tokens in a
batch, each a fifth shorter than the one before; a call makes four steps and takes them back. Ours has transformers' own cache, or `streaming_cache`.
Rows need transformers; without it there are none.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.calls import Calls
from benchmarks.experiment import Labels, Targets
from longattn.attention import streaming_cache, use_pattern
from longattn.patterncache import Dilated, Full, Pattern, Window

STEPS, BATCH, VOCABULARY = 4, 4, 256
SHARE = 1 / 1.1
"""sdpa's time over ours, at least: ours takes at most a tenth longer."""


def llama(pattern: Pattern | None, layers: int = 4) -> Any:
    """The model, with equal weights each time; None: under sdpa."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
    shape |= {"num_hidden_layers": layers, "vocab_size": VOCABULARY, "max_position_embeddings": 8192}
    # A keyword of the base class, which type checkers do not see.
    shape["attn_implementation"] = "sdpa"
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    if pattern is not None:
        use_pattern(model, pattern)
    return model


def prompts(length: int) -> tuple[Tensor, Tensor]:
    """(tokens, mask), each (4, length), left-padded: element b lacks b fifths."""
    tokens = torch.randint(VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(0))
    starts = torch.arange(BATCH) * length // 5
    return tokens, (torch.arange(length) >= starts[:, None]).long()


def steps(model: Any, tokens: Tensor, mask: Tensor, streaming: bool = False) -> Callable[[], Tensor]:
    """Four steps after the prompts: the last one's logits. The cache is then as before. streaming: it is `streaming_cache`."""
    options = {"cache": streaming_cache(model, max_rewind=STEPS)} if streaming else {}
    with torch.inference_mode():
        where = (mask.cumsum(1) - 1).clamp(min=0)
        cache = model(tokens, attention_mask=mask, position_ids=where, use_cache=True, **options).past_key_values

    def call() -> Tensor:
        logits = torch.empty(0)
        with torch.inference_mode():
            for step in range(STEPS):
                there = torch.cat([mask, mask.new_ones(len(mask), step + 1)], 1)
                where = (there.sum(1) - 1)[:, None]
                logits = model(tokens[:, step : step + 1], attention_mask=there, position_ids=where, cache=cache).logits
            cache.crop(-STEPS)
        return logits

    return call


def wrong(pattern: Pattern, streaming: bool = False) -> list[str]:
    """The gate: a padded prompt goes on as it goes on alone; dense, also as under sdpa."""
    model, (tokens, mask) = llama(pattern, 2), prompts(60)
    together = steps(model, tokens, mask, streaming)()
    alone = [_alone(model, tokens[b : b + 1], int(mask[b].sum())) for b in range(BATCH)]
    errors = {"alone": float((together - torch.cat(alone)).abs().max())}
    if isinstance(pattern, Full):
        errors["sdpa"] = float((together - steps(llama(None, 2), tokens, mask)()).abs().max())
    return [f"ours: off by {error:.1e} from {what}" for what, error in errors.items() if not error <= 1e-4]


def _alone(model: Any, tokens: Tensor, length: int) -> Tensor:
    """The same four steps of one prompt without its padding."""
    whole = torch.cat([tokens[:, -length:], tokens[:, :STEPS]], 1)
    with torch.inference_mode():
        return model(whole).logits[:, -1:]


def experiments(quick: bool) -> Iterator[Calls]:
    """Dense, a window and a dilated pattern."""
    if importlib.util.find_spec("transformers") is None:
        return
    length = 60 if quick else 3000
    patterns: dict[str, Pattern] = {
        "full": Full(causal=True),
        "window 512": Window(512),
        "dilated 512/1+2048/4": Dilated((512, 2048), (1, 4), causal=True),
    }
    for name, pattern in patterns.items():
        for streaming in (False, True):
            cache = ", streaming cache" if streaming else ""
            yield Calls(
                name=name.split()[0] + ("-streaming" if streaming else ""),
                labels=Labels(
                    "padded", f"{name}{cache}, {STEPS} steps b{BATCH}", "sdpa", "float32", length, True, "forward"
                ),
                targets=Targets() if quick else Targets(ratio=SHARE),
                ours=lambda pattern=pattern, streaming=streaming: steps(llama(pattern), *prompts(length), streaming),
                peer=lambda: steps(llama(None), *prompts(length)),
                gate=lambda pattern=pattern, streaming=streaming: wrong(pattern, streaming),
            )
