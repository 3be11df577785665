"""The seeds' names. Each is a constructor that builds a pattern and a schedule; none has a forward of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Never

import torch

from longattn.attention.modules import MultiheadPatternAttention, PatternAttention
from longattn.attention.validate import refuse_unknown
from longattn.patterncache import Dilated

SEGMENT_LENGTHS = (2048, 4096, 8192)
DILATION_RATES = (1, 2, 4)


class DilatedAttention(PatternAttention):
    """LongNet's dilated attention. = Dilated + Local.

    Args:
        segment_lengths: default (2048, 4096, 8192). dilation_rates: default (1, 2, 4).
        heads: "shared", "blocks" or "split", as in `Dilated`. Default "shared".
        causal: default False.
        softmax_scale, dropout, backend: as in `PatternAttention`.

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
        softmax_scale: float | None = None,
        dropout: float = 0.0,
        backend: str | None = None,
        **unknown: Never,
    ) -> None:
        refuse_unknown(f"{type(self).__name__}()", unknown)
        pattern = Dilated(segment_lengths, dilation_rates, heads, causal=causal)
        super().__init__(pattern, softmax_scale=softmax_scale, dropout=dropout, backend=backend)


class ImprovedDilatedAttention(DilatedAttention):
    """= DilatedAttention. The seeds' second name for it: the same pattern, and so the same numbers."""


class MultiheadDilatedAttention(MultiheadPatternAttention):
    """Multihead LongNet attention with MAGNETO's LayerNorm. = projections + Dilated + Local.

    Args:
        embed_dim, num_heads: num_heads divides embed_dim.
        segment_lengths: default (2048, 4096, 8192). dilation_rates: default (1, 2, 4).
        heads, causal: as in `Dilated`.
        options: dropout, bias, layer_norm, layer_norm_eps, gamma_init, kv_heads, softmax_scale, backend, device and dtype, as in
            `MultiheadPatternAttention`.

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
        softmax_scale: float | None = None,
        backend: str | None = None,
        **unknown: Never,
    ) -> None:
        refuse_unknown(f"{type(self).__name__}()", unknown)
        options: dict[str, Any] = {"dropout": dropout, "bias": bias, "layer_norm": layer_norm, "kv_heads": kv_heads}
        options |= {"layer_norm_eps": layer_norm_eps, "gamma_init": gamma_init, "device": device, "dtype": dtype}
        pattern = Dilated(segment_lengths, dilation_rates, heads, causal=causal)
        super().__init__(embed_dim, num_heads, pattern, softmax_scale=softmax_scale, backend=backend, **options)


class ImprovedMultiheadDilatedAttention(MultiheadDilatedAttention):
    """= MultiheadDilatedAttention. The seeds' second name for it; state dicts load into each other."""
