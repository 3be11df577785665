"""Families of patterns for one length, each as what every layer sees, with about as many keys a query where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longattn.attention import pattern_attention
from longattn.patterncache import BlockSparse, Dilated, Full, HierarchicalBlocks, Pattern, Rectangle, Span, Window


@dataclass(frozen=True)
class BestBlocks:
    """Each block of queries sees the `most` blocks of keys that score best, and its own: other ones for each sequence and head."""

    size: int
    most: int

    def chosen(self, scores: Tensor) -> Tensor:
        """Which blocks scores (sequences, heads, blocks, blocks) choose, bool: `BlockSparse.from_scores`, for each sequence."""
        masks = BlockSparse.from_scores(scores.flatten(0, 1), self.size, topk=self.most, causal=True).mask
        return masks.unflatten(0, scores.shape[:2])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(batch, length, heads, head_dim) each, and the result.

        A block's score is that of its mean key with the query that likes it best (mean keys: MoBA, arXiv:2502.13189). Blocks are shown by a mask,
        because other blocks for every sequence and step would each be planned anew.
        """
        with torch.no_grad():
            queries, keys = (x.unflatten(1, (-1, self.size)) for x in (q, k))
            scores = torch.einsum("bithd,bjhd->bhijt", queries, keys.mean(2)).amax(-1)
            mask = self.chosen(scores).repeat_interleave(self.size, 2).repeat_interleave(self.size, 3)
        return pattern_attention(q, k, v, Full(causal=True), attention_mask=mask)


Layers = tuple[Pattern | BestBlocks, ...]
Family = Callable[[int, int, int], Layers]


def _alike(build: Callable[[int, int, int], Pattern | BestBlocks]) -> Family:
    return lambda length, layers, heads: (build(length, layers, heads),) * layers


def _islands(length: int) -> Dilated:
    """The presets' default, segments 2048, 4096 and 8192 of 32768 tokens, scaled: four islands."""
    return Dilated((length // 16, length // 8, length // 4), (1, 2, 4), causal=True)


def _shifted(length: int, layers: int, heads: int) -> Layers:
    """The same, every second layer shifted by half of its longest segment."""
    pattern = _islands(length)
    return tuple(
        Dilated(pattern.segment_lengths, pattern.dilation_rates, causal=True, shift=layer % 2 * (length // 8))
        for layer in range(layers)
    )


def _mixture(every: int, dense: int) -> Family:
    """Of `every` layers the one with that number is dense, and the others are windows of an eighth."""
    return lambda length, layers, heads: tuple(
        Full(causal=True) if layer % every == dense else Window(length // 8) for layer in range(layers)
    )


FAMILIES: dict[str, Family] = {
    "dense": _alike(lambda n, layers, heads: Full(causal=True)),
    "window": _alike(lambda n, layers, heads: Window(n // 8)),
    "window + sinks": _alike(lambda n, layers, heads: Window(n // 8 - 4, sinks=4)),
    "islands": _alike(lambda n, layers, heads: _islands(n)),
    "islands, shifted": _shifted,
    "for_length, cheapest": _alike(lambda n, layers, heads: Dilated.for_length(n, layers, num_heads=heads)),
    "for_length, n / 8 keys": _alike(lambda n, layers, heads: Dilated.for_length(n, layers, n / 8, heads)),
    "for_length, all residues": _alike(
        lambda n, layers, heads: Dilated.for_length(n, layers, n / (2 * heads) + 4, heads)
    ),
    "residues apart": _alike(lambda n, layers, heads: Dilated((n,), (heads,), causal=True) + Window(4)),
    "hierarchical": _alike(lambda n, layers, heads: HierarchicalBlocks(n // 16, 3, 4, causal=True)),
    "block top-k": _alike(lambda n, layers, heads: BestBlocks(n // 32, 3)),
    "dense, then window": _mixture(2, 0),
    "window, then dense": _mixture(2, 1),
    "dense, then three windows": _mixture(4, 0),
    "three windows, then dense": _mixture(4, 3),
}
"""name -> (length, layers, heads) -> what each layer sees. All are causal."""
MIXED = tuple(name for name in FAMILIES if "dense" in name)
"""Those that differ with the number of layers; the last two need four."""


def keys_per_query(patterns: Layers, length: int, heads: int) -> float:
    """Keys a query and head sees in the mean over all layers: attention's work. Scoring blocks counts for as many keys as it costs."""
    rectangle = Rectangle(heads, Span(0, length), Span(0, length))
    total = 0.0
    for pattern in patterns:
        if isinstance(pattern, BestBlocks):
            blocks = length // pattern.size
            # A score is one product where a key takes two, with q and with v.
            total += blocks / 2
            pattern = BlockSparse(pattern.size, pattern.chosen(torch.zeros(1, heads, blocks, blocks))[0], causal=True)
        total += sum(b.pairs * b.heads.length for b in pattern.plan(rectangle).branches) / length / heads
    return total / len(patterns)
