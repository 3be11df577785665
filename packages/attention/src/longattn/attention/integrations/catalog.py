"""The presets: one row each, from which the names, the flags, the factory and the support page follow."""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

from longattn.attention import multihead_presets as m
from longattn.attention import presets as p
from longattn.attention.integrations import attention_config as configs
from longattn.attention.modules import PatternAttention
from longattn.attention.multihead import MultiheadPatternAttention
from longattn.attention.wiring import FLAGS


class Preset(NamedTuple):
    """One row of the table.

    Attributes:
        single, multihead: the class called as (query, key, value), and the one called as (query) with an embedding.
        config: the factory's, of `single`; its fields are what `single` takes, the flags among them.
    """

    single: type[PatternAttention]
    multihead: type[MultiheadPatternAttention]
    config: type[configs.AttentionConfig]


TABLE = (
    Preset(p.DilatedAttention, m.MultiheadDilatedAttention, configs.DilatedConfig),
    Preset(p.ImprovedDilatedAttention, m.ImprovedMultiheadDilatedAttention, configs.DilatedConfig),
    Preset(p.ImprovedDilatedAttentionV2, m.ImprovedMultiheadDilatedAttentionV2, configs.ManagerConfig),
    Preset(p.RingDilatedAttentionV2, m.RingMultiheadDilatedAttentionV2, configs.RingConfig),
    Preset(p.RingDilatedAttentionV3, m.RingMultiheadDilatedAttentionV3, configs.ResidentConfig),
    Preset(p.BlockSparseRingDilatedAttention, m.BlockSparseRingMultiheadDilatedAttention, configs.BlockSparseConfig),
)

PRESETS: dict[str, type[PatternAttention]] = {row.single.__name__: row.single for row in TABLE}
"""Presets called as (query, key, value)."""

MULTIHEAD_PRESETS: dict[str, type[MultiheadPatternAttention]] = {row.multihead.__name__: row.multihead for row in TABLE}
"""Presets called as (query) with an embedding."""

PRESET_FLAGS: dict[str, tuple[str, ...]] = {
    cls.__name__: tuple(field.name for field in fields(row.config) if field.name in FLAGS)
    for row in TABLE
    for cls in (row.single, row.multihead)
}
"""The flags that each preset takes."""
