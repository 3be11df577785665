"""Families of patterns for one length, each as one pattern per layer, with about as many keys a query where that is possible."""

from __future__ import annotations

from collections.abc import Callable

from longattn.patterncache import Dilated, Full, HierarchicalBlocks, Pattern, Rectangle, Span, Window

Layers = tuple[Pattern, ...]


def _alike(build: Callable[[int, int, int], Pattern]) -> Callable[[int, int, int], Layers]:
    return lambda length, layers, heads: (build(length, layers, heads),) * layers


def _islands(length: int) -> Dilated:
    """The seeds' default, segments 2048, 4096 and 8192 of 32768 tokens, scaled: four islands."""
    return Dilated((length // 16, length // 8, length // 4), (1, 2, 4), causal=True)


def _shifted(length: int, layers: int, heads: int) -> Layers:
    """The same, every second layer shifted by half of its longest segment."""
    pattern = _islands(length)
    return tuple(
        Dilated(pattern.segment_lengths, pattern.dilation_rates, causal=True, shift=layer % 2 * (length // 8))
        for layer in range(layers)
    )


FAMILIES: dict[str, Callable[[int, int, int], Layers]] = {
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
    "dense, then window": lambda n, layers, heads: (Full(causal=True), *(Window(n // 8),) * (layers - 1)),
    "window, then dense": lambda n, layers, heads: (*(Window(n // 8),) * (layers - 1), Full(causal=True)),
}
"""name -> (length, layers, heads) -> the pattern of each layer. All are causal."""


def keys_per_query(patterns: Layers, length: int, heads: int) -> float:
    """Keys a query and head sees in the mean, over all layers: attention's work."""
    rectangle = Rectangle(heads, Span(0, length), Span(0, length))
    pairs = sum(b.pairs * b.heads.length for pattern in patterns for b in pattern.plan(rectangle).branches)
    return pairs / length / heads / len(patterns)
