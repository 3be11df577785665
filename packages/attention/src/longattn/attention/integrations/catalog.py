"""The presets by name, and the flags that each takes."""

from __future__ import annotations

from longattn.attention import multihead_presets, presets
from longattn.attention.modules import PatternAttention
from longattn.attention.multihead import MultiheadPatternAttention

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
