"""The presets: constructors that build a pattern, a schedule and a wiring. None has a forward of its own.

| preset | pattern | schedule | flags |
| --- | --- | --- | --- |
| DilatedAttention, ImprovedDilatedAttention | Dilated | Local | pool |
| ImprovedDilatedAttentionV2 | Dilated | Local | pool, manager |
| RingDilatedAttentionV2 | Dilated | Ring | pool, pattern cache |
| RingDilatedAttentionV3 | Dilated | Ring | pool, pattern cache, cache_on_gpu |
| BlockSparseRingDilatedAttention | Restrict(Dilated, BlockLayout) | Ring | pool, pattern cache |

Flags are those of `Wiring`. The same pattern gives the same numbers in every one of them. What a preset takes by name is a TypedDict; its
config, its line in the factory and its row of the support page are read from that.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, TypedDict, Unpack

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from longattn.attention.arguments import MergeGrad
from longattn.attention.modules import PatternAttention
from longattn.attention.schedules.base import Schedule
from longattn.attention.schedules.place import many_processes
from longattn.attention.schedules.ring import Ring
from longattn.attention.sparse_config import SparsePatternConfig
from longattn.attention.validate import check_size, check_type
from longattn.attention.wiring import CacheFlags, ManagerFlags, PoolFlags, ResidentFlags, split_flags
from longattn.patterncache import Dilated, Pattern, Restrict

SEGMENT_LENGTHS = (2048, 4096, 8192)
DILATION_RATES = (1, 2, 4)

RingLayout = Literal["contiguous", "zigzag", "striped"]


class PatternOptions(TypedDict, total=False):
    """What every preset and multihead preset takes by name, by the meaning it has in `Dilated` and `PatternAttention`."""

    heads: str
    causal: bool
    softmax_scale: float | Tensor | None
    backend: str | None
    merge_grad: MergeGrad
    head_start: int | None


class RingArguments(TypedDict, total=False):
    """What presets on a `Ring` take besides."""

    ring_size: int
    layout: RingLayout
    group: ProcessGroup | DeviceMesh | None
    schedule: Schedule | None


class BlockArguments(TypedDict, total=False):
    """What block-sparse presets take besides."""

    sparse_config: SparsePatternConfig | None


class SingleOptions(PatternOptions, total=False):
    """What presets take that are called with heads."""

    dropout: float
    num_heads: int | None


class DilatedOptions(SingleOptions, PoolFlags, total=False):
    """Those of DilatedAttention."""


class ManagerOptions(SingleOptions, ManagerFlags, total=False):
    """Those of ImprovedDilatedAttentionV2."""


class CacheOptions(SingleOptions, RingArguments, CacheFlags, total=False):
    """Those of RingDilatedAttentionV2."""


class ResidentOptions(SingleOptions, RingArguments, ResidentFlags, total=False):
    """Those of RingDilatedAttentionV3."""


class BlockSparseOptions(CacheOptions, BlockArguments, total=False):
    """Those of BlockSparseRingDilatedAttention."""


def preset_arguments(preset: type, kind: Any, branches: tuple[Sequence[int], Sequence[int]], options: Any) -> Any:
    """What `PatternAttention` or `MultiheadPatternAttention` takes for a preset.

    Args:
        preset: the class, for messages. kind: the TypedDict of what it takes by name. branches: segment lengths, dilation rates.

    Raises:
        TypeError, ValueError: an option that it does not take, or a bad one, by name.
    """
    taken = kind.__optional_keys__
    wiring, remaining = split_flags(f"{preset.__name__}()", taken, options)
    heads, causal = remaining.pop("heads", "shared"), remaining.pop("causal", False)
    pattern: Pattern = Dilated(*branches, heads, causal=causal)
    arguments: dict[str, Any] = {"wiring": wiring, "warn_apart": True}
    if "ring_size" in taken:
        arguments["schedule"] = _schedule_of(
            preset, **{name: remaining.pop(name) for name in _RING if name in remaining}
        )
    if "sparse_config" in taken:
        config = remaining.pop("sparse_config", None)
        config = SparsePatternConfig() if config is None else config
        check_type("sparse_config", config, SparsePatternConfig, "None or a SparsePatternConfig")
        pattern = Restrict(pattern, config.layout(causal))
        arguments["sparse_weights"] = True
    return {"pattern": pattern, **arguments, **remaining}


_RING = RingArguments.__optional_keys__
_WARNED: set[type] = set()
"""Presets that have said that their ring is in this process."""


def _schedule_of(
    preset: type,
    ring_size: int = 1,
    layout: RingLayout = "contiguous",
    group: ProcessGroup | DeviceMesh | None = None,
    schedule: Schedule | None = None,
) -> Schedule:
    """The schedule that is given, a ring over a group, or one played in this process."""
    check_size("ring_size", ring_size)
    if schedule is not None:
        check_type("schedule", schedule, Schedule, "None or a Schedule such as Ring(group)")
        if group is not None or ring_size != 1 or layout != "contiguous":
            raise ValueError(
                f"schedule must be None where group, ring_size or layout is given, got {schedule}: it says all of them"
            )
        return schedule
    if group is not None:
        return Ring(group, size=None if ring_size == 1 else ring_size, layout=layout)
    if ring_size > 1 and many_processes() and preset not in _WARNED:
        _WARNED.add(preset)
        warnings.warn(
            f"{preset.__name__}(ring_size={ring_size}) plays its ring in this process, over whole tensors, though torch.distributed is "
            f"initialised; where q, k and v are one rank's shards, give group= or schedule=",
            stacklevel=4,
        )
    return Ring(size=ring_size, layout=layout)


class DilatedAttention(PatternAttention):
    """LongNet's dilated attention. = Dilated + Local.

    Args:
        segment_lengths: default (2048, 4096, 8192). dilation_rates: default (1, 2, 4).
        heads: "shared", "blocks" or "split", as in `Dilated`. Default "shared".
        causal: default False.
        softmax_scale, dropout, backend, merge_grad, head_start, num_heads: as in `PatternAttention`.
        enable_memory_pool, lightweight_pool, enable_profiling: as in `Wiring`.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = DILATION_RATES,
        **options: Unpack[DilatedOptions],
    ) -> None:
        branches = segment_lengths, dilation_rates
        super().__init__(**preset_arguments(type(self), DilatedOptions, branches, options))


class ImprovedDilatedAttention(DilatedAttention):
    """= DilatedAttention, by a second name: the same pattern, and so the same numbers."""


class ImprovedDilatedAttentionV2(PatternAttention):
    """= Dilated + Local + outputs and scratch through an AttentionBufferManager.

    Args:
        options: those of `DilatedAttention`, and enable_buffer_manager, enable_buffer_reuse, enable_preallocation, as in `Wiring`.
        segment_lengths, dilation_rates: as in `DilatedAttention`.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = DILATION_RATES,
        **options: Unpack[ManagerOptions],
    ) -> None:
        branches = segment_lengths, dilation_rates
        super().__init__(**preset_arguments(type(self), ManagerOptions, branches, options))


class RingDilatedAttentionV2(PatternAttention):
    """= Dilated + Ring + own statistics of the pattern cache.

    Args:
        ring_size, layout: of the `Ring`, played in one process on whole tensors. Defaults 1 and "contiguous".
        group: a ProcessGroup, or a DeviceMesh of one dimension: the ring is over its ranks, and q, k and v are one rank's shards. Default None.
        schedule: what takes the ring's place, such as Ulysses(group). Default None.
        options: those of `DilatedAttention`, and use_pattern_cache, as in `Wiring`.
        segment_lengths, dilation_rates: as in `DilatedAttention`.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = DILATION_RATES,
        **options: Unpack[CacheOptions],
    ) -> None:
        super().__init__(**preset_arguments(type(self), CacheOptions, (segment_lengths, dilation_rates), options))


class RingDilatedAttentionV3(PatternAttention):
    """= Dilated + Ring + plans whose index tensors may stay on the device.

    Args:
        options: those of `RingDilatedAttentionV2`, and cache_on_gpu, as in `Wiring`.
        segment_lengths, dilation_rates: as in `DilatedAttention`.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = DILATION_RATES,
        **options: Unpack[ResidentOptions],
    ) -> None:
        super().__init__(**preset_arguments(type(self), ResidentOptions, (segment_lengths, dilation_rates), options))


class BlockSparseRingDilatedAttention(PatternAttention):
    """= Restrict(Dilated, BlockLayout) + Ring: dilated attention within the blocks that `sparse_config` keeps. One softmax over them;
    weights come as sparse COO.

    Args:
        sparse_config: default SparsePatternConfig().
        options: those of `RingDilatedAttentionV2`.
        segment_lengths, dilation_rates: as in `DilatedAttention`.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = DILATION_RATES,
        **options: Unpack[BlockSparseOptions],
    ) -> None:
        branches = segment_lengths, dilation_rates
        super().__init__(**preset_arguments(type(self), BlockSparseOptions, branches, options))
