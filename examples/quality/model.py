"""A small decoder whose layers differ in their patterns only: the parameters are the same for every family."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from longattn.attention import pattern_attention
from longattn.patterncache import Pattern


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x)); (batch, length, width)."""

    def __init__(self, width: int, heads: int, pattern: Pattern) -> None:
        super().__init__()
        self.heads, self.pattern = heads, pattern
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        # Over the last three tokens, so that a value knows the key before it: without, even dense attention learns no recall.
        self.short = nn.Conv1d(width, width, 3, groups=width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        near = self.norm1(x)
        near = near + self.short(functional.pad(near.mT, (2, 0))).mT
        q, k, v = self.qkv(near).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + self.out(pattern_attention(q, k, v, self.pattern).flatten(2))
        return x + self.narrow(functional.gelu(self.wide(self.norm2(x))))


class Decoder(nn.Module):
    """Tokens (batch, length) to logits (batch, length, vocabulary)."""

    def __init__(self, vocabulary: int, patterns: Sequence[Pattern], width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.Sequential(*(Layer(width, heads, pattern) for pattern in patterns))
        self.norm, self.logits = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of each place."""
        return self.logits(self.norm(self.layers(self.embedding(tokens))))
