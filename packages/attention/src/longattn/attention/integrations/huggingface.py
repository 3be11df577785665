"""Patterns as `attn_implementation` of Hugging Face transformers (the extra `transformers`, imported when registering).

Positions come with the mask: what our mask function returns says, for each element of the batch, which keys are there and where the
queries stand among them (`transformers_masks`), so that left padding, caches and beams keep a pattern's positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from longattn.attention.integrations import transformers_saved as saved
from longattn.attention.integrations.transformers_bias import relative_bias
from longattn.attention.integrations.transformers_calls import attend, refuse_keywords
from longattn.attention.integrations.transformers_masks import make_mask_function
from longattn.attention.sparse_config import SparsePatternConfig
from longattn.attention.validate import check_bool, check_pattern_argument, check_size, check_type
from longattn.kernels import Softcap
from longattn.kernels.interface import ScoreTerm
from longattn.patterncache import Dilated, Full, Pattern, Window
from longattn.patterncache.spans import shortened

DEFAULT_PATTERNS: dict[str, Pattern] = {
    "longattn_full": Full(causal=True),
    # Joins 32768 tokens in two layers or more, in heads that share out the residues, at about the cost of segments 2048, 4096, 8192.
    "longattn_dilated": Dilated.for_length(32768, layers=2, budget=32768 / 16 + 64, num_heads=8),
    "longattn_window": Window(1024, sinks=4),
    "longattn_block_sparse": SparsePatternConfig("bigbird").layout(causal=True),
}
"""What `register_with_transformers()` registers. Whether it is causal is the model's to say."""


def register_with_transformers(patterns: Mapping[str, Pattern] | None = None) -> tuple[str, ...]:
    """Register attention and mask functions, so that `attn_implementation=name` works for models that take one.

    A model's first call writes name and pattern into its configuration: a checkpoint saved then names what it was trained with, and
    loads so where the name is registered, and not at all where it is not. `longattn`, which `use_pattern` sets, is registered too.

    Args:
        patterns: by the name under which each is asked for. Default `DEFAULT_PATTERNS`. Registering a name again replaces it.

    Returns:
        The names.

    Raises:
        ImportError: transformers is not installed.
        TypeError: a name is no string, or a pattern no Pattern.
        ValueError: a name is `longattn`.

    Example:
        >>> register_with_transformers({"longattn_dilated": Dilated((512, 2048), (1, 4))})
        ('longattn_dilated',)
        >>> model = AutoModelForCausalLM.from_config(config, attn_implementation="longattn_dilated")
    """
    import transformers

    attentions: Any = transformers.AttentionInterface
    masks: Any = transformers.AttentionMaskInterface
    if patterns is not None:
        check_type("patterns", patterns, Mapping, "a mapping of names to patterns")
    by_name = dict(DEFAULT_PATTERNS if patterns is None else patterns)
    for name, pattern in by_name.items():
        check_type("patterns", name, str, "a mapping with names as keys")
        if name == saved.IMPLEMENTATION:
            raise ValueError(f"patterns must have names other than use_pattern's, got {shortened(name)}")
        check_pattern_argument(pattern)
    for name, pattern in by_name.items():
        attentions.register(name, attention_function(pattern))
        masks.register(name, mask_function(pattern, name))
    attentions.register(saved.IMPLEMENTATION, _attention_function(saved.pattern_of_layer))
    masks.register(saved.IMPLEMENTATION, make_mask_function(saved.patterns_of_model))
    return tuple(by_name)


def streaming_cache(model: Any, *, max_rewind: int = 0, max_cache_len: int | None = None, offload: bool = False) -> Any:
    """A cache for `generate` that holds only the keys that later queries of the model's patterns see (`StreamingAttention`).

    Left padding, beams and assisted decoding (as much as `max_rewind`) work. A model's own windows, packed sequences, soft caps, sinks and
    biases and dropout are refused by name.

    Args:
        model: a decoder of transformers with patterns as its attention (`use_pattern`, or a registered name).
        max_rewind: tokens that assisted decoding may take back at once. Keys that they see stay as long. Default 0.
        max_cache_len: most tokens of a stream, padding included. Then what the patterns need is allocated at once, masks have one shape, and
            a compiled model is compiled once for prompts of one length and once for steps. Default None: no maximum.
        offload: whether a layer's keys and values lie in host memory, of bufmgr's global pool, while other layers compute. They are
            fetched and brought back in each step, which waits for them. Default False. On the CPU it changes nothing.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the model's attention is no pattern of ours.

    Example:
        >>> model.generate(**inputs, cache=streaming_cache(model))
    """
    import transformers

    from longattn.attention.integrations.transformers_cache import StreamLayer

    config = model.config.get_text_config(decoder=True)
    name = getattr(config, "_attn_implementation", None)
    functions: Any = transformers.AttentionInterface()
    function = functions.get(name)
    if getattr(function, "__module__", None) != __name__:
        raise ValueError(
            f"model must have a pattern of longattn as its attn_implementation, got {shortened(name)}: call use_pattern(model, ...)"
        )
    check_size("max_rewind", max_rewind, least=0)
    if max_cache_len is not None:
        check_size("max_cache_len", max_cache_len)
    check_bool("offload", offload)
    layers = [StreamLayer(max_rewind, max_cache_len, offload) for _ in range(config.num_hidden_layers)]
    return transformers.Cache(layers=layers)  # pyright: ignore


def attention_function(pattern: Pattern) -> Callable[..., tuple[Tensor, None]]:
    """The function that a model of transformers calls, for a pattern."""
    return _attention_function(lambda module: pattern)


def mask_function(pattern: Pattern, name: str | None = None) -> Callable[..., Tensor | None]:
    """The function that makes a model's mask, for a pattern: see `transformers_masks`. Under a name, it keeps both in the configuration."""

    def patterns(config: Any) -> Iterable[Pattern]:
        if name is not None and config is not None and not torch.compiler.is_compiling():
            saved.record(config, name, pattern)
        return (pattern,)

    return make_mask_function(patterns)


def _attention_function(pattern_of: Callable[[torch.nn.Module], Pattern]) -> Callable[..., tuple[Tensor, None]]:
    def call(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        **keywords: Any,
    ) -> tuple[Tensor, None]:
        """query (batch, heads, Nq, head_dim), key and value (batch, kv_heads, Nk, head_dim) to (batch, Nq, heads, head_dim), None."""
        refuse_keywords(keywords)
        saved.note_call(module)
        module_is_causal = getattr(module, "is_causal", True)
        causal_mask = attention_mask is not None and attention_mask.dtype == torch.int64
        if is_causal is False and module_is_causal and causal_mask:
            raise ValueError("is_causal must not be False where the model made a causal mask, got False")
        options: dict[str, Any] = {"softmax_scale": scaling, "dropout_p": dropout}
        if s_aux is not None:
            options["sink_logits"] = s_aux
        # A cap comes before masks and biases, as in the models' own eager code.
        terms: list[ScoreTerm] = [] if softcap is None else [Softcap(softcap)]
        if position_bias is not None and position_bias.dim() == 2:
            terms.append(relative_bias(module, position_bias))
            position_bias = None
        if terms:
            options["score_terms"] = tuple(terms)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if q.shape[0] == 1 < k.shape[0]:
            q = q.expand(k.shape[0], -1, -1, -1)  # learned queries, one for all
        causal = bool(module_is_causal if is_causal is None else is_causal)
        stream = getattr(key, "_longattn_stream", None)
        if stream is not None:
            if position_bias is not None:
                options["position_bias"] = position_bias
            return stream.attend(pattern_of(module).with_causal(True), q, attention_mask, options), None
        return attend(module, pattern_of(module), q, k, v, attention_mask, causal, position_bias, options), None

    return call
