"""`LongNet`: a small language model of dilated attention layers (Ding et al. 2023, arXiv:2307.02486)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Unpack, cast

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from longattn.attention.arguments import CallOptions
from longattn.attention.models.generation import TokenStream, check_tokens, generate
from longattn.attention.models.layers import DilatedTransformerEncoderLayer
from longattn.attention.reaching import residues_budget
from longattn.attention.validate import check_bool, check_factory, check_size
from longattn.kernels.interface import check_dropout
from longattn.patterncache import Dilated
from longattn.patterncache.spans import shortened

MOST_LAYERS = 1 << 16
"""Layers of a model: each is made."""


class LongNet(nn.Module):
    """Embedding, causal dilated layers with rotary positions, LayerNorm, and logits by the embedding's own weights.

    | tensor | shape |
    | --- | --- |
    | tokens | (batch, seq), integers |
    | logits | (batch, seq, num_tokens) |

    Differs from the paper in its positions: rotary ones instead of XPos.

    Args:
        num_tokens: size of the vocabulary.
        d_model, nhead, num_layers, dim_feedforward: defaults 512, 8, 6 and 4 * d_model.
        segment_lengths, dilation_rates: as in `Dilated`, for all layers. Default None: the layers' pattern is
            `Dilated.for_length(max_length, num_layers, budget, nhead)`.
        max_length: tokens that the default pattern joins: every token sees every earlier one of as many, in some head of each layer; beyond,
            segments of that length meet through a window alone. Default 32768.
        budget: keys that a query and head of the default pattern may see in the mean at that length. Default None: max_length / 2 over
            the heads, and 64 for a window, which is about what segments (2048, 4096, 8192) at rates (1, 2, 4) take.
        dropout: of the embedding and in every layer. Default 0.
        rotary_base: of the positions; None: none. Default 10000.
        checkpointing: keep only the layers' inputs for backward, and compute the rest again. Default False.
        device, dtype: of the parameters.
        attention: further options of the layers, such as kv_heads, fused_qkv, wiring, activation.

    Raises:
        TypeError, ValueError: a bad argument, by name.

    Example:
        >>> model = LongNet(256, d_model=32, nhead=4, num_layers=2, segment_lengths=(16, 64), dilation_rates=(1, 4))
        >>> model(torch.randint(256, (1, 100))).shape
        torch.Size([1, 100, 256])
    """

    def __init__(
        self,
        num_tokens: int,
        d_model: int = 512,
        nhead: int = 8,
        num_layers: int = 6,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        dim_feedforward: int | None = None,
        dropout: float = 0.0,
        *,
        max_length: int = 32768,
        budget: float | None = None,
        rotary_base: float | None = 10000.0,
        checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        count, width = check_size("num_layers", num_layers), check_size("d_model", d_model)
        if count > MOST_LAYERS:
            raise ValueError(f"num_layers must be at most {MOST_LAYERS}, got {shortened(count)}")
        factory_kwargs = check_factory(device, dtype)
        options: dict[str, Any] = {
            "dropout": check_dropout("dropout", dropout),
            "rotary_base": rotary_base,
            "causal": True,
        }
        # MAGNETO's gain for decoders of so many layers.
        options |= {"gamma_init": math.sqrt(math.log(2 * count)) if count > 1 else 1.0, **factory_kwargs, **attention}
        wide = 4 * width if dim_feedforward is None else dim_feedforward
        self.embedding = nn.Embedding(check_size("num_tokens", num_tokens), width, **factory_kwargs)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        if (segment_lengths is None) != (dilation_rates is None):
            raise ValueError(
                "dilation_rates must be given with segment_lengths, and only then, "
                f"got {dilation_rates} and segment_lengths={segment_lengths}"
            )
        if segment_lengths is None and "pattern" not in attention:
            length, heads = check_size("max_length", max_length), check_size("nhead", nhead)
            keys = residues_budget(length, heads, causal=True) if budget is None else budget
            options["pattern"] = Dilated.for_length(length, count, keys, heads)
        branches = () if segment_lengths is None or dilation_rates is None else (segment_lengths, dilation_rates)
        self.layers = nn.ModuleList(
            DilatedTransformerEncoderLayer(width, nhead, *branches, dim_feedforward=wide, **options)
            for _ in range(count)
        )
        self.norm = nn.LayerNorm(width, **factory_kwargs)
        self.dropout = nn.Dropout(dropout)
        self.checkpointing = check_bool("checkpointing", checkpointing)

    def forward(self, tokens: Tensor, key_padding_mask: Tensor | None = None, **options: Unpack[CallOptions]) -> Tensor:
        """Logits of the next token.

        Args:
            tokens: (batch, seq) integers; documents may be packed as (1, total) with cu_seqlens.
            key_padding_mask: (batch, seq) bool, True = padding.
            options: `CallOptions`, as in `pattern_attention`.
        """
        check_tokens(tokens)
        x = self.dropout(self.embedding(tokens) * self.embedding.embedding_dim**0.5)
        for layer in self.layers:
            if self.checkpointing and self.training:
                x: Tensor = cast(Any, torch.utils.checkpoint).checkpoint(
                    layer, x, None, None, key_padding_mask, use_reentrant=False, **options
                )
            else:
                x = layer(x, key_padding_mask=key_padding_mask, **options)
        return nn.functional.linear(self.norm(x), self.embedding.weight)

    def stream(self, *, invariant: bool = False, max_rewind: int = 0) -> TokenStream:
        """A stream of this model's tokens at position 0: logits piece by piece, in the memory that the patterns need.

        Args:
            invariant: logits do not depend on the batch or on how tokens are cut into calls, but for the projections, whose products torch
                makes. max_rewind: tokens that can be taken back. Both as in `StreamingAttention`.
        """
        return TokenStream(self, invariant, max_rewind)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: int | Sequence[int] | None = None,
        callback: Callable[[Tensor], object] | None = None,
        prefill_size: int = 2048,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue prompts, in the memory that the layers' patterns need (`StreamingAttention`). In evaluation mode.

        Args:
            tokens: (batch, seq), prompts of one length.
            max_new_tokens: at most so many more.
            temperature: 0 (default): the most likely token; else of the softmax from which one is drawn.
            top_p: draw among the fewest tokens whose probabilities add up to this. Default 1.0: among all.
            stop: tokens that end a row, which repeats the one that ended it until all rows have ended.
            callback: called with each new token of all rows, (batch,), as it is drawn.
            prefill_size: tokens of the prompt that are computed at once. Default 2048.
            generator: draws. Default: torch's.

        Returns:
            (batch, seq + new): the prompts and what continues them, one new token at least.

        Raises:
            TypeError, ValueError: a bad argument, by name; or the model is in training mode.
        """
        return generate(
            self.stream(), tokens, max_new_tokens, temperature, top_p, stop, callback, prefill_size, generator
        )
