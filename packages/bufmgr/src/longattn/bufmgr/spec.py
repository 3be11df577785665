"""The types of buffers and the policy of each type, in one table. A row is checked when it is made."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from longattn.bufmgr.checks import check_flag, check_kind, check_mib, check_whole, describe

ReuseFrequency = Literal["low", "medium", "high"]
Lifetime = Literal["ephemeral", "iteration", "persistent"]

MIB = 1024 * 1024


class BufferType(enum.Enum):
    """What a buffer is for. The value is the name in lower case, which kernels use as a role."""

    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    OUTPUT = "output"
    SCORES = "scores"
    WEIGHTS = "weights"
    TEMP = "temp"
    COMM = "comm"
    MASK = "mask"
    CACHE = "cache"

    # Members are singletons. Enum's own hash is a Python call, which every look-up in a table would pay for.
    __hash__ = object.__hash__


@dataclass(frozen=True)
class BufferConfig:
    """Policy of one buffer type.

    typical_size_mb: expected size of one buffer in MiB, positive. Default 1.0.
    reuse_frequency: "low", "medium" or "high": how soon the same size is requested again. Default "medium".
    lifetime: "ephemeral" (inside one call), "iteration" or "persistent". Default "iteration".
    prefer_bucketed: size classes suit small buffers of this type. Default False.
    prefer_numa: placement on a node suits large buffers of this type. Default False.
    zero_init: every buffer starts as zeros, also when its memory was used before. Default False.
    pinned: page-locked host memory where there is an accelerator, ordinary memory elsewhere. Default False.
    max_cached_buffers: most free buffers kept for reuse, 0 keeps none. Default 8.
    max_cached_mb: most MiB of free buffers kept for reuse; a larger buffer is never kept. Default 512.

    The preferences, `typical_size_mb` and `reuse_frequency` choose a strategy (strategy.py); `lifetime` describes.
    Raises TypeError or ValueError that names the field.
    """

    typical_size_mb: float = 1.0
    reuse_frequency: ReuseFrequency = "medium"
    lifetime: Lifetime = "iteration"
    prefer_bucketed: bool = False
    prefer_numa: bool = False
    zero_init: bool = False
    pinned: bool = False
    max_cached_buffers: int = 8
    max_cached_mb: float = 512.0

    def __post_init__(self) -> None:
        """Check every field once."""
        for name in ("prefer_bucketed", "prefer_numa", "zero_init", "pinned"):
            check_flag(name, getattr(self, name))
        check_mib("typical_size_mb", self.typical_size_mb, zero_allowed=False)
        check_mib("max_cached_mb", self.max_cached_mb, zero_allowed=True)
        _check_choice("reuse_frequency", self.reuse_frequency, get_args(ReuseFrequency))
        _check_choice("lifetime", self.lifetime, get_args(Lifetime))
        check_whole("max_cached_buffers", self.max_cached_buffers)

    @property
    def max_cached_bytes(self) -> int:
        """Most bytes of free buffers kept for reuse."""
        return int(self.max_cached_mb * MIB)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {describe(value)}")


# typical MiB, reuse, lifetime, bucketed, numa, zeros, pinned, most buffers kept, most MiB kept
_ROWS: dict[BufferType, BufferConfig] = {
    BufferType.QUERY: BufferConfig(4.0, "high", "iteration", True, False, False, False, 10, 1024),
    BufferType.KEY: BufferConfig(4.0, "high", "iteration", True, False, False, False, 10, 1024),
    BufferType.VALUE: BufferConfig(4.0, "high", "iteration", True, False, False, False, 10, 1024),
    BufferType.OUTPUT: BufferConfig(4.0, "high", "iteration", True, False, True, False, 10, 1024),
    BufferType.SCORES: BufferConfig(32.0, "medium", "ephemeral", False, True, False, False, 5, 512),
    BufferType.WEIGHTS: BufferConfig(32.0, "medium", "ephemeral", False, True, False, False, 5, 512),
    BufferType.TEMP: BufferConfig(0.5, "high", "ephemeral", True, False, False, False, 10, 512),
    BufferType.COMM: BufferConfig(8.0, "medium", "persistent", False, False, False, True, 5, 512),
    BufferType.MASK: BufferConfig(1.0, "medium", "persistent", True, False, False, False, 8, 64),
    BufferType.CACHE: BufferConfig(64.0, "low", "persistent", False, True, False, False, 5, 1024),
}

DEFAULT_CONFIGS: Mapping[BufferType, BufferConfig] = MappingProxyType(_ROWS)
"""The ten policies. Read only: give `custom_configs` to a manager to change one."""


_BY_NAME = {name: member for member in BufferType for name in (member.value, member.name)}


def parse_type(value: BufferType | str, name: str = "type") -> BufferType:
    """Return the BufferType that a member or its name in one case ("query", "QUERY") stands for.

    Raises TypeError for any other kind of value, ValueError for an unknown name.
    """
    if isinstance(value, BufferType):
        return value
    member = _BY_NAME.get(value) if isinstance(value, str) else None  # pyright: ignore[reportUnnecessaryIsInstance]
    if member is not None:
        return member
    expected = "a BufferType or its name, one of " + ", ".join(member.value for member in BufferType)
    check_kind(name, value, str, expected)
    raise ValueError(f"{name} must be {expected}, got {describe(value)}")


def merge_configs(custom: Mapping[BufferType, BufferConfig] | None) -> dict[BufferType, BufferConfig]:
    """Return the table of ten with the rows of `custom` in place of its own. Raises TypeError on a wrong key or row."""
    merged = dict(DEFAULT_CONFIGS)
    if custom is None:
        return merged
    check_kind("custom_configs", custom, Mapping, "a mapping of BufferType to BufferConfig")
    for key, config in custom.items():
        check_kind(f"custom_configs[{key!r}]", config, BufferConfig, "a BufferConfig")
        merged[parse_type(key, "custom_configs key")] = config
    return merged
