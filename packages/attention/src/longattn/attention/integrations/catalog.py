"""The presets: one row each, from which the names, the flags, the factory and the support page follow."""

from __future__ import annotations

from typing import Any, NamedTuple

from longattn.attention import multihead_presets, presets, wiring
from longattn.attention.integrations import attention_config as configs
from longattn.attention.modules import PatternAttention
from longattn.attention.multihead import MultiheadPatternAttention


class Preset(NamedTuple):
    """One row of the table.

    Attributes:
        single, multihead: the class called as (query, key, value), and the one called as (query) with an embedding.
        flags: the TypedDict of the flags that both take. config: the factory's, of `single`.
    """

    single: type[PatternAttention]
    multihead: type[MultiheadPatternAttention]
    flags: Any
    config: type[configs.AttentionConfig]


TABLE = (
    Preset(
        presets.DilatedAttention, multihead_presets.MultiheadDilatedAttention, wiring.PoolFlags, configs.DilatedConfig
    ),
    Preset(
        presets.ImprovedDilatedAttention,
        multihead_presets.ImprovedMultiheadDilatedAttention,
        wiring.PoolFlags,
        configs.DilatedConfig,
    ),
    Preset(
        presets.ImprovedDilatedAttentionV2,
        multihead_presets.ImprovedMultiheadDilatedAttentionV2,
        wiring.ManagerFlags,
        configs.ManagerConfig,
    ),
    Preset(
        presets.RingDilatedAttentionV2,
        multihead_presets.RingMultiheadDilatedAttentionV2,
        wiring.CacheFlags,
        configs.RingConfig,
    ),
    Preset(
        presets.RingDilatedAttentionV3,
        multihead_presets.RingMultiheadDilatedAttentionV3,
        wiring.ResidentFlags,
        configs.ResidentConfig,
    ),
    Preset(
        presets.BlockSparseRingDilatedAttention,
        multihead_presets.BlockSparseRingMultiheadDilatedAttention,
        wiring.CacheFlags,
        configs.BlockSparseConfig,
    ),
)

PRESETS: dict[str, type[PatternAttention]] = {row.single.__name__: row.single for row in TABLE}
"""Presets called as (query, key, value)."""

MULTIHEAD_PRESETS: dict[str, type[MultiheadPatternAttention]] = {row.multihead.__name__: row.multihead for row in TABLE}
"""Presets called as (query) with an embedding."""

PRESET_FLAGS: dict[str, tuple[str, ...]] = {
    cls.__name__: tuple(row.flags.__annotations__) for row in TABLE for cls in (row.single, row.multihead)
}
"""The flags that each preset takes."""
