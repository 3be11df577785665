"""Plots of benchmark rows, a set for each processor; losses stand beside gains."""

from __future__ import annotations

import re
from collections.abc import Iterator

from matplotlib.figure import Figure

from tools.pages import quality_plots
from tools.pages.rows import NOT_ATTENTION, Measured, measured, processors, records

DIRECTIONS = ("forward", "forward+backward")
PLOTTED = ("attention", "patterns", "native", "windows", "choice", "presets")
_FASTER, _SLOWER = "#2f6f8f", "#c0562f"


def slug(text: str) -> str:
    """A file name from any text."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def figure_names(processor: str, rows: list[Measured]) -> list[tuple[str, str]]:
    """(direction, file) of each plot that `draw` makes for these rows of a processor."""
    return [
        (direction, f"ratios-{slug(processor)}-{slug(direction)}")
        for direction in DIRECTIONS
        if any(row.direction == direction and row.case in PLOTTED for row in rows)
    ]


def draw_all() -> Iterator[tuple[str, Figure]]:
    """(file, figure) of every plot."""
    rows = [row for row in measured(*PLOTTED) if row.peer not in NOT_ATTENTION]
    for processor in processors(rows):
        own = [row for row in rows if row.processor == processor]
        for direction, file in figure_names(processor, own):
            yield file, ratios([row for row in own if row.direction == direction], f"{processor}: {direction}")
    yield "growth", growth()
    yield "stream", stream()
    yield "simulated-steps", simulated_steps()
    yield from ((name, plot()) for name, plot in quality_plots.PLOTS.items())


def ratios(rows: list[Measured], title: str) -> Figure:
    """A bar for each comparison: the peer's CPU time over ours. Right of the line ours is faster, left of it slower."""
    ordered = sorted(rows, key=lambda row: row.ratio)
    figure = Figure(figsize=(9.0, 1.4 + 0.24 * len(ordered)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(ordered))
    bars = axes.barh(
        places,
        [row.ratio - 1 for row in ordered],
        left=1,
        color=[_FASTER if row.ratio >= 1 else _SLOWER for row in ordered],
    )
    axes.bar_label(bars, [f"{row.ratio:.2f}x" for row in ordered], padding=3, fontsize=8)
    axes.set_yticks(places, [label(row) for row in ordered], fontsize=8)
    axes.set_xscale("log")
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100) if tick <= 1.2 * max(1.0, ordered[-1].ratio)]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks], fontsize=8)
    axes.tick_params(axis="x", top=True, labeltop=True)  # a page's height apart
    axes.minorticks_off()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.16, y=0.01)
    axes.set_xlabel("CPU time of the other over ours", fontsize=8)
    axes.set_title(title, fontsize=10)
    return figure


def label(row: Measured) -> str:
    """What a bar is."""
    return f"{row.variant}, {row.seq_len} {'causal ' if row.causal else ''}{row.dtype} | {row.peer}"


def growth() -> Figure:
    """Time a token against length, one line for each dtype and direction."""
    rows = measured("growth")
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for processor in processors(rows):
        for direction in DIRECTIONS:
            for dtype in ("float32", "bfloat16"):
                own = sorted(
                    (row for row in rows if (row.processor, row.direction, row.dtype) == (processor, direction, dtype)),
                    key=lambda row: row.seq_len,
                )
                if own:
                    axes.plot(
                        [row.seq_len for row in own],
                        [1000 * row.ours_ms / row.seq_len for row in own],
                        marker="o",
                        label=f"{direction} {dtype}, {processor}",
                    )
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens", fontsize=8)
    axes.set_ylabel("CPU us a token", fontsize=8)
    axes.legend(fontsize=7)
    axes.tick_params(labelsize=8)
    return figure


def stream() -> Figure:
    """Growth of resident memory over a stream of a million tokens."""
    rows = records("decode-stream")
    figure = Figure(figsize=(7.0, 2.8), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([int(row["tokens"]) for row in rows], [int(row["growth_bytes"]) / 2**20 for row in rows])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens streamed", fontsize=8)
    axes.set_ylabel("MiB above the start", fontsize=8)
    axes.set_title(
        f"ring of {rows[0]['buffer_size']}; {rows[0]['cpu_model']} (family not recorded), {rows[0]['date']}", fontsize=9
    )
    axes.tick_params(labelsize=8)
    return figure


def simulated_steps(device: str = "H100") -> Figure:
    """Seconds of a layer's attention in training, simulated, against the length: the fastest engine of each pattern."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    rows = [row for row in records("simulation-planned") if row["device"] == device]
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        best: dict[int, float] = {}
        for row in rows:
            if row["pattern"] == pattern:
                tokens, seconds = int(row["tokens"]), float(row["seconds"])
                best[tokens] = min(seconds, best.get(tokens, seconds))
        axes.plot(list(best), list(best.values()), marker="o", label=pattern)
    places = {int(row["tokens"]): row["devices"] for row in rows}
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(list(places), [f"{tokens:,}\n{devices} devices" for tokens, devices in places.items()], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("tokens", fontsize=9)
    axes.set_ylabel(f"seconds a layer, {device}, simulated", fontsize=9)
    axes.legend(fontsize=8)
    return figure
