"""For tests of attention modules, ours and yours: the table of presets, and `check_schedule`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longattn.attention import multihead_presets, presets
from longattn.attention.functional import pattern_attention
from longattn.attention.modules import MultiheadPatternAttention, PatternAttention
from longattn.attention.schedule import Local, Schedule
from longattn.patterncache import Pattern

_FLAGS: dict[str, tuple[str, ...]] = {
    "pool": ("enable_memory_pool", "lightweight_pool", "enable_profiling"),
    "manager": ("enable_buffer_manager", "enable_buffer_reuse", "enable_preallocation"),
    "cache": ("use_pattern_cache",),
    "resident": ("cache_on_gpu",),
}

_TABLE: tuple[tuple[type[PatternAttention], type[MultiheadPatternAttention], str], ...] = (
    (presets.DilatedAttention, multihead_presets.MultiheadDilatedAttention, "pool"),
    (presets.ImprovedDilatedAttention, multihead_presets.ImprovedMultiheadDilatedAttention, "pool"),
    (presets.ImprovedDilatedAttentionV2, multihead_presets.ImprovedMultiheadDilatedAttentionV2, "pool manager"),
    (presets.RingDilatedAttentionV2, multihead_presets.RingMultiheadDilatedAttentionV2, "pool cache"),
    (presets.RingDilatedAttentionV3, multihead_presets.RingMultiheadDilatedAttentionV3, "pool cache resident"),
    (
        presets.BlockSparseRingDilatedAttention,
        multihead_presets.BlockSparseRingMultiheadDilatedAttention,
        "pool cache",
    ),
)

PRESETS: dict[str, type[PatternAttention]] = {single.__name__: single for single, _, _ in _TABLE}
"""Presets called as (query, key, value)."""

MULTIHEAD_PRESETS: dict[str, type[MultiheadPatternAttention]] = {multi.__name__: multi for _, multi, _ in _TABLE}
"""Presets called as (query) with an embedding."""

PRESET_FLAGS: dict[str, tuple[str, ...]] = {
    cls.__name__: tuple(flag for group in groups.split() for flag in _FLAGS[group])
    for *pair, groups in _TABLE
    for cls in pair
}
"""The flags that each preset takes."""

FINAL = {PatternAttention: "forward", MultiheadPatternAttention: "forward"}
"""The forwards that nothing overrides."""


def check_final(cls: type[nn.Module]) -> None:
    """Assert that a preset configures: its forward is that of the class it comes from."""
    base = next(b for b in FINAL if issubclass(cls, b))
    assert cls.forward is base.forward, f"{cls.__name__} overrides forward"


def check_schedule(
    schedule: Schedule,
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tolerance: float = 1e-10,
    *,
    is_causal: bool | None = None,
    softmax_scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    backend: str | None = None,
    q_start: int | None = None,
) -> None:
    """Assert that a schedule gives what `Local` gives on float64 inputs: out, lse and gradients. Options as in `pattern_attention`."""

    def run(chosen: Schedule) -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = pattern_attention(
            inputs[0],
            inputs[1],
            inputs[2],
            pattern,
            is_causal=is_causal,
            softmax_scale=softmax_scale,
            key_padding_mask=key_padding_mask,
            attention_mask=attention_mask,
            backend=backend,
            q_start=q_start,
            schedule=chosen,
            return_lse=True,
        )
        loss = out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).sum()
        return [out, lse, *torch.autograd.grad(loss, inputs)]

    for found, expected in zip(run(schedule), run(Local()), strict=True):
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
