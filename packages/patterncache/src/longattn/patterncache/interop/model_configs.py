"""Patterns of transformers' models, from their configurations: exactly what they show, or a refusal. Transformers is not imported.

Configurations are read by attribute, as transformers 5 defines them. What a configuration does not decide (padding,
packing, images that see themselves) is not in the pattern.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from longattn.patterncache.pattern import Pattern
from longattn.patterncache.patterns.block_sparse import BlockSparse
from longattn.patterncache.patterns.combined import Sum
from longattn.patterncache.patterns.dilated import Dilated
from longattn.patterncache.patterns.window import Full, Window
from longattn.patterncache.spans import check_int, shortened

_ENCODERS = {
    "albert", "bert", "camembert", "distilbert", "electra", "embedding_gemma2_text", "modernbert", "roberta", "ultrabert", "xlm-roberta",
}  # fmt: skip
_DENSE_DECODERS = {
    "codegen", "falcon", "gemma", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "granite", "llama", "mpt", "olmo", "olmo2", "opt",
    "phi", "stablelm",
}  # fmt: skip
_SLIDING_DECODERS = {"mistral", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "starcoder2"}
_LAYERED_DECODERS = {
    "afmoe", "beam", "cohere2", "cohere2_moe", "cwm", "dory", "dots1", "exaone4", "exaone_moe", "gemma2", "gemma3_text", "gemma3n_text",
    "gpt_neo", "gpt_oss", "granite_swa", "granitemoe_swa", "laguna", "lfm2", "llama4_text", "mellum", "mimo_v2_flash", "ministral",
    "modernbert-decoder", "olmo3", "qwen2_5_vl_text", "qwen2_vl_text", "smollm3", "vaultgemma",
}  # fmt: skip
"""Models whose `layer_types` (or `attention_layers`) alone decide who sees whom; every layer looks back only."""

_STRUCTURE = re.compile(
    r"window|sparse|block|chunk|dilat|local|lsh|landmark|stride|attention_type|attn_type|bidirection|index_topk"
)
"""Names of fields that may say who sees whom."""

_NO_STRUCTURE = {
    "attention_types", "block_auto_adjust_ff_dim", "block_dim", "block_ff_dim", "block_ffn_dim_multiplier", "block_multiple_of",
    "block_use_swiglu", "chunk_size_feed_forward", "decoder_sparse_step", "mlp_only_layers", "num_local_experts", "sparse_pred_ignore_index",
    "sparse_prediction",
}  # fmt: skip
"""Fields whose names match `_STRUCTURE` but do not decide who sees whom, or repeat what another field says."""

_OF_LAYERS = {
    "_sliding_window_pattern", "attention_chunk_size", "local_attention", "max_window_layers", "prefix_dense_sliding_window_pattern",
    "sliding_window", "sliding_window_pattern", "swa_num_attention_heads", "use_sliding_window", "window_size",
}  # fmt: skip
"""Fields from which `layer_types` was made, or that a layer of some type reads."""


def from_hf(config: Any, layer: int = 0) -> Pattern:
    """The pattern of one layer of a transformers model.

    Read are `layer_types` (full, sliding and chunked attention), `attention_layers` (GPT-Neo), `sliding_window` with
    `use_sliding_window` and `max_window_layers`, `is_causal`, and `model_type`, which says whether a model is known here, and whether it
    looks ahead. A sliding window of w is the last w tokens; where a model looks both ways, w tokens to each side. Any other field
    that has a value and may say who sees whom is refused.

    Args:
        config: a `PreTrainedConfig` or what has its attributes; of a multimodal one, its text part is read.
        layer: which layer, from 0. Default 0.

    Raises:
        TypeError, ValueError: config has no model_type, layer is not one of its layers, or it says something that is no exact pattern:
            an encoder-decoder, an attention of another kind, or a model that is not known here.
    """
    whole, config = config, getattr(config, "text_config", None) or config
    kind = getattr(config, "model_type", None)
    if not isinstance(kind, str):
        raise TypeError(f"config must be a transformers configuration with a model_type, got {type(config).__name__}")
    if kind == "big_bird":
        raise ValueError(
            "config must be of a model whose pattern needs no length, got model_type 'big_bird': from_bigbird takes a length"
        )
    for name in ("is_encoder_decoder", "use_bidirectional_attention", "attention_window"):
        for part in (config, whole):
            if _fields(part).get(name):
                raise ValueError(
                    f"config must not have {name}, which no pattern says exactly, got {_fields(part)[name]!r}"
                )
    known = _ENCODERS | _DENSE_DECODERS | _SLIDING_DECODERS | _LAYERED_DECODERS
    if kind not in known:
        raise ValueError(f"config must have a model_type of {', '.join(sorted(known))}; got {shortened(kind)}")
    named = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    _refuse_structure(config, kind, bool(named))
    layers = len(named) if named else check_int("num_hidden_layers", getattr(config, "num_hidden_layers", 1), minimum=0)
    if check_int("layer", layer, minimum=0) >= layers:
        raise ValueError(f"layer must be below {layers}, the layers of this {kind}, got {layer}")
    causal = (kind not in _ENCODERS or bool(getattr(config, "is_decoder", False))) and getattr(
        config, "is_causal", True
    ) is not False
    if named:
        return _of_kind(config, named[layer], causal)
    if kind in _LAYERED_DECODERS:
        raise ValueError(f"config must have layer_types where model_type is {kind!r}, got {shortened(named)}")
    if kind in _SLIDING_DECODERS:
        first = getattr(config, "max_window_layers", 0) if kind in ("qwen2", "qwen2_moe", "qwen3") else 0
        slides = getattr(config, "use_sliding_window", True) and layer >= first
        size = getattr(config, "sliding_window", None)
        return _of_kind(config, "sliding_attention" if slides and size is not None else "full_attention", causal)
    return Full(causal=causal)


def _fields(config: object) -> dict[str, Any]:
    """What a configuration has, by name."""
    return vars(config)


def _refuse_structure(config: Any, kind: str, named: bool) -> None:
    """Raise ValueError for a field that may say who sees whom, and is not read here."""
    read = _NO_STRUCTURE | _OF_LAYERS if named or kind in _SLIDING_DECODERS else _NO_STRUCTURE
    for name, value in _fields(config).items():
        if (
            _STRUCTURE.search(name)
            and name not in read
            and value not in (None, False, 0)
            and value != []
            and value != {}
        ):
            raise ValueError(
                f"config must not have {name} where model_type is {kind!r}: it may say who sees whom, and is not known here, got {shortened(value)}"
            )


def _of_kind(config: Any, kind: object, causal: bool) -> Pattern:
    """The pattern of a layer type."""
    if kind in ("full_attention", "global"):
        return Full(causal=causal)
    attribute = {
        "sliding_attention": "sliding_window",
        "local": "window_size",
        "chunked_attention": "attention_chunk_size",
    }
    if kind not in attribute:
        raise ValueError(f"layer_types must be full_attention, {', '.join(attribute)} or global, got {shortened(kind)}")
    size = check_int(attribute[str(kind)], getattr(config, attribute[str(kind)], None), minimum=1)
    if kind == "chunked_attention":
        if not causal:
            raise ValueError("is_causal must not be False with chunked_attention, which looks back only, got False")
        return Dilated((size,), (1,), causal=causal)
    # Looking both ways, transformers counts the window to each side.
    return Window(size) if causal else Window(size + 1, causal=False)


def for_config(config: Any, length: int | None = None, budget: float | None = None) -> Pattern:
    """See `Dilated.for_config`."""
    causal = from_hf(config).causal
    config = getattr(config, "text_config", None) or config
    length = check_int(
        "max_position_embeddings" if length is None else "N",
        getattr(config, "max_position_embeddings", None) if length is None else length,
        minimum=1,
    )
    layers, heads = (
        check_int(name, getattr(config, name, None), minimum=1) for name in ("num_hidden_layers", "num_attention_heads")
    )
    return Dilated.for_length(length, layers, budget, heads, causal)


def from_bigbird(config: Any, N: int, rand_attn: npt.ArrayLike | None = None) -> Pattern:
    """BigBird's attention as transformers computes it over `N` tokens, multiplicities included.

    First and last block see all and are seen by all, every block sees its neighbours, and its random blocks, which count again where they
    are seen already. In evaluation transformers draws no blocks: block 0 stands in for each of them, and so counts 1 + r times.

    Args:
        config: a BigBirdConfig or what has attention_type, block_size and num_random_blocks.
        N: tokens, at least 1. Up to (5 + 2 r) blocks the model is dense.
        rand_attn: (heads, blocks - 2, r) or (blocks - 2, r) integers, the blocks drawn for query blocks 1 to blocks - 2. Default None: as
            in evaluation.

    Raises:
        TypeError, ValueError: an attribute is missing or no such value, or rand_attn has another shape or names no block.
    """
    kind = getattr(config, "attention_type", None)
    if kind not in ("block_sparse", "original_full"):
        raise TypeError(f"config must have an attention_type of block_sparse or original_full, got {shortened(kind)}")
    if getattr(config, "is_decoder", False) and kind == "block_sparse":
        raise ValueError(
            "config.is_decoder must be False with block_sparse, which transformers computes without causality, got True"
        )
    length, size = check_int("N", N, minimum=1), check_int("block_size", getattr(config, "block_size", None), minimum=1)
    drawn = check_int("num_random_blocks", getattr(config, "num_random_blocks", None), minimum=0)
    if kind == "original_full" or length <= (5 + 2 * drawn) * size:
        return Full(causal=bool(getattr(config, "is_decoder", False)))
    blocks = -(-length // size)
    try:
        rand = np.zeros((blocks - 2, drawn), np.int64) if rand_attn is None else np.asarray(rand_attn)
    except (ValueError, TypeError, RuntimeError) as error:
        raise TypeError(f"rand_attn must be an array of integers, got {shortened(rand_attn)}: {error}") from error
    if rand.shape[-2:] != (blocks - 2, drawn) or rand.ndim not in (2, 3):
        raise ValueError(f"rand_attn must be ([heads,] {blocks - 2}, {drawn}), got {rand.shape}")
    if not np.issubdtype(rand.dtype, np.integer):
        raise TypeError(f"rand_attn must be integers, got {rand.dtype}")
    if rand.size and (rand.min() < 0 or rand.max() >= blocks):
        raise ValueError(f"rand_attn must name blocks 0 to {blocks - 1}, got {rand.min()} to {rand.max()}")
    at = np.arange(blocks)
    fixed = abs(at[:, None] - at) <= 1
    fixed[[0, -1]] = fixed[:, [0, -1]] = True
    counts = np.broadcast_to(fixed.astype(np.int64), (*rand.shape[:-2], blocks, blocks)).copy()
    row = np.broadcast_to(at[1:-1, None], rand.shape)
    head = np.broadcast_to(np.arange(len(rand))[:, None, None], rand.shape) if rand.ndim == 3 else None
    np.add.at(counts, (row, rand) if head is None else (head, row, rand), 1)
    layers = tuple(BlockSparse(size, counts >= times) for times in range(1, int(counts.max()) + 1))
    return layers[0] if len(layers) == 1 else Sum(layers)
