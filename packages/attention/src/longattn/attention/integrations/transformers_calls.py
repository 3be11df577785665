"""One call of a layer of transformers, as `pattern_attention`: every keyword is used, known to be harmless, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from longattn.attention.functional import pattern_attention
from longattn.attention.integrations.transformers_bias import dense_bias
from longattn.attention.integrations.transformers_masks import HEADER, first_keys, is_relative, pattern_counts
from longattn.kernels import RelativeBias
from longattn.patterncache import Full, Pattern

T = TypeVar("T")

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
    "output_attentions": "weights are never stored: use attn_implementation='eager', or longattn.attention.attention_weights",
    "cu_seq_lens_q": "documents are known from the mask: give position_ids that begin again at each, and no attention_mask",
    "indices": "keys that a layer chooses are no pattern: use an attn_implementation of the model's own",
    "block_indices": "blocks that a layer chooses are no pattern: use an attn_implementation of the model's own",
    "sinks": "these are no sinks per head (s_aux): use an attn_implementation of the model's own",
}
"""Keywords that are refused, by the way out; any other that is in no table is refused too."""


def refuse_keywords(keywords: dict[str, Any]) -> None:
    """Raise ValueError for a keyword that says something and is not known to be harmless."""
    for name, value in keywords.items():
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


def _attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, **options: Any) -> Tensor:
    """`pattern_attention` without lse."""
    return cast(Any, pattern_attention)(q, k, v, pattern, **options)


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
    has_positions = mask is not None and mask.dtype in (torch.int64, torch.int32)
    causal = mask.dtype == torch.int64 if has_positions and mask is not None else causal and mask is None
    form = pattern.with_causal(causal)
    unaligned = q.shape[1] != k.shape[1] and not has_positions and (mask is None or mask.shape[-2] == 1 < q.shape[1])
    if not isinstance(pattern, Full) and not causal and (crosses(module) or unaligned):
        raise ValueError(
            f"pattern must be Full() in cross attention, whose queries and keys share no positions, got {pattern}; "
            f"use_pattern(model, {{'*self_attn*': pattern}}) leaves other layers dense"
        )
    if mask is None:
        return _attention(q, k, v, form, attention_mask=bias, **options)
    if mask.dtype == torch.int32:
        return _attend_with_positions(form, q, k, v, mask, bias, options)
    if mask.dtype == torch.int64:
        filled = mask.shape[-1]
        k, v, bias = k[:, :filled], v[:, :filled], None if bias is None else bias[..., :filled]
        if not mask.shape[2]:
            return _attention(q, k, v, form, attention_mask=bias, **options)
        return _attend_padded(form, q, k, v, mask, bias, options)
    if mask.dtype == torch.bool and mask.shape[1:3] == (1, 1) and mask.shape[3] == k.shape[1]:
        return _attend_padded(form, q, k, v, mask, bias, options)
    if bias is not None:
        mask = torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias
    return _attention(q, k, v, form, attention_mask=mask, **options)


def _attend_padded(
    form: Pattern, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """Attend where `mask` (batch, 1, 1, Nk) is True at keys that are no padding; queries are the last keys, or positions do not matter."""
    present = mask[:, 0, 0].bool().expand(q.shape[0], -1)
    if is_relative(form):
        return _attention(q, k, v, form, attention_mask=bias, key_padding_mask=~present, **options)
    nq, nk = q.shape[1], k.shape[1]
    if nq == nk and bias is None:
        # Tokens move to the front, so that row numbers are positions; padding follows them and is hidden.
        starts = first_keys(present)[:, None]
        rows = torch.arange(nk, device=q.device)
        present, q, k, v = (_gather_rows(x, (rows + starts) % nk) for x in (present, q, k, v))
        return _gather_rows(_attention(q, k, v, form, key_padding_mask=~present, **options), (rows - starts + nk) % nk)
    counts = _cached_on_mask(
        mask, form, q, lambda: _visibility(form, q, nk, torch.arange(nk - nq, nk), torch.zeros(1), first_keys(present))
    )
    if nq == 1 and bias is None and not torch.compiler.is_compiling():
        keys = _cached_on_mask(mask, form, q, lambda: _visible_keys(counts, present, q.dtype), "keys")
        # Each query head copies keys of its own, so that pays where they are few.
        if 2 * keys.rows.shape[-1] * (q.shape[2] // k.shape[2]) <= nk:
            k, v = (_gather_keys(x, keys.rows) for x in (k, v))
            return _attention(q, k, v, Full(), attention_mask=keys.bias, **options)
    return _attend_with_counts(q, k, v, counts, present[:, None, None], bias, options)


class _Keys(NamedTuple):
    """The keys that the only query of each head sees.

    Attributes:
        rows: (batch, heads, n) int64, ascending; n is the most that any head sees.
        bias: (batch, heads, 1, n), logarithms of counts; -inf beyond a head's own keys.
    """

    rows: Tensor
    bias: Tensor


def _visible_keys(counts: Tensor, present: Tensor, dtype: torch.dtype) -> _Keys:
    """Of what `_visibility` returns for one query row."""
    logarithms = (
        torch.zeros_like(counts, dtype=dtype).masked_fill(~counts, -torch.inf) if counts.dtype == torch.bool else counts
    )
    logarithms = logarithms[:, :, 0].masked_fill(~present[:, None], -torch.inf)
    visible = logarithms > -torch.inf
    place = visible.cumsum(-1) - 1
    most = max(1, int(place[..., -1].max()) + 1)
    element, head, row = visible.nonzero(as_tuple=True)
    at = element, head, place[visible]
    rows = torch.zeros(*visible.shape[:2], most, dtype=torch.int64, device=counts.device).index_put(at, row)
    bias = torch.full(rows.shape, -torch.inf, dtype=dtype, device=counts.device).index_put(at, logarithms[visible])
    return _Keys(rows, bias[:, :, None])


def _gather_keys(x: Tensor, rows: Tensor) -> Tensor:
    """(batch, n, heads, head_dim) rows of x (batch, Nk, kv_heads, head_dim), by (batch, heads, n)."""
    batch, heads, _ = rows.shape
    element = torch.arange(batch, device=x.device)[:, None, None]
    head = torch.arange(heads, device=x.device)[:, None] // (heads // x.shape[2])
    by_head = x.transpose(1, 2)
    if not by_head.is_contiguous():
        return by_head[element, head, rows].transpose(1, 2)
    # As a cache lies, rows follow one another: copied whole, which is much quicker.
    flat = (element * x.shape[2] + head) * x.shape[1] + rows
    return by_head.flatten(0, 2).index_select(0, flat.flatten()).view(*rows.shape, -1).transpose(1, 2)


def _gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (batch, seq, ...) by an index (batch, seq)."""
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:]))


def _attend_with_positions(
    form: Pattern, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """Attend with an int32 mask: the model's visibility, and positions in its header."""
    header, visible = mask[..., :HEADER], mask[..., HEADER:].bool()
    starts = header[:, 0, 0, 1].expand(q.shape[0])
    terms = options.get("score_terms", ())
    relative = [term for term in terms if isinstance(term, RelativeBias)]
    if relative:
        # Positions are in the mask alone, which no term sees.
        options = options | {"score_terms": tuple(term for term in terms if term is not relative[0])}
        keys = torch.arange(k.shape[1], device=q.device) + header[0, 0, :1, 2]
        added = dense_bias(relative[0], header[0, 0, :, 0], keys)
        bias = added if bias is None else bias + added
    counts = None
    if not isinstance(form, Full):
        counts = _cached_on_mask(
            mask, form, q, lambda: _visibility(form, q, k.shape[1], header[0, 0, :, 0], header[0, 0, :1, 2], starts)
        )
    return _attend_with_counts(q, k, v, counts, visible, bias, options)


def _visibility(form: Pattern, q: Tensor, keys: int, q_rows: Tensor, first: Tensor, starts: Tensor) -> Tensor:
    """The pattern's counts for these rows: bool where no key counts twice, else their logarithms."""
    rows = (x.to(q.device) for x in (q_rows, first, starts))
    counts = pattern_counts(*rows, keys, form.canonical(), q.shape[2])
    return counts > 0 if form.binary else counts.to(q.dtype).log()


def _cached_on_mask(mask: Tensor, form: Pattern, q: Tensor, compute: Callable[[], T], what: str = "counts") -> T:
    """The result of `compute`, stored on the mask under `what`, so that all layers that get this mask share it."""
    if torch.compiler.is_compiling():
        return compute()
    cache: dict[Any, T] | None = getattr(mask, "_longattn_counts", None)
    if cache is None:
        cache = {}
        setattr(mask, "_longattn_counts", cache)  # noqa: B010
    key = what, form.canonical(), q.shape[2], q.dtype, q.device
    if key not in cache:
        cache[key] = compute()
    return cache[key]


def _attend_with_counts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor | None,
    visible: Tensor,
    bias: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """Attend under `Full()` with one mask made of counts (bool, or logarithms; None: each visible key counts once), visibility and bias."""
    if counts is None or counts.dtype == torch.bool:
        mask = visible if counts is None else counts & visible
        mask = mask if bias is None else torch.where(mask, bias, -torch.inf)
    else:
        mask = counts.masked_fill(~visible, -torch.inf)
        mask = mask if bias is None else mask + bias
    return _attention(q, k, v, Full(), attention_mask=mask, **options)
