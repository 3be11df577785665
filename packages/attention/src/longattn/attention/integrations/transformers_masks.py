"""What a model of transformers says of positions: the masks that our mask function makes, and their meaning for the attention function.

A mask is a tensor of four axes, since transformers hands such a one on untouched, and layers, devices and checkpointing move tensors and
nothing else. Which form it has is in its dtype and shape, which cost no read of a device:

* None: every key is there, and queries are the last of them. Causal where the module is; our function says it for no causal model.
* int64 (batch, 1, 1, n): causal. The first n keys are in use, queries are the last of these; 1 where a key is there. (1, 1, 0, n): all are.
* bool (batch, 1, 1, Nk): no causality. True where a key is there.
* int32 (batch, 1, Nq, 3 + Nk): a mask of the model's own, with positions: those of the query row, of the element's first token and of
  the first key, then what the row sees.
* bool or floating (batch, heads, Nq, Nk): a mask of the model's own or of the caller, causality in it; queries are the last keys.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from longattn.patterncache import Full, Pattern, Rectangle, Span, Window, parse_pattern

HEADER = 3
"""Columns before the keys in an int32 mask."""


def is_relative(pattern: Pattern) -> bool:
    """Whether only distances matter, so that padding on the left moves nothing."""
    return isinstance(pattern, Full) or (isinstance(pattern, Window) and not pattern.sinks)


def make_mask_function(patterns: Callable[[Any], Iterable[Pattern]]) -> Callable[..., Tensor | None]:
    """The function that makes a model's mask, where `patterns(config)` are those that its layers may have.

    Raises, when called: ValueError for a model that does not hand its masks on to attention functions.
    """

    def make_mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | Tensor = 0,
        kv_offset: int | Tensor = 0,
        mask_function: Callable[..., Any] | None = None,
        attention_mask: Tensor | None = None,
        device: torch.device | str = "cpu",
        config: Any = None,
        **options: Any,
    ) -> Tensor | None:
        from transformers import masking_utils

        refuse_unbacked(config)
        candidates = tuple(patterns(config))
        causal = mask_function in (None, masking_utils.causal_mask_function)
        present = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)  # type: ignore[arg-type]
        traced = torch.compiler.is_compiling()
        # A static cache has its offset on the device. To read it would wait for it, and break a graph: there, a mask of one shape.
        first_query, first_key = (_as_integer(x, traced) for x in (q_offset, kv_offset))
        plain = causal or mask_function is masking_utils.bidirectional_mask_function
        if plain and isinstance(first_query, int) and isinstance(first_key, int) and not first_key:
            both_ways = not getattr(config, "is_causal", True)
            return _key_mask(first_query + q_length if causal else None, kv_length, present, both_ways, device)
        sdpa_options: dict[str, Any] = options | {"attention_mask": attention_mask, "device": device}
        sdpa_options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        if mask_function is not None:
            sdpa_options["mask_function"] = mask_function
        visible: Any = masking_utils.sdpa_mask(batch_size, q_length, kv_length, first_query, first_key, **sdpa_options)  # type: ignore[arg-type]
        if all(isinstance(pattern, Full) for pattern in candidates):
            return visible
        if (
            isinstance(first_query, int)
            and isinstance(first_key, int)
            and first_query + q_length == first_key + kv_length
        ):
            # Queries are the last keys: distances are right, and positions too where none begins later.
            shifted = first_key > 0 or (present is not None and (traced or not bool(present[:, 0].all())))
            if not shifted or all(is_relative(pattern) for pattern in candidates):
                return visible
        return _mask_with_positions(visible, first_query, first_key, present)

    return make_mask


def _as_integer(offset: int | Tensor, traced: bool) -> int | Tensor:
    """An offset as an integer, unless reading it breaks a graph or synchronises a device."""
    if isinstance(offset, Tensor) and (traced or offset.device.type != "cpu"):
        return offset
    return int(offset)


def _key_mask(
    filled: int | None, kv_length: int, present: Tensor | None, both_ways: bool, device: torch.device | str
) -> Tensor | None:
    """The mask over keys only, causal where `filled`, the number of keys in use, is given. Reads the device once per step."""
    length = kv_length if filled is None else filled
    present = None if present is None else present[:, :length].bool()
    padded = present is not None and (torch.compiler.is_compiling() or not bool(present.all()))
    if present is not None and padded:
        rows = present if filled is None else present.to(torch.int64)
        return rows[:, None, None]
    if filled is None:
        # Modules of a decoder that looks both ways still say that they are causal.
        return torch.ones(1, 1, 1, length, dtype=torch.bool, device=device) if both_ways else None
    # Never None: layers of some decoders do not say that they are causal.
    return torch.zeros(1, 1, 0, filled, dtype=torch.int64, device=device)


def _mask_with_positions(
    visible: Tensor, first_query: int | Tensor, first_key: int | Tensor, present: Tensor | None
) -> Tensor:
    """The int32 mask: visibility with positions in its header."""
    batch, _, nq, _ = visible.shape
    header = torch.zeros(batch, 1, nq, HEADER, dtype=torch.int32, device=visible.device)
    header[..., 0] = torch.arange(nq, device=visible.device) + first_query
    if present is not None:
        header[..., 1] = first_keys(present)[:, None, None]
    header[..., 2] = first_key
    return torch.cat((header, visible.to(torch.int32)), -1)


def first_keys(present: Tensor) -> Tensor:
    """(batch,) index of the first key that is no padding."""
    return present.to(torch.int32).argmax(1)


def _count(q_rows: Tensor, first_row: Tensor, starts: Tensor, keys: int, canonical: str, heads: int) -> Tensor:
    """(batch, heads, Nq, keys) int64 counts: query rows (Nq,), keys from `first_row` (1,) on, positions from 0 at each of `starts`.

    Positions are read on the host. What lies before an element's start counts 0.
    """
    pattern = parse_pattern(canonical)
    rows, first = q_rows.cpu().numpy().astype(np.int64), int(first_row[0])
    unique, members = np.unique(starts.cpu().numpy().astype(np.int64), return_inverse=True)
    i = rows[None, None, :, None] - unique[:, None, None, None]
    j = (first + np.arange(keys, dtype=np.int64))[None, None, None, :] - unique[:, None, None, None]
    last = int(max(i.max(initial=0), j.max(initial=0)))
    pattern.check_rectangle(Rectangle(heads, Span(0, last + 1), Span(0, last + 1)))
    h = np.arange(heads, dtype=np.int64)[None, :, None, None]
    counts = pattern.count(h, np.maximum(i, 0), np.maximum(j, 0), heads) * ((i >= 0) & (j >= 0))
    shape = (len(unique), heads, len(rows), keys)
    return torch.as_tensor(np.broadcast_to(counts, shape)[members].astype(np.int64), device="cpu").to(q_rows.device)


pattern_counts = torch.library.custom_op("longattn::pattern_counts", _count, mutates_args=())
"""`_count`, opaque to graphs."""


def _count_fake(q_rows: Tensor, first_row: Tensor, starts: Tensor, keys: int, canonical: str, heads: int) -> Tensor:
    return q_rows.new_empty((starts.shape[0], heads, q_rows.shape[0], keys), dtype=torch.int64)


cast(Any, pattern_counts).register_fake(_count_fake)

READERS = {"nllb-moe": "its experts read the attention mask too"}
"""Models that read their masks outside of attention, by type."""


def refuse_unbacked(config: Any) -> None:
    """Raise ValueError where a model makes masks for attention functions, and calls none: what it then computes is not the pattern."""
    reader = READERS.get(getattr(config, "model_type", ""))
    if reader is not None:
        raise ValueError(f"attn_implementation must be 'eager' for {config.model_type!r}, got a pattern's: {reader}")
    modeling_name = type(config).__module__.replace(".configuration_", ".modeling_")
    modeling = sys.modules.get(modeling_name)
    if config is None or modeling is None or hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
        return
    model_classes = [
        x for x in vars(modeling).values() if isinstance(x, type) and getattr(x, "config_class", None) is type(config)
    ]
    if not any(getattr(owner, "_supports_attention_backend", False) for owner in model_classes):
        raise ValueError(
            f"attn_implementation must be 'eager' or 'sdpa' for {config.model_type!r} (or another of its own), got a pattern's: its layers "
            f"call no registered attention function, so no pattern would be computed, and its own masks would be lost"
        )
