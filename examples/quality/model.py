"""A small decoder whose layers differ in their patterns only: the parameters are the same for every family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from longattn.attention import pattern_attention
from longattn.patterncache import Pattern, Window


class Attends(Protocol):
    """Attention that is more than a pattern."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(batch, length, heads, head_dim) each, and the result."""
        ...


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x)); (batch, length, width)."""

    def __init__(self, width: int, heads: int, pattern: Pattern | Attends) -> None:
        super().__init__()
        self.heads, self.pattern = heads, pattern
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        # Over the last three tokens, so that a value knows the key before it: without, even dense attention learns no recall.
        self.short = nn.Conv1d(width, width, 3, groups=width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(batch, length, heads, head_dim) each, and the result."""
        if isinstance(self.pattern, Pattern):
            return pattern_attention(q, k, v, self.pattern)
        return self.pattern.attend(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        near = self.norm1(x)
        near = near + self.short(functional.pad(near.mT, (2, 0))).mT
        q, k, v = self.qkv(near).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + self.out(self.attend(q, k, v).flatten(2))
        return x + self.narrow(functional.gelu(self.wide(self.norm2(x))))


class Decoder(nn.Module):
    """Tokens (batch, length) to logits (batch, length, vocabulary)."""

    def __init__(self, vocabulary: int, patterns: Sequence[Pattern | Attends], width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.Sequential(*(Layer(width, heads, pattern) for pattern in patterns))
        self.norm, self.logits = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of each place."""
        return self.logits(self.norm(self.layers(self.embedding(tokens))))


def work(vocabulary: int, layers: int, width: int, heads: int, keys: float) -> int:
    """Floating-point operations of a token's forward pass: two for each weight of a product, and four for each key and feature."""
    with torch.device("meta"):
        model = Decoder(vocabulary, [Window(1)] * layers, width, heads)
    products = (m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d)))
    return round(2 * sum(m.weight.numel() for m in products) + 4 * layers * width * keys)
