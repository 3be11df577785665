"""The multihead forms of the presets: projections, LayerNorm and the same pattern, schedule and wiring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from longattn.attention.arguments import MergeGrad
from longattn.attention.multihead import MultiheadPatternAttention
from longattn.attention.presets import DILATION_RATES, SEGMENT_LENGTHS, RingLayout, block_sparse_of, ring_of, wiring_of
from longattn.attention.sparse_config import SparsePatternConfig
from longattn.attention.wiring import CacheFlags, ManagerFlags, PoolFlags, ResidentFlags, split_flags
from longattn.patterncache import Dilated


class MultiheadOptions(TypedDict, total=False):
    """What all of them take, as in `MultiheadPatternAttention`."""

    dropout: float
    bias: bool
    fused_qkv: bool
    layer_norm: bool
    layer_norm_eps: float
    gamma_init: float
    kv_heads: int | None
    softmax_scale: float | Tensor | None
    backend: str | None
    merge_grad: MergeGrad
    head_start: int | None
    local_heads: int | None
    device: torch.device | str | None
    dtype: torch.dtype | None


class DilatedOptions(PoolFlags, total=False):
    """What multihead forms without a ring take by name alone."""

    heads: str
    causal: bool
    kv_heads: int | None
    softmax_scale: float | Tensor | None
    backend: str | None
    merge_grad: MergeGrad
    head_start: int | None
    local_heads: int | None


class ManagerOptions(MultiheadOptions, ManagerFlags, total=False):
    """And the flags of ImprovedDilatedAttentionV2."""


class CacheOptions(MultiheadOptions, CacheFlags, total=False):
    """And the flags of RingDilatedAttentionV2."""


class ResidentOptions(MultiheadOptions, ResidentFlags, total=False):
    """And the flags of RingDilatedAttentionV3."""


def options_of(preset: type, kind: Any, options: Any) -> dict[str, Any]:
    """What `MultiheadPatternAttention` takes, from the options of a preset that takes those of TypedDict `kind`."""
    wiring, remaining = split_flags(f"{preset.__name__}()", kind.__optional_keys__, options)
    return {**remaining, "wiring": wiring}


class MultiheadDilatedAttention(MultiheadPatternAttention):
    """Multihead LongNet attention with MAGNETO's LayerNorm. = projections + Dilated + Local.

    Args:
        embed_dim, num_heads: num_heads divides embed_dim.
        segment_lengths: default (2048, 4096, 8192).
        dilation_rates: default (1, 2, 4).
        others: dropout, bias, layer_norm, layer_norm_eps, gamma_init, kv_heads, fused_qkv, softmax_scale, backend, merge_grad,
            head_start, local_heads, device and dtype are as in `MultiheadPatternAttention`.
        heads, causal: as in `Dilated`.
        flags: enable_memory_pool, lightweight_pool, enable_profiling, as in `Wiring`.

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
        *,
        heads: str = "shared",
        causal: bool = False,
        kv_heads: int | None = None,
        fused_qkv: bool = False,
        softmax_scale: float | Tensor | None = None,
        backend: str | None = None,
        merge_grad: MergeGrad = "exact",
        head_start: int | None = None,
        local_heads: int | None = None,
        **flags: Unpack[PoolFlags],
    ) -> None:
        options: dict[str, Any] = {"dropout": dropout, "bias": bias, "layer_norm": layer_norm, "kv_heads": kv_heads}
        options["fused_qkv"] = fused_qkv
        options |= {"layer_norm_eps": layer_norm_eps, "gamma_init": gamma_init, "device": device, "dtype": dtype}
        options |= {"softmax_scale": softmax_scale, "backend": backend, "merge_grad": merge_grad}
        options |= {"head_start": head_start, "local_heads": local_heads}
        wiring = wiring_of(type(self), PoolFlags, flags)
        pattern = Dilated(segment_lengths, dilation_rates, heads, causal=causal)
        super().__init__(embed_dim, num_heads, pattern, wiring=wiring, **options)


class ImprovedMultiheadDilatedAttention(MultiheadDilatedAttention):
    """= MultiheadDilatedAttention + fused_qkv. State dicts of the two load into each other.

    Args:
        fused_qkv: default True.
        others: as in `MultiheadDilatedAttention`.
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
        *,
        fused_qkv: bool = True,
        **options: Unpack[DilatedOptions],
    ) -> None:
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype, "fused_qkv": fused_qkv}
        branches = (segment_lengths, dilation_rates)
        norm = {"layer_norm": layer_norm, "layer_norm_eps": layer_norm_eps, "gamma_init": gamma_init}
        super().__init__(embed_dim, num_heads, *branches, dropout, bias, **norm, **factory_kwargs, **options)


class ImprovedMultiheadDilatedAttentionV2(MultiheadPatternAttention):
    """= one fused projection + what ImprovedDilatedAttentionV2 is.

    Args:
        embed_dim, num_heads, segment_lengths, dilation_rates, heads, causal: as in `MultiheadDilatedAttention`.
        options: the others of `MultiheadDilatedAttention`, and the flags of `ImprovedDilatedAttentionV2`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = DILATION_RATES,
        *,
        heads: str = "shared",
        causal: bool = False,
        **options: Unpack[ManagerOptions],
    ) -> None:
        pattern = Dilated(segment_lengths, dilation_rates, heads, causal=causal)
        arguments: dict[str, Any] = {"fused_qkv": True} | options_of(type(self), ManagerOptions, options)
        super().__init__(embed_dim, num_heads, pattern, **arguments)


class RingMultiheadDilatedAttentionV2(MultiheadPatternAttention):
    """= projections + what RingDilatedAttentionV2 is.

    Args:
        ring_size, layout: as in `RingDilatedAttentionV2`.
        options: the others of `MultiheadDilatedAttention`, and the flags of `RingDilatedAttentionV2`.
        others: as in `MultiheadDilatedAttention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = DILATION_RATES,
        *,
        ring_size: int = 1,
        layout: RingLayout = "contiguous",
        heads: str = "shared",
        causal: bool = False,
        **options: Unpack[CacheOptions],
    ) -> None:
        pattern, ring = Dilated(segment_lengths, dilation_rates, heads, causal=causal), ring_of(ring_size, layout)
        super().__init__(embed_dim, num_heads, pattern, schedule=ring, **options_of(type(self), CacheOptions, options))


class RingMultiheadDilatedAttentionV3(MultiheadPatternAttention):
    """= projections + what RingDilatedAttentionV3 is. Arguments as in `RingMultiheadDilatedAttentionV2`, and cache_on_gpu."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = DILATION_RATES,
        *,
        ring_size: int = 1,
        layout: RingLayout = "contiguous",
        heads: str = "shared",
        causal: bool = False,
        **options: Unpack[ResidentOptions],
    ) -> None:
        pattern, ring = Dilated(segment_lengths, dilation_rates, heads, causal=causal), ring_of(ring_size, layout)
        arguments = options_of(type(self), ResidentOptions, options)
        super().__init__(embed_dim, num_heads, pattern, schedule=ring, **arguments)


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
        *,
        sparse_config: SparsePatternConfig | None = None,
        ring_size: int = 1,
        layout: RingLayout = "contiguous",
        heads: str = "shared",
        causal: bool = False,
        **options: Unpack[CacheOptions],
    ) -> None:
        dilated, ring = Dilated(segment_lengths, dilation_rates, heads, causal=causal), ring_of(ring_size, layout)
        arguments: dict[str, Any] = options_of(type(self), CacheOptions, options)
        arguments |= {"schedule": ring, "sparse_weights": True}
        super().__init__(embed_dim, num_heads, block_sparse_of(dilated, sparse_config), **arguments)
