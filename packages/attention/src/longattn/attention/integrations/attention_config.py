"""Configs of the factory, as xFormers has them: a dataclass per kind of attention, with `name` and `dropout` in all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from longattn.attention.presets import DILATION_RATES, SEGMENT_LENGTHS, RingLayout
from longattn.attention.sparse_config import SparsePatternConfig


@dataclass
class AttentionConfig:
    """What every config has.

    Args:
        name: under which the kind is registered.
        dropout: probability in [0, 1) of dropping a (query, key) pair in training. Default 0.
    """

    name: str
    dropout: float = 0.0


@dataclass
class DilatedConfig(AttentionConfig):
    """Arguments of `DilatedAttention`, defaults as there."""

    segment_lengths: Sequence[int] = SEGMENT_LENGTHS
    dilation_rates: Sequence[int] = DILATION_RATES
    heads: str = "shared"
    causal: bool = False
    softmax_scale: float | None = None
    backend: str | None = None
    enable_memory_pool: bool = False
    lightweight_pool: bool = False
    enable_profiling: bool = False


@dataclass
class ManagerConfig(DilatedConfig):
    """Arguments of `ImprovedDilatedAttentionV2`."""

    enable_buffer_manager: bool = False
    enable_buffer_reuse: bool = True
    enable_preallocation: bool = False


@dataclass
class RingConfig(DilatedConfig):
    """Arguments of `RingDilatedAttentionV2`."""

    ring_size: int = 1
    layout: RingLayout = "contiguous"
    use_pattern_cache: bool = False


@dataclass
class ResidentConfig(RingConfig):
    """Arguments of `RingDilatedAttentionV3`."""

    cache_on_gpu: bool = False


@dataclass
class BlockSparseConfig(RingConfig):
    """Arguments of `BlockSparseRingDilatedAttention`."""

    sparse_config: SparsePatternConfig | None = None


@dataclass
class MultiheadConfig(AttentionConfig):
    """Arguments of a multihead preset: its own pattern's and flags' by name in `options`, as its constructor takes them.

    Args:
        embed_dim, num_heads: no default; None is refused by the constructor.
        bias, layer_norm, layer_norm_eps, gamma_init, device, dtype: as in `MultiheadPatternAttention`.
        options: further arguments, such as segment_lengths, causal, kv_heads, ring_size, enable_memory_pool.
    """

    embed_dim: int | None = None
    num_heads: int | None = None
    bias: bool = True
    layer_norm: bool = True
    layer_norm_eps: float = 1e-5
    gamma_init: float = 1.0
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


def arguments_of(config: Any) -> dict[str, Any]:
    """What a constructor is called with: the config's fields but its name, `options` unpacked."""
    arguments = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "name"}
    return arguments | dict(arguments.pop("options", {}))


def config_from(kind: type, entries: Mapping[str, Any]) -> Any:
    """A config of dataclass `kind` from a mapping; what is no field of it goes into `options`, where it has that.

    Raises:
        TypeError: an entry that the config does not take.
    """
    field_names = {f.name for f in fields(kind)}
    unknown = {name: value for name, value in entries.items() if name not in field_names}
    values = {name: value for name, value in entries.items() if name in field_names}
    if unknown and "options" not in field_names:
        raise TypeError(
            f"config must have entries among {', '.join(sorted({*field_names, 'name'}))}, got {', '.join(sorted(unknown))}"
        )
    return kind(**values, options={**values.pop("options", {}), **unknown}) if unknown else kind(**values)
