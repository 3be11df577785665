"""The seeds' names. Each is a constructor that builds a pattern, a schedule and a wiring; none has a forward of its own.

| preset | pattern | schedule | flags |
| --- | --- | --- | --- |
| DilatedAttention, ImprovedDilatedAttention | Dilated | Local | pool |
| ImprovedDilatedAttentionV2 | Dilated | Local | pool, manager |
| RingDilatedAttentionV2 | Dilated | Ring | pool, pattern cache |
| RingDilatedAttentionV3 | Dilated | Ring | pool, pattern cache, cache_on_gpu |
| BlockSparseRingDilatedAttention | Restrict(Dilated, BlockLayout) | Ring | pool, pattern cache |

Flags are those of `Wiring`. The same pattern gives the same numbers in every one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Unpack

from torch import Tensor

from longattn.attention.modules import PatternAttention
from longattn.attention.schedules.ring import Ring
from longattn.attention.sparse_config import SparsePatternConfig
from longattn.attention.validate import check_size, check_type
from longattn.attention.wiring import CacheFlags, ManagerFlags, PoolFlags, ResidentFlags, Wiring, split_flags
from longattn.patterncache import Dilated, Pattern, Restrict

SEGMENT_LENGTHS = (2048, 4096, 8192)
DILATION_RATES = (1, 2, 4)

RingLayout = Literal["contiguous", "zigzag", "striped"]


def ring_of(ring_size: int, layout: RingLayout) -> Ring:
    """The in-process ring of a preset."""
    return Ring(size=check_size("ring_size", ring_size), layout=layout)


def block_sparse_of(dilated: Dilated, config: SparsePatternConfig | None) -> Pattern:
    """What is left of a dilated pattern in the blocks that a config keeps."""
    if config is None:
        config = SparsePatternConfig()
    check_type("sparse_config", config, SparsePatternConfig, "None or a SparsePatternConfig")
    return Restrict(dilated, config.layout(dilated.causal))


def wiring_of(preset: type, kind: Any, flags: Any) -> Wiring:
    """The wiring of a preset that takes the flags of TypedDict `kind`."""
    return split_flags(f"{preset.__name__}()", kind.__optional_keys__, flags)[0]


class DilatedAttention(PatternAttention):
    """LongNet's dilated attention. = Dilated + Local.

    Args:
        segment_lengths: default (2048, 4096, 8192). dilation_rates: default (1, 2, 4).
        heads: "shared", "blocks" or "split", as in `Dilated`. Default "shared".
        causal: default False.
        softmax_scale, dropout, backend: as in `PatternAttention`.
        flags: enable_memory_pool, lightweight_pool, enable_profiling, as in `Wiring`.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = DILATION_RATES,
        *,
        heads: str = "shared",
        causal: bool = False,
        softmax_scale: float | Tensor | None = None,
        dropout: float = 0.0,
        backend: str | None = None,
        **flags: Unpack[PoolFlags],
    ) -> None:
        wiring = wiring_of(type(self), PoolFlags, flags)
        pattern = Dilated(segment_lengths, dilation_rates, heads, causal=causal)
        super().__init__(pattern, softmax_scale=softmax_scale, dropout=dropout, backend=backend, wiring=wiring)


class ImprovedDilatedAttention(DilatedAttention):
    """= DilatedAttention. The seeds' second name for it: the same pattern, and so the same numbers."""


class ImprovedDilatedAttentionV2(PatternAttention):
    """= Dilated + Local + outputs and scratch through an AttentionBufferManager.

    Args:
        flags: those of `DilatedAttention`, and enable_buffer_manager, enable_buffer_reuse, enable_preallocation, as in `Wiring`.
        segment_lengths, dilation_rates, heads, causal, softmax_scale, dropout, backend: as in `DilatedAttention`.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = DILATION_RATES,
        *,
        heads: str = "shared",
        causal: bool = False,
        softmax_scale: float | Tensor | None = None,
        dropout: float = 0.0,
        backend: str | None = None,
        **flags: Unpack[ManagerFlags],
    ) -> None:
        wiring = wiring_of(type(self), ManagerFlags, flags)
        pattern = Dilated(segment_lengths, dilation_rates, heads, causal=causal)
        super().__init__(pattern, softmax_scale=softmax_scale, dropout=dropout, backend=backend, wiring=wiring)


class RingDilatedAttentionV2(PatternAttention):
    """= Dilated + Ring + own statistics of the pattern cache.

    Args:
        ring_size, layout: of the `Ring`, played in one process. Defaults 1 and "contiguous".
        flags: those of `DilatedAttention`, and use_pattern_cache, as in `Wiring`.
        segment_lengths, dilation_rates, heads, causal, softmax_scale, dropout, backend: as in `DilatedAttention`.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = DILATION_RATES,
        *,
        ring_size: int = 1,
        layout: RingLayout = "contiguous",
        heads: str = "shared",
        causal: bool = False,
        softmax_scale: float | Tensor | None = None,
        dropout: float = 0.0,
        backend: str | None = None,
        **flags: Unpack[CacheFlags],
    ) -> None:
        options: dict[str, Any] = {"softmax_scale": softmax_scale, "dropout": dropout, "backend": backend}
        wiring, ring = wiring_of(type(self), CacheFlags, flags), ring_of(ring_size, layout)
        pattern = Dilated(segment_lengths, dilation_rates, heads, causal=causal)
        super().__init__(pattern, schedule=ring, wiring=wiring, **options)


class RingDilatedAttentionV3(PatternAttention):
    """= Dilated + Ring + plans whose index tensors may stay on the device.

    Args:
        flags: those of `RingDilatedAttentionV2`, and cache_on_gpu, as in `Wiring`.
        others: as in `RingDilatedAttentionV2`.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = DILATION_RATES,
        *,
        ring_size: int = 1,
        layout: RingLayout = "contiguous",
        heads: str = "shared",
        causal: bool = False,
        softmax_scale: float | Tensor | None = None,
        dropout: float = 0.0,
        backend: str | None = None,
        **flags: Unpack[ResidentFlags],
    ) -> None:
        options: dict[str, Any] = {"softmax_scale": softmax_scale, "dropout": dropout, "backend": backend}
        wiring, ring = wiring_of(type(self), ResidentFlags, flags), ring_of(ring_size, layout)
        pattern = Dilated(segment_lengths, dilation_rates, heads, causal=causal)
        super().__init__(pattern, schedule=ring, wiring=wiring, **options)


class BlockSparseRingDilatedAttention(PatternAttention):
    """= Restrict(Dilated, BlockLayout) + Ring: dilated attention within the blocks that `sparse_config` keeps. One softmax over them;
    weights come as sparse COO.

    Args:
        sparse_config: default SparsePatternConfig().
        others, flags: as in `RingDilatedAttentionV2`.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = DILATION_RATES,
        *,
        sparse_config: SparsePatternConfig | None = None,
        ring_size: int = 1,
        layout: RingLayout = "contiguous",
        heads: str = "shared",
        causal: bool = False,
        softmax_scale: float | Tensor | None = None,
        dropout: float = 0.0,
        backend: str | None = None,
        **flags: Unpack[CacheFlags],
    ) -> None:
        options: dict[str, Any] = {"softmax_scale": softmax_scale, "dropout": dropout, "backend": backend}
        wiring, ring = wiring_of(type(self), CacheFlags, flags), ring_of(ring_size, layout)
        dilated = Dilated(segment_lengths, dilation_rates, heads, causal=causal)
        options |= {"schedule": ring, "wiring": wiring, "sparse_weights": True}
        super().__init__(block_sparse_of(dilated, sparse_config), **options)
