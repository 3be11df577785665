"""One call of a layer of transformers, as `pattern_attention`: every keyword is used, known to be harmless, or refused by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longattn.attention.functional import pattern_attention
from longattn.attention.integrations.transformers_masks import HEADER, first_keys, is_relative, pattern_counts
from longattn.patterncache import Full, Pattern

HARMLESS = {
    "position_ids": "rotary positions are in q and k, packed sequences in the mask",
    "cache_position": "where queries stand is in the mask",
    "past_key_values": "k and v hold it already",
    "cache": "k and v hold it already",
    "use_cache": "k and v hold it already",
    "layer_idx": "of the cache",
    "sliding_window": "the mask has it",
    "attention_chunk_size": "the mask has it",
    "deterministic": "of flash attention's backward",
    "num_items_in_batch": "of the loss",
    "output_hidden_states": "of the model's outputs",
    "output_router_logits": "of the model's outputs",
    "return_dict": "of the model's outputs",
    "logits_to_keep": "of the model's outputs",
    "seq_idx": "of recurrent layers",
    "target_dtype": "of flash attention's casts",
    "is_cross_attention": "the module says it",
    "token_type_ids": "the mask has it",
    "mm_token_type_ids": "the mask has it",
    "block_sequence_ids": "the mask has it",
    "image_grid_thw": "positions have it",
    "video_grid_thw": "positions have it",
    "position_embeddings": "in q and k",
}
"""Keywords that eager attention does not read either, by why nothing is lost."""

WAYS_OUT = {
    "softcap": "no row of longattn.kernels caps scores: use attn_implementation='eager' or 'flex_attention', or, for a model that was "
    "trained without, set attn_logit_softcapping=None in its configuration",
    "output_attentions": "weights are never stored: use attn_implementation='eager', or longattn.attention.attention_weights",
    "cu_seq_lens_q": "documents are known from the mask: give position_ids that begin again at each, and no attention_mask",
    "indices": "keys that a layer chooses are no pattern: use an attn_implementation of the model's own",
    "block_indices": "blocks that a layer chooses are no pattern: use an attn_implementation of the model's own",
    "sinks": "these are no sinks per head (s_aux): use an attn_implementation of the model's own",
}
"""Keywords that are refused, by the way out; any other that is in no table is refused too."""


def refuse_keywords(more: dict[str, Any]) -> None:
    """Raise ValueError for a keyword that says something and is not known to be harmless."""
    for name, value in more.items():
        if name in HARMLESS or value is None or value is False:
            continue
        family = "cu_seq_lens_q" if name.startswith(("cu_seq_lens", "max_length_")) else name
        way = WAYS_OUT.get(family, "this attention does not know it: use an attn_implementation of the model's own")
        raise ValueError(f"{name} must be None for a pattern of longattn, got {type(value).__name__}; {way}")


def crosses(module: torch.nn.Module) -> bool:
    """Whether a layer attends to another sequence than its own, as far as it says so."""
    if getattr(module, "is_cross_attention", False) or "Cross" in type(module).__name__:
        return True
    return bool(getattr(module, "is_decoder", False)) and getattr(module, "is_causal", None) is False


def attend(
    module: torch.nn.Module,
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    bias: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """Attention of (batch, seq, heads, head_dim) under a pattern, where `mask` has a form of `transformers_masks`."""
    if mask is not None and (mask.dim() != 4 or mask.shape[0] not in (1, q.shape[0])):
        raise ValueError(f"attention_mask must be (batch, 1 or heads, Nq, Nk), got {tuple(mask.shape)}")
    placed = mask is not None and mask.dtype in (torch.int64, torch.int32)
    causal = mask.dtype == torch.int64 if placed and mask is not None else causal and mask is None
    form = pattern.with_causal(causal)
    beside = q.shape[1] != k.shape[1] and not placed and (mask is None or mask.shape[-2] == 1 < q.shape[1])
    if not isinstance(pattern, Full) and not causal and (crosses(module) or beside):
        raise ValueError(
            f"pattern must be Full() in cross attention, whose queries and keys share no positions, got {pattern}; "
            f"use_pattern(model, {{'*self_attn*': pattern}}) leaves other layers dense"
        )
    if mask is None:
        return pattern_attention(q, k, v, form, attention_mask=bias, **options)
    if mask.dtype == torch.int32:
        return _on_positions(form, q, k, v, mask, bias, options)
    if mask.dtype == torch.int64:
        filled = mask.shape[-1]
        k, v, bias = k[:, :filled], v[:, :filled], None if bias is None else bias[..., :filled]
        if not mask.shape[2]:
            return pattern_attention(q, k, v, form, attention_mask=bias, **options)
        return _padded(form, q, k, v, mask, bias, options)
    if mask.dtype == torch.bool and mask.shape[1:3] == (1, 1) and mask.shape[3] == k.shape[1]:
        return _padded(form, q, k, v, mask, bias, options)
    if bias is not None:
        mask = torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias
    return pattern_attention(q, k, v, form, attention_mask=mask, **options)


def _padded(
    form: Pattern, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """Where `mask` (batch, 1, 1, Nk) says which keys are there, and queries are the last of them, or positions do not matter."""
    there = mask[:, 0, 0].bool().expand(q.shape[0], -1)
    if is_relative(form):
        return pattern_attention(q, k, v, form, attention_mask=bias, key_padding_mask=~there, **options)
    nq, nk = q.shape[1], k.shape[1]
    if nq == nk and bias is None:
        # Real tokens are moved to the front, where their positions are; what is padding follows, hidden.
        starts = first_keys(there)[:, None]
        rows = torch.arange(nk, device=q.device)
        there, q, k, v = (_rows(x, (rows + starts) % nk) for x in (there, q, k, v))
        return _rows(pattern_attention(q, k, v, form, key_padding_mask=~there, **options), (rows - starts + nk) % nk)
    counted = _remembered(
        mask, form, q, lambda: _counts(form, q, nk, torch.arange(nk - nq, nk), torch.zeros(1), first_keys(there))
    )
    return _under_counts(q, k, v, counted, there[:, None, None], bias, options)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (batch, seq, ...) in each element's order."""
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:]))


def _on_positions(
    form: Pattern, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """Where an int32 mask says who sees whom in the model, and where all stand."""
    head, seen = mask[..., :HEADER], mask[..., HEADER:].bool()
    starts = head[:, 0, 0, 1].expand(q.shape[0])
    counted = None
    if not isinstance(form, Full):
        counted = _remembered(
            mask, form, q, lambda: _counts(form, q, k.shape[1], head[0, 0, :, 0], head[0, 0, :1, 2], starts)
        )
    return _under_counts(q, k, v, counted, seen, bias, options)


def _counts(form: Pattern, q: Tensor, keys: int, q_rows: Tensor, first: Tensor, starts: Tensor) -> Tensor:
    """What the pattern counts: bool where no key counts twice."""
    where = (x.to(q.device) for x in (q_rows, first, starts))
    counts = pattern_counts(*where, keys, form.canonical(), q.shape[2])
    return counts > 0 if form.binary else counts.to(q.dtype).log()


def _remembered(mask: Tensor, form: Pattern, q: Tensor, make: Any) -> Tensor:
    """What `make` makes, once for all layers that get this mask: kept with it."""
    if torch.compiler.is_compiling():
        return make()
    kept: dict[Any, Tensor] | None = getattr(mask, "_longattn_counts", None)
    if kept is None:
        kept = {}
        setattr(mask, "_longattn_counts", kept)  # noqa: B010
    key = form.canonical(), q.shape[2], q.dtype, q.device
    if key not in kept:
        kept[key] = make()
    return kept[key]


def _under_counts(
    q: Tensor, k: Tensor, v: Tensor, counted: Tensor | None, seen: Tensor, bias: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """Everything visible by mask alone: counts (bool, or their logarithms; None: what is seen counts once), what is seen, a bias."""
    if counted is None or counted.dtype == torch.bool:
        mask = seen if counted is None else counted & seen
        mask = mask if bias is None else torch.where(mask, bias, -torch.inf)
    else:
        mask = counted.masked_fill(~seen, -torch.inf)
        mask = mask if bias is None else mask + bias
    return pattern_attention(q, k, v, Full(), attention_mask=mask, **options)
