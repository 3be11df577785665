"""Calls that other calls of `pattern_attention` serve: of DTensors, of jagged nested tensors, and with padding on the left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

from longattn.attention.schedules.call_extents import dtensor_module, is_sharded
from longattn.attention.sequences.varlen import ragged_attention
from longattn.attention.validate import check_bool, check_pattern_argument


def is_ragged(q: Tensor, k: Tensor, v: Tensor, positions_start: Tensor | None) -> bool:
    """Whether a call is one of those."""
    nested = isinstance(cast(object, q), Tensor) and q.is_nested
    return nested or positions_start is not None or is_sharded(q) or is_sharded(k) or is_sharded(v)


def attend_ragged(
    attention: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions_start: Tensor | None,
    options: dict[str, Any],
    return_key_weights: bool,
) -> tuple[Tensor, Tensor]:
    """(out, lse) by calls of `attention`, which is `pattern_attention` with return_lse=True, on local, plain tensors.

    Args:
        options: of `pattern_attention`, the pattern among them.

    Raises:
        TypeError, ValueError: a bad option, by name.
    """
    if check_bool("return_key_weights", return_key_weights):
        raise ValueError(
            "return_key_weights must be False for DTensors, nested tensors and with positions_start, got True: give local tensors under a "
            "schedule, and key_padding_mask"
        )
    if is_sharded(q) or is_sharded(k) or is_sharded(v):
        attend_sharded = dtensor_module().sharded_attention
        return attend_sharded(attention, q, k, v, options | {"positions_start": positions_start})
    pattern, is_causal = check_pattern_argument(options["pattern"]), options["is_causal"]
    placed = pattern if is_causal is None else pattern.with_causal(check_bool("is_causal", is_causal))
    crossing = options["q_start"] is not None and not placed.positional
    return ragged_attention(attention, q, k, v, positions_start, options, crossing)
