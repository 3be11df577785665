"""The multihead forms of the presets: projections, LayerNorm and the same pattern, schedule and wiring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch

from longattn.attention.multihead import MultiheadPatternAttention
from longattn.attention.presets import (
    DILATION_RATES,
    SEGMENT_LENGTHS,
    BlockArguments,
    PatternOptions,
    RingArguments,
    preset_arguments,
)
from longattn.attention.wiring import CacheFlags, ManagerFlags, PoolFlags, ResidentFlags


class _HeadOptions(PatternOptions, total=False):
    """What says how many heads there are and how wide they are, as in `MultiheadPatternAttention`."""

    kv_heads: int | None
    value_head_dim: int | None
    local_heads: int | None
    rotary_base: float | None


class MultiheadOptions(_HeadOptions, total=False):
    """What all of them take, as in `MultiheadPatternAttention`."""

    dropout: float
    bias: bool
    fused_qkv: bool
    layer_norm: bool
    layer_norm_eps: float
    gamma_init: float
    device: torch.device | str | None
    dtype: torch.dtype | None


class _ByName(_HeadOptions, PoolFlags, total=False):
    """What MultiheadDilatedAttention takes by name alone: the rest has a place as well."""

    fused_qkv: bool


class _Pool(MultiheadOptions, PoolFlags, total=False):
    """All that MultiheadDilatedAttention takes."""


class _Manager(MultiheadOptions, ManagerFlags, total=False):
    """And the flags of ImprovedDilatedAttentionV2."""


class _Cache(MultiheadOptions, RingArguments, CacheFlags, total=False):
    """And the arguments of RingDilatedAttentionV2."""


class _Resident(MultiheadOptions, RingArguments, ResidentFlags, total=False):
    """And the arguments of RingDilatedAttentionV3."""


class _BlockSparse(_Cache, BlockArguments, total=False):
    """And those of BlockSparseRingDilatedAttention."""


class MultiheadDilatedAttention(MultiheadPatternAttention):
    """Multihead LongNet attention with MAGNETO's LayerNorm. = projections + Dilated + Local.

    Args:
        embed_dim, num_heads: num_heads divides embed_dim.
        segment_lengths: default (2048, 4096, 8192).
        dilation_rates: default (1, 2, 4).
        others: dropout, bias, layer_norm, layer_norm_eps, gamma_init, kv_heads, value_head_dim, rotary_base, fused_qkv, softmax_scale,
            backend, merge_grad, head_start, local_heads, device and dtype are as in `MultiheadPatternAttention`.
        heads, causal: as in `Dilated`.
        enable_memory_pool, lightweight_pool, enable_profiling: as in `Wiring`.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = DILATION_RATES,
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[_ByName],
    ) -> None:
        norm: dict[str, Any] = {"layer_norm": layer_norm, "layer_norm_eps": layer_norm_eps, "gamma_init": gamma_init}
        placed = {"dropout": dropout, "bias": bias, "device": device, "dtype": dtype, **norm}
        arguments = preset_arguments(type(self), _Pool, (segment_lengths, dilation_rates), placed | {**options})
        super().__init__(embed_dim, num_heads, **arguments)


class ImprovedMultiheadDilatedAttention(MultiheadDilatedAttention):
    """= MultiheadDilatedAttention + fused_qkv. State dicts of the two load into each other.

    Args:
        fused_qkv: default True.
        others: as in `MultiheadDilatedAttention`.
    """

    def __init__(self, *arguments: Any, fused_qkv: bool = True, **options: Any) -> None:
        super().__init__(*arguments, fused_qkv=fused_qkv, **options)


class ImprovedMultiheadDilatedAttentionV2(MultiheadPatternAttention):
    """= one fused projection + what ImprovedDilatedAttentionV2 is.

    Args:
        embed_dim, num_heads, segment_lengths, dilation_rates: as in `MultiheadDilatedAttention`.
        options: the others of `MultiheadDilatedAttention`, and the flags of `ImprovedDilatedAttentionV2`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = DILATION_RATES,
        **options: Unpack[_Manager],
    ) -> None:
        arguments = preset_arguments(type(self), _Manager, (segment_lengths, dilation_rates), options)
        super().__init__(embed_dim, num_heads, **({"fused_qkv": True} | arguments))


class RingMultiheadDilatedAttentionV2(MultiheadPatternAttention):
    """= projections + what RingDilatedAttentionV2 is.

    Args:
        options: the others of `MultiheadDilatedAttention`, and what `RingDilatedAttentionV2` takes besides.
        others: as in `MultiheadDilatedAttention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = DILATION_RATES,
        **options: Unpack[_Cache],
    ) -> None:
        arguments = preset_arguments(type(self), _Cache, (segment_lengths, dilation_rates), options)
        super().__init__(embed_dim, num_heads, **arguments)


class RingMultiheadDilatedAttentionV3(MultiheadPatternAttention):
    """= projections + what RingDilatedAttentionV3 is. Arguments as in `RingMultiheadDilatedAttentionV2`, and cache_on_gpu."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = DILATION_RATES,
        **options: Unpack[_Resident],
    ) -> None:
        arguments = preset_arguments(type(self), _Resident, (segment_lengths, dilation_rates), options)
        super().__init__(embed_dim, num_heads, **arguments)


class BlockSparseRingMultiheadDilatedAttention(MultiheadPatternAttention):
    """= projections + what BlockSparseRingDilatedAttention is: weights come as sparse COO.

    Arguments as in `RingMultiheadDilatedAttentionV2`, and sparse_config.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = DILATION_RATES,
        **options: Unpack[_BlockSparse],
    ) -> None:
        arguments = preset_arguments(type(self), _BlockSparse, (segment_lengths, dilation_rates), options)
        super().__init__(embed_dim, num_heads, **arguments)
