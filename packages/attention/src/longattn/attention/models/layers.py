"""Transformer layers around dilated attention, with MAGNETO's sub-LayerNorm (Wang et al. 2022, arXiv:2210.06423)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu

from longattn.attention.arguments import CallOptions
from longattn.attention.multihead import MultiheadPatternAttention
from longattn.attention.presets import DILATION_RATES, SEGMENT_LENGTHS
from longattn.attention.streaming.module import StreamingAttention
from longattn.attention.streaming.stream_state import StreamingState
from longattn.attention.validate import check_embedded, check_factory, check_positive, check_size, check_type
from longattn.kernels.interface import check_dropout
from longattn.patterncache import Dilated, Full, Pattern
from longattn.patterncache.spans import shortened

_ACTIVATIONS = {"gelu": gelu, "relu": relu, "silu": silu}


class FeedForward(nn.Module):
    """Linear, activation, LayerNorm, linear: (batch, seq, d_model) to the same.

    Args:
        d_model, dim_feedforward: widths.
        activation: "gelu" (default), "relu" or "silu".
        dropout: after the activation. Default 0.
        layer_norm_eps: default 1e-5.
        gamma_init: gain of both layers' initialisation. Default 1.0.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int,
        *,
        activation: str = "gelu",
        dropout: float = 0.0,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(activation, str) or activation not in _ACTIVATIONS:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"activation must be one of {tuple(_ACTIVATIONS)}, got {shortened(activation)}")
        factory_kwargs = check_factory(device, dtype)
        self.activation = activation
        self.linear1 = nn.Linear(d_model, check_size("dim_feedforward", dim_feedforward), **factory_kwargs)
        self.norm = nn.LayerNorm(dim_feedforward, eps=layer_norm_eps, **factory_kwargs)
        self.linear2 = nn.Linear(dim_feedforward, d_model, **factory_kwargs)
        self.dropout = nn.Dropout(check_dropout("dropout", dropout))
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_normal_(layer.weight, gain=check_positive("gamma_init", gamma_init))
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and dtype."""
        return self.linear2(self.norm(self.dropout(_ACTIVATIONS[self.activation](self.linear1(x)))))


class EncoderLayerOptions(CallOptions, total=False):
    """And the masks that `nn.TransformerEncoder` passes, in its own convention."""

    src_mask: Tensor | None
    src_key_padding_mask: Tensor | None


class _DilatedLayer(nn.Module):
    """Dilated self-attention, attention to `memory` where there is a pattern for it, feedforward, and a LayerNorm before each."""

    def __init__(
        self,
        sizes: tuple[int, int, int],
        branches: tuple[Sequence[int], Sequence[int]],
        dropout: float,
        activation: str,
        causal: bool,
        memory: Pattern | None = None,
        *,
        pattern: Pattern | None = None,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        d_model, nhead, dim_feedforward = sizes
        check_size("d_model", d_model)
        check_size("nhead", nhead)
        if memory is not None:
            check_type("memory_pattern", memory, Pattern, "a Pattern")
        factory_kwargs = check_factory(device, dtype)
        shared: dict[str, Any] = {"dropout": dropout, "layer_norm_eps": layer_norm_eps, "gamma_init": gamma_init}
        shared |= factory_kwargs
        if pattern is None:
            pattern, attention = Dilated(*branches, causal=causal), {"warn_apart": True, **attention}
        self.self_attn = MultiheadPatternAttention(d_model, nhead, pattern, **shared, **attention)
        if memory is not None:
            memory_options = {
                name: value for name, value in attention.items() if name not in ("rotary_base", "warn_apart")
            }
            self.memory_attn = MultiheadPatternAttention(d_model, nhead, memory, **shared, **memory_options)
        self.feedforward = FeedForward(d_model, dim_feedforward, activation=activation, **shared)
        self.norm1, self.norm2 = (nn.LayerNorm(d_model, eps=layer_norm_eps, **factory_kwargs) for _ in range(2))
        if memory is not None:
            self.norm3 = nn.LayerNorm(d_model, eps=layer_norm_eps, **factory_kwargs)
        self.dropout = nn.Dropout(dropout)


class DilatedTransformerEncoderLayer(_DilatedLayer):
    """x + attention(norm(x)), then x + feedforward(norm(x)): (batch, seq, d_model) to the same. Stacks in `nn.TransformerEncoder`.

    Args:
        d_model, nhead: nhead divides d_model.
        segment_lengths, dilation_rates: as in `Dilated`. Defaults (2048, 4096, 8192) and (1, 2, 4).
        dim_feedforward: default 2048.
        dropout: of attention pairs, within the feedforward and of both branches. Default 0.
        activation: "gelu" (default), "relu" or "silu".
        causal: default False.
        pattern: of self-attention, in place of segments, rates and causal. Default None: those.
        layer_norm_eps: default 1e-5. gamma_init: MAGNETO's gain. Default 1.0.
        device, dtype: of the parameters.
        options: those of the lines above, and further ones of `MultiheadPatternAttention`, such as kv_heads, rotary_base, fused_qkv, wiring.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = DILATION_RATES,
        dim_feedforward: int = 2048,
        dropout: float = 0.0,
        activation: str = "gelu",
        *,
        causal: bool = False,
        **options: Any,
    ) -> None:
        sizes, branches = (d_model, nhead, dim_feedforward), (segment_lengths, dilation_rates)
        super().__init__(sizes, branches, dropout, activation, causal, **options)

    def forward(
        self,
        src: Tensor,
        is_causal: bool | None = None,
        attention_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        **options: Unpack[EncoderLayerOptions],
    ) -> Tensor:
        """Masks and `CallOptions` as in `pattern_attention`; `is_causal=None` takes the constructor's.

        `nn.TransformerEncoder` calls with src_mask and src_key_padding_mask, which mean what they mean in `nn.TransformerEncoderLayer`: True hides.
        Then the pattern stays the constructor's unless is_causal is True: torch passes False where it was given no causal mask.

        Raises:
            TypeError, ValueError: a bad argument, by name.
        """
        if "src_mask" in options or "src_key_padding_mask" in options:
            if attention_mask is not None or key_padding_mask is not None:
                raise ValueError(
                    "attention_mask and key_padding_mask must be None beside src_mask and src_key_padding_mask, got both"
                )
            src_mask, padding = options.pop("src_mask", None), options.pop("src_key_padding_mask", None)
            attention_mask, key_padding_mask = masks_of_torch(src_mask, padding, len(src), self.self_attn.num_heads)
            is_causal = True if is_causal else None
        check_embedded("src", src, self.norm1.normalized_shape[0], self.norm1.weight.dtype)
        x = self.norm1(src)
        src = src + self.dropout(self.self_attn(x, x, x, is_causal, attention_mask, key_padding_mask, **options))
        return src + self.dropout(self.feedforward(self.norm2(src)))

    def stream(
        self, src: Tensor, attention: StreamingAttention, state: StreamingState | None
    ) -> tuple[Tensor, StreamingState]:
        """The layer for the next tokens of a stream, (batch, n, d_model); `attention` is of `self_attn.streaming()`."""
        attended, state = self.self_attn.stream(self.norm1(src), attention, state)
        src = src + attended
        return src + self.feedforward(self.norm2(src)), state


def masks_of_torch(
    mask: Tensor | None, padding: Tensor | None, batch: int, heads: int
) -> tuple[Tensor | None, Tensor | None]:
    """(attention_mask, key_padding_mask) of masks in the convention of `nn.TransformerEncoderLayer`.

    Args:
        mask: (Nq, Nk) or (batch * heads, Nq, Nk): bool, True hides, or floating, added to scores.
        padding: (batch, Nk): bool, True hides, or floating, added to scores.
        batch, heads: of the call.

    Raises:
        ValueError: a mask has another shape.
    """
    if mask is not None:
        if mask.ndim not in (2, 3) or (mask.ndim == 3 and len(mask) != batch * heads):
            raise ValueError(f"src_mask must be (Nq, Nk) or ({batch * heads}, Nq, Nk), got {tuple(mask.shape)}")
        mask = ~mask if mask.dtype == torch.bool else mask
        mask = mask.view(batch, heads, *mask.shape[1:]) if mask.ndim == 3 else mask
    if padding is None or padding.dtype == torch.bool:
        return mask, padding
    if padding.ndim != 2:
        raise ValueError(f"src_key_padding_mask must be (batch, Nk), got {tuple(padding.shape)}")
    added = padding[:, None, None]
    if mask is None:
        return added, None
    return (added + mask if mask.is_floating_point() else added.masked_fill(~mask, -torch.inf)), None


class DilatedTransformerDecoderLayer(_DilatedLayer):
    """Causal dilated self-attention, attention to an encoder's memory, feedforward; each as x + branch(norm(x)).

    Args:
        memory_pattern: who sees whom of memory. Default `Full()`: all. With a pattern that has positions, queries that outnumber
            memory are refused, as in `pattern_attention`.
        others: as in `DilatedTransformerEncoderLayer`; causal's default is True, and memory attention has no rotary positions.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = DILATION_RATES,
        dim_feedforward: int = 2048,
        dropout: float = 0.0,
        activation: str = "gelu",
        *,
        causal: bool = True,
        memory_pattern: Pattern | None = None,
        **options: Any,
    ) -> None:
        sizes, branches = (d_model, nhead, dim_feedforward), (segment_lengths, dilation_rates)
        memory = Full() if memory_pattern is None else memory_pattern
        super().__init__(sizes, branches, dropout, activation, causal, memory, **options)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        is_causal: bool | None = None,
        attention_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """tgt (batch, N, d_model), memory (batch, M, d_model); masks as in `pattern_attention`, for tgt and for memory."""
        for name, x in (("tgt", tgt), ("memory", memory)):
            check_embedded(name, x, self.norm1.normalized_shape[0], self.norm1.weight.dtype)
        x = self.norm1(tgt)
        tgt = tgt + self.dropout(self.self_attn(x, x, x, is_causal, attention_mask, key_padding_mask))
        x = self.norm2(tgt)
        attended = self.memory_attn(x, memory, memory, None, memory_mask, memory_key_padding_mask)
        tgt = tgt + self.dropout(attended)
        return tgt + self.dropout(self.feedforward(self.norm3(tgt)))
