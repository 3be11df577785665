"""Figures of the guide, drawn while the pages are built: every cell is a count of a pattern, a plan's work, or a slot of a real ring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from longattn.attention import SparsePatternConfig
from longattn.attention.ring_buffer.linear_ring import LinearRing
from longattn.attention.schedules.layouts import LAYOUTS
from longattn.patterncache import Dilated, Full, Pattern, Rectangle, Restrict, Window

Grid = npt.NDArray[Any]

# Equal bytes for equal figures, and text that any viewer shows alike.
rcParams["svg.hashsalt"] = "longattn"
rcParams["svg.fonttype"] = "path"


def counts_of(pattern: Pattern, length: int, head: int = 0, num_heads: int = 8) -> Grid:
    """(length, length) counts of one head: rows are queries, columns keys."""
    return pattern.to_dense(length, num_heads)[head]


def work_of(pattern: Pattern, length: int, ranks: int, layout: str) -> Grid:
    """(ranks, ranks): pairs that a rank's queries have with the keys of each rank, all heads together, in the share of the mean."""
    rows = LAYOUTS[layout](length, ranks).rows()
    pairs = np.array(
        [
            [np.count_nonzero(pattern.counts(Rectangle(num_heads=4, queries=queries, keys=keys))) for keys in rows]
            for queries in rows
        ]
    )
    return pairs / pairs.sum() * ranks


def slots_of(capacity: int, sinks: int, tokens: int) -> Grid:
    """(tokens, sinks + capacity): the position that each slot of a ring holds after each token, -1 where it holds none."""
    ring = LinearRing(1, 1, 1, capacity, 1, torch.float32, torch.device("cpu"), prefix=sinks)
    ring.planes[0].fill_(-1)
    held = []
    for position in range(tokens):
        ring.write(position, [torch.full((1, 1, 1, 1), float(position))])
        held.append(ring.planes[0][0, 0, :, 0].clone())
    return torch.stack(held).long().numpy()


def panels(titles: Sequence[str], size: float = 3.2) -> tuple[Figure, list[Axes]]:
    """A row of square panels."""
    figure = Figure(figsize=(size * len(titles), size + 0.35), layout="constrained")
    axes = [figure.add_subplot(1, len(titles), at + 1) for at in range(len(titles))]
    for place, title in zip(axes, titles, strict=True):
        place.set_title(title, fontsize=9)
        place.tick_params(labelsize=7)
    return figure, axes


def show_counts(axes: Axes, counts: Grid, most: int = 3) -> None:
    """White where a query does not see a key, darker the more often it does."""
    axes.imshow(np.ma.masked_equal(counts, 0), cmap="viridis_r", vmin=1, vmax=max(2, most), interpolation="nearest")
    axes.set_xlabel("key", fontsize=8)
    axes.set_ylabel("query", fontsize=8)


def draw_patterns(parts: Sequence[tuple[str, Pattern, int]], length: int) -> Figure:
    """A panel for each (title, pattern, head)."""
    figure, axes = panels([title for title, _, _ in parts])
    for place, (_, pattern, head) in zip(axes, parts, strict=True):
        show_counts(place, counts_of(pattern, length, head))
    return figure


def dilated_branches() -> Figure:
    """Each branch of a dilated pattern, and all of them together."""
    whole = Dilated((8, 16, 32), (1, 2, 4), causal=True)
    parts: list[tuple[str, Pattern, int]] = [
        (f"segment {s}, rate {r}", replace(whole, segment_lengths=(s,), dilation_rates=(r,)), 0)
        for s, r in zip(whole.segment_lengths, whole.dilation_rates, strict=True)
    ]
    return draw_patterns([*parts, ("together", whole, 0)], 32)


def dilated_heads() -> Figure:
    """The offsets that heads take."""
    pattern = Dilated((16,), (4,), causal=True)
    return draw_patterns([(f"head {head}", pattern, head) for head in range(4)], 32)


def islands() -> Figure:
    """A dilated pattern whose segments end together, and one that joins the sequence."""
    apart = Dilated((8, 16), (1, 2), causal=True)
    joined = Dilated.for_length(64, layers=4)
    return draw_patterns(
        [
            (f"Dilated((8, 16), (1, 2)): {apart.lint(64).islands} islands", apart, 0),
            (f"Dilated.for_length(64, layers=4): {joined.lint(64).islands} island", joined, 0),
        ],
        64,
    )


def windows() -> Figure:
    """A window, and one with sinks."""
    return draw_patterns([("Window(8)", Window(8), 0), ("Window(8, sinks=2)", Window(8, sinks=2), 0)], 32)


def blocks() -> Figure:
    """The three layouts of blocks, and one of them within a dilated pattern."""

    def layout(kind: str) -> Pattern:
        return SparsePatternConfig(
            kind, sparsity_ratio=0.25, block_size=4, local_window_size=4, num_global_tokens=4
        ).layout()

    dilated = Dilated((16, 32), (1, 2))
    return draw_patterns(
        [
            ("dilated_sparse", layout("dilated_sparse"), 0),
            ("local_window", layout("local_window"), 0),
            ("bigbird", layout("bigbird"), 0),
            ("dilated, within bigbird", Restrict(dilated, layout("bigbird")), 0),
        ],
        32,
    )


def ring_work() -> Figure:
    """How much of the work each rank has with each rank's keys, by layout."""
    figure, axes = panels([f"{layout}: causal" for layout in LAYOUTS])
    for place, layout in zip(axes, LAYOUTS, strict=True):
        work = work_of(Full(causal=True), 64, 4, layout)
        place.imshow(work, cmap="viridis_r", vmin=0, vmax=0.5)
        for (row, column), share in np.ndenumerate(work):
            place.text(
                column,
                row,
                f"{share:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if share > 0.3 else "black",
            )
        place.set_xticks(range(4))
        place.set_yticks(range(4), [f"{rank}: {total:.2f}" for rank, total in enumerate(work.sum(axis=1))])
        place.set_xlabel("keys of rank", fontsize=8)
        place.set_ylabel("rank: its work over the mean", fontsize=8)
    return figure


def ring_buffer() -> Figure:
    """Which position each slot of a ring holds, token by token."""
    held = slots_of(capacity=6, sinks=2, tokens=14)
    figure = Figure(figsize=(5.2, 5.4), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(np.ma.masked_less(held, 0), cmap="viridis_r", vmin=0, vmax=20, interpolation="nearest")
    for (row, column), position in np.ndenumerate(held):
        if position >= 0:
            axes.text(
                column,
                row,
                str(position),
                ha="center",
                va="center",
                fontsize=8,
                color="black" if position < 10 else "white",
            )
    axes.axvline(1.5, color="black", linewidth=1)
    axes.set_xlabel("slot: 2 sinks, then a ring of 6", fontsize=9)
    axes.set_ylabel("after token", fontsize=9)
    axes.set_xticks(range(held.shape[1]))
    axes.set_yticks(range(held.shape[0]))
    axes.tick_params(labelsize=8)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "dilated-branches": dilated_branches,
    "dilated-heads": dilated_heads,
    "islands": islands,
    "windows": windows,
    "blocks": blocks,
    "ring-work": ring_work,
    "ring-buffer": ring_buffer,
}


def save(figure: Figure, path: Path) -> None:
    """Write an SVG that is the same each time."""
    figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")
