"""Patterns as `attn_implementation` of Hugging Face transformers (the extra `transformers`, imported when registering).

Positions come with the mask: what our mask function returns for a causal or bidirectional model says, for each element of the batch,
which keys are there and where the queries stand among them, so that left padding, caches and beams keep a pattern's positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from longattn.attention.functional import pattern_attention
from longattn.attention.presets import DILATION_RATES, SEGMENT_LENGTHS
from longattn.attention.sequences.varlen import aligned_attention
from longattn.attention.sparse_config import SparsePatternConfig
from longattn.attention.validate import check_pattern_argument
from longattn.patterncache import Dilated, Full, Pattern, Window

DEFAULT_PATTERNS: dict[str, Pattern] = {
    "longattn_full": Full(causal=True),
    "longattn_dilated": Dilated(SEGMENT_LENGTHS, DILATION_RATES, causal=True),
    "longattn_window": Window(1024, sinks=4),
    "longattn_block_sparse": SparsePatternConfig("bigbird").layout(causal=True),
}
"""What `register_with_transformers()` registers. Whether it is causal is the model's to say."""


def register_with_transformers(patterns: Mapping[str, Pattern] | None = None) -> tuple[str, ...]:
    """Register attention and mask functions, so that `attn_implementation=name` works for models that take one.

    Args:
        patterns: by the name under which each is asked for. Default `DEFAULT_PATTERNS`. Registering a name again replaces it.

    Returns:
        The names.

    Raises:
        ImportError: transformers is not installed.
        TypeError: a name is no string, or a pattern no Pattern.

    Example:
        >>> register_with_transformers({"longattn_dilated": Dilated((512, 2048), (1, 4))})
        ('longattn_dilated',)
        >>> model = AutoModelForCausalLM.from_config(config, attn_implementation="longattn_dilated")
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    chosen = dict(DEFAULT_PATTERNS if patterns is None else patterns)
    for name, pattern in chosen.items():
        if not isinstance(name, str):
            raise TypeError(f"patterns must have names as keys, got {name!r} ({type(name).__name__})")
        check_pattern_argument(pattern)
    for name, pattern in chosen.items():
        AttentionInterface.register(name, attention_function(pattern))
        AttentionMaskInterface.register(name, mask_function(pattern))
    return tuple(chosen)


def attention_function(pattern: Pattern) -> Callable[..., tuple[Tensor, None]]:
    """The function that a model of transformers calls, for a pattern."""
    forms = (pattern.with_causal(False), pattern.with_causal(True))

    def attend(
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
        **_: Any,
    ) -> tuple[Tensor, None]:
        """query (batch, heads, Nq, head_dim), key and value (batch, kv_heads, Nk, head_dim) to (batch, Nq, heads, head_dim), None."""
        if softcap is not None:
            raise ValueError(f"softcap must be None: no row of longattn.kernels caps scores, got {softcap}")
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        options = {"pattern": forms[bool(causal)], "softmax_scale": scaling, "dropout_p": dropout}
        if s_aux is not None:
            options["sink_logits"] = s_aux
        if attention_mask is not None and attention_mask.dtype == torch.int64:
            return _placed(q, k, v, attention_mask.flatten(1), bool(causal), options), None
        return pattern_attention(q, k, v, attention_mask=attention_mask, **options), None

    return attend


def _placed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, causal: bool, options: dict[str, Any]) -> Tensor:
    """Attention where `mask` is what `mask_function` said: (batch, 1 + Nk), the row where queries begin, then which keys are there."""
    q_row = int(mask[0, 0])
    filled = q_row + q.shape[1] if causal else k.shape[1]
    k, v, there = k[:, :filled], v[:, :filled], mask[:, 1 : filled + 1].bool()
    starts = there.int().argmax(1)
    holes = ~there & (torch.arange(filled, device=k.device) >= starts[:, None])
    if holes.any():
        options["key_padding_mask"] = ~there
    return aligned_attention(_with_lse, q, k, v, starts, q_start=q_row, **options)[0]


def _with_lse(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return pattern_attention(q, k, v, return_lse=True, **options)


def mask_function(pattern: Pattern) -> Callable[..., Tensor | None]:
    """The function that makes a model's mask, for a pattern.

    It returns None where keys are all there and queries are the last of them; else (batch, 1, 1, 1 + Nk) integers, see `_placed` (of
    four axes: transformers passes such a mask on as it is); and where the model has a mask of its own (a sliding window, packed
    sequences), that mask, (batch, 1, Nq, Nk) bool, to be seen within the pattern.
    """
    movable = isinstance(pattern, Full) or (isinstance(pattern, Window) and not pattern.sinks)

    def make_mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | Tensor = 0,
        kv_offset: int | Tensor = 0,
        mask_function: Callable[..., Any] | None = None,
        attention_mask: Tensor | None = None,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> Tensor | None:
        from transformers import masking_utils

        begin, dropped = int(q_offset), int(kv_offset)
        there = masking_utils.prepare_padding_mask(attention_mask, kv_length, dropped)
        if dropped and not movable:
            raise ValueError(f"past_key_values must keep every key for {pattern}, got a cache that dropped {dropped}")
        plain = (None, masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function)
        if mask_function not in plain or dropped:
            late = there is not None and not bool(there[:, 0].all())
            if (late or begin + q_length != dropped + kv_length) and not movable:
                raise ValueError(
                    f"attention_mask must have no left padding, and the cache no free room, where the model has a mask of its "
                    f"own besides {pattern}: its positions would be lost"
                )
            given = {"attention_mask": attention_mask, "device": device, "mask_function": mask_function}
            own: dict[str, Any] = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            return masking_utils.sdpa_mask(batch_size, q_length, kv_length, begin, dropped, **(options | given | own))
        if (there is None or bool(there.all())) and begin + q_length == kv_length:
            return None
        there = torch.ones(batch_size, kv_length, device=device) if there is None else there[:, :kv_length]
        rows = there.to(torch.int64)
        return torch.cat((torch.full_like(rows[:, :1], begin), rows), 1)[:, None, None]

    return make_mask
