"""`draw`: a pattern as a PNG. Matplotlib, the extra `png`, is imported only here, when asked."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from os import PathLike
from typing import Any

import numpy as np

from longattn.patterncache.analysis.keys import keys_per_query
from longattn.patterncache.analysis.propagation import square
from longattn.patterncache.analysis.reduced import reduced_counts
from longattn.patterncache.analysis.results import Lint
from longattn.patterncache.interop.csr import head_classes
from longattn.patterncache.pattern import Pattern
from longattn.patterncache.spans import Span

MOST_TOKENS = 2048
"""Tokens up to which a map has a cell for each pair; longer ones are averaged over tiles."""

CELLS = 512
"""Rows and columns of a map that is averaged over tiles."""


def draw(pattern: Pattern, verdict: Lint, head: int, path: str | PathLike[str]) -> None:
    """Write a PNG: who sees whom in one head, beside it the keys of each query, of every kind of head; the lint line above.

    Above 2048 tokens the map is averaged over square tiles of positions, each sampled by its first 16 (see `reduced_counts`).

    Args:
        pattern: what to draw.
        verdict: its lint, which says how long and of how many heads.
        head: whose map, below the number of heads.
        path: of the file, whatever its ending.

    Raises:
        ValueError: no token.
        ModuleNotFoundError: matplotlib is not installed.
    """
    length, num_heads = verdict.length, verdict.num_heads
    if length < 1:
        raise ValueError(f"N must be at least 1 for a picture, got {length}")
    figure = import_module("matplotlib.figure").Figure(figsize=(9.0, 6.4), layout="constrained")
    agg = import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    grid, keys = figure.subplots(1, 2, width_ratios=(2, 1), sharey=True)
    shown = _map(grid, pattern, length, num_heads, head)
    grid.set(title=f"{verdict.pattern}, head {head} of {num_heads}", xlabel="key", ylabel="query")
    if shown is not None:
        figure.colorbar(shown, ax=grid, label="times seen", shrink=0.7)
    plan = pattern.plan(square(length, num_heads))
    classes, number = keys_per_query(plan)
    for c in range(len(head_classes(plan)[1])):
        keys.plot(
            number[c], np.arange(length), label=f"heads {', '.join(map(str, np.flatnonzero(classes == c)[:4]))}", lw=1
        )
    keys.set(title="keys per query", xlabel="keys")
    keys.legend(fontsize="small")
    figure.suptitle(verdict.line.removeprefix("lint: ").replace("; ", "\n", 1), fontsize="small", wrap=True)
    agg.print_png(str(path))


def _map(axes: Any, pattern: Pattern, length: int, num_heads: int, head: int) -> Any:
    """Draw who sees whom; what a colour bar explains, or None where every pair is seen at most once."""
    if length > MOST_TOKENS:
        mean = reduced_counts(pattern, length, num_heads, head=head, cells=CELLS)
        # Sparse far regions matter as much as the diagonal: the square root keeps both visible.
        norm = import_module("matplotlib.colors").PowerNorm(0.5, 0, max(1e-9, float(mean.max())))
        extent = (0, length, length, 0)
        return axes.imshow(np.ma.masked_equal(mean, 0), cmap="viridis_r", norm=norm, extent=extent)
    counts = pattern.counts(replace(square(length, num_heads), heads=Span(head, 1)))[0]
    most = max(1, int(counts.max(initial=0)))
    shown = axes.imshow(
        np.ma.masked_equal(counts, 0), cmap="viridis_r", vmin=1, vmax=max(2, most), interpolation="nearest"
    )
    return shown if most > 1 else None
