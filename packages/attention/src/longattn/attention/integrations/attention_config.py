"""Configs of the factory, as xFormers has them: a dataclass per kind of attention, with `name` and `dropout` in all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any

import torch

from longattn.attention import presets
from longattn.attention.presets import DILATION_RATES, SEGMENT_LENGTHS


@dataclass
class AttentionConfig:
    """What every config has.

    Args:
        name: under which the kind is registered.
        dropout: probability in [0, 1) of dropping a (query, key) pair in training. Default 0.
    """

    name: str
    dropout: float = 0.0


class PresetConfig(AttentionConfig):
    """A config of a preset: None leaves a field to the constructor's default."""


def _config(name: str, kind: Any) -> Any:
    """A config whose fields are what a preset takes: the keys of TypedDict `kind`."""
    branches = [("segment_lengths", Any, SEGMENT_LENGTHS), ("dilation_rates", Any, DILATION_RATES)]
    names = [key for key in kind.__annotations__ if key != "dropout"]
    return make_dataclass(
        name,
        [*branches, *((key, Any, None) for key in names)],
        bases=(PresetConfig,),
        namespace={"__module__": __name__, "__doc__": f"Arguments of a preset, as in `{kind.__name__}`."},
    )


DilatedConfig = _config("DilatedConfig", presets.DilatedOptions)
ManagerConfig = _config("ManagerConfig", presets.ManagerOptions)
RingConfig = _config("RingConfig", presets.CacheOptions)
ResidentConfig = _config("ResidentConfig", presets.ResidentOptions)
BlockSparseConfig = _config("BlockSparseConfig", presets.BlockSparseOptions)


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
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "name"}
    arguments = values
    if isinstance(config, PresetConfig):
        arguments = {name: value for name, value in values.items() if value is not None}
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
