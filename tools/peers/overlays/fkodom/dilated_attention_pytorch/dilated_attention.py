"""The module that fkodom's models and tests import, of our presets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from longattn import attention


class DilatedAttention(attention.DilatedAttention):
    """Theirs has an operator of xformers to choose."""

    def __init__(self, segment_lengths: Sequence[int], dilation_rates: Sequence[int], op: Any = None, **options: Any):
        super().__init__(segment_lengths, dilation_rates, **options)


class MultiheadDilatedAttention(attention.MultiheadDilatedAttention):
    """Theirs takes rates before lengths, and returns no weights beside the output."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dilation_rates: Any = (),
        segment_lengths: Any = (),
        op: Any = None,
        **options: Any,
    ):
        # Their tests give the lengths first all the same; segments are the longer of the two.
        lengths, rates = sorted((segment_lengths, dilation_rates), key=sum, reverse=True)
        super().__init__(embed_dim, num_heads, lengths, rates, **options)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> tuple[Tensor, None]:  # type: ignore[override]
        """(batch, seq, embed_dim), and None."""
        return super().forward(query, key, value, is_causal=is_causal), None  # type: ignore[return-value]
