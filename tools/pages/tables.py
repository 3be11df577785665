"""Tables of measured rows for the pages, as Markdown: `{rows}` blocks name one of `TABLES`."""

from __future__ import annotations

from collections.abc import Callable

from longattn.kernels import backends
from longattn.kernels.dispatch import table as dispatch_table
from tools import versions
from tools.pages import quality
from tools.pages.plots import figure_names
from tools.pages.rows import NOT_ATTENTION, Cells, Measured, measured, processors, records, table

KERNELS = ("attention", "patterns", "native", "windows", "growth", "choice")
"""Files that time attention itself beside something else that computes it."""

COLUMNS = (
    ("forward", "float32"),
    ("forward", "bfloat16"),
    ("forward+backward", "float32"),
    ("forward+backward", "bfloat16"),
)


def timed(row: Measured | None) -> str:
    """Our time, and how many times as long the peer takes."""
    if row is None:
        return "-"
    ms = f"{row.ours_ms:.0f}" if row.ours_ms >= 100 else f"{row.ours_ms:.1f}"
    return f"{ms} ms, {row.ratio:.2f}x"


def side_by_side(rows: list[Measured]) -> str:
    """A line for each pattern, length and peer, a column for each direction and dtype."""
    lines: dict[tuple[int, str, bool, str], dict[tuple[str, str], Measured]] = {}
    for row in rows:
        place = (row.seq_len, row.variant, row.causal, row.peer)
        lines.setdefault(place, {})[row.direction, row.dtype] = row
    heads = ("tokens", "pattern", "beside", *(f"{direction} {dtype}" for direction, dtype in COLUMNS))
    return table(
        heads,
        (
            (
                str(length),
                f"{variant}{', causal' if causal and 'window' not in variant and 'causal' not in variant else ''}",
                peer,
                *(timed(cells.get(column)) for column in COLUMNS),
            )
            for (length, variant, causal, peer), cells in sorted(lines.items())
        ),
    )


def by_processor(rows: list[Measured], show: Callable[[list[Measured]], str]) -> str:
    """A caption with processor and threads above each table."""
    parts = []
    for processor in processors(rows):
        own = [row for row in rows if row.processor == processor]
        for threads in sorted({row.threads for row in own}):
            shown = show([row for row in own if row.threads == threads])
            if shown:
                parts.append(f"**{processor}, {threads} thread{'s' if threads > 1 else ''}**\n\n{shown}")
    return "\n".join(parts)


def of_length(least: int, below: int | None) -> str:
    """Attention over sequences of at least `least` and below `below` tokens, beside what else computes it."""
    rows = [
        row
        for row in measured(*KERNELS)
        if row.seq_len >= least
        and (below is None or row.seq_len < below)
        and row.peer not in NOT_ATTENTION
        and ", row " not in row.variant  # readable rows, which nobody is served by
        and " rows h" not in row.variant  # the last few queries alone
        and (row.direction, row.dtype) in COLUMNS
    ]
    return by_processor(rows, side_by_side)


def calls() -> str:
    """What a call costs on tiny tensors: microseconds, from a thousand calls."""

    def show(rows: list[Measured]) -> str:
        return table(
            ("call on 16 tokens", "direction", "ours, us", "SDPA's own call, us"),
            ((row.variant, row.direction, f"{row.ours_ms:.0f}", f"{row.peer_ms:.0f}") for row in rows),
        )

    return by_processor(measured("host"), show)


def flags() -> str:
    """Presets with memory flags beside the same preset without, and what the documents before this project said."""

    def show(rows: list[Measured]) -> str:
        lines = []
        for row in rows:
            what, _, said = row.variant.partition(", seeds ")
            memory = f"{row.growth / row.peer_growth:.2f}x" if row.growth and row.peer_growth else "-"
            lines.append((what, row.dtype, row.direction, f"{row.ratio:.2f}x", said or "-", memory))
        heads = (
            "preset and flag",
            "dtype",
            "direction",
            "speed over no flag",
            "said before",
            "peak memory over no flag",
        )
        return table(heads, lines)

    return by_processor(measured("modules"), show)


def steps() -> str:
    """Decoding from a ring buffer beside caches that grow."""

    def show(rows: list[Measured]) -> str:
        lines = (
            (row.variant, str(row.seq_len), row.dtype, row.peer, f"{row.ours_ms:.2f} ms", f"{row.ratio:.2f}x")
            for row in rows
            if "step" in row.variant
        )
        return table(("steps, batch", "ring", "dtype", "beside", "ours", "the other takes"), lines)

    return by_processor(measured("decode"), show)


def planning() -> str:
    """What making a plan costs, beside having it in the cache."""

    def show(rows: list[Measured]) -> str:
        lines = (
            (row.variant, str(row.seq_len), f"{row.ours_ms:.2f} ms", row.peer, f"{row.peer_ms:.2f} ms") for row in rows
        )
        return table(("what", "tokens", "ours", "beside", "takes"), lines)

    return by_processor([row for row in measured("planning") if row.variant.startswith(("plan of", "forward"))], show)


def memory() -> str:
    """Longest sequence of one attention call, computed from measured growth: 8 heads of 64, dilated 2048/4096/8192."""
    grown: dict[tuple[str, str], list[float]] = {}
    for row in measured("native", "growth"):
        if row.growth is not None and row.variant.startswith("dilated 2048/1+4096/2+8192/4 h"):
            grown.setdefault((row.direction, row.dtype), []).append(row.growth)
    worst = {column: max(values) for column, values in grown.items()}
    lines = []
    for gib in (8, 16, 24, 80):
        cells = [f"{gib} GiB"]
        for direction, dtype in COLUMNS:
            token = 3 * 8 * 64 * (4 if dtype == "float32" else 2) * (1 + worst[direction, dtype])
            cells.append(f"{gib * 2**30 / token / 1000:,.0f} thousand")
        lines.append(tuple(cells))
    used = ", ".join(f"{direction} {dtype} {worst[direction, dtype]:.2f}" for direction, dtype in COLUMNS)
    heads = ("memory", *(f"{direction} {dtype}" for direction, dtype in COLUMNS))
    return f"{table(heads, lines)}\nGrowth used, the largest of all rows: {used}, in units of q + k + v.\n"


def rings() -> str:
    """Rings across processes: bytes, balance, time and memory."""
    by_machine: dict[str, list[Cells]] = {}
    for row in records("ring"):
        name = f"{row['cpu_model']}, {row['date']}"
        by_machine.setdefault(name, []).append((row["name"], row["setting"], row["ours"], row["unit"], row["beside"]))
    heads = ("what", "setting", "figure", "unit", "beside")
    return "\n".join(f"**{name}**\n\n{table(heads, lines)}" for name, lines in by_machine.items())


def missed() -> str:
    """Every row whose target was missed."""
    cases = (*KERNELS, "presets", "modules", "decode", "planning", "host", "buffers", "padded", "tiles", "cache")

    def show(rows: list[Measured]) -> str:
        return table(
            ("case", "what", "tokens", "dtype", "direction", "beside", "verdict"),
            (
                (row.case, row.variant, str(row.seq_len), row.dtype, row.direction, row.peer, row.verdict)
                for row in rows
                if row.verdict.startswith("missed")
            ),
        )

    return by_processor(measured(*cases), show)


def performance() -> str:
    """A section for each processor: plots and every comparison of attention."""
    rows = [row for row in measured(*KERNELS, "presets") if (row.direction, row.dtype) in COLUMNS]
    parts = []
    for processor in processors(rows):
        own = [row for row in rows if row.processor == processor]
        parts.append(f"## {processor}\n")
        for direction, file in figure_names(processor, own):
            alternative = f"Peer's time over ours, {direction}, {processor}"
            parts.append(f"![{alternative}](_figures/{file}.svg)\n")
        parts.append(by_processor(own, side_by_side))
    return "\n".join(parts)


def tolerances() -> str:
    """What each row of the dispatch table declares."""
    lines = []
    for name in backends():
        for dtype, (absolute, relative) in dispatch_table.row(name).capability.tolerance.items():
            lines.append((f"`{name}`", str(dtype).removeprefix("torch."), f"{absolute:g}", f"{relative:g}"))
    return table(("row", "dtype", "absolute", "relative"), lines)


def versions_run() -> str:
    """How the tests went on each Python, torch and numpy."""
    shown = [name for name in versions.COLUMNS if name != "commit"]
    return table(tuple(shown), (tuple(row[name] for name in shown) for row in versions.rows()))


def simulated() -> str:
    """Predicted over measured steps, for each processor."""
    by_machine: dict[str, list[Cells]] = {}
    for row in records("simulation"):
        cells = (row["setting"].partition(", forward")[0], row["beside"], f"{float(row['ours']):.2f}", row["verdict"])
        by_machine.setdefault(f"{row['cpu_model']}, {row['date']}", []).append(cells)
    heads = ("ring or other engine", "a forward and backward", "predicted over measured", "within 1.25x")
    return "\n".join(f"**{name}**\n\n{table(heads, lines)}" for name, lines in by_machine.items())


def planned() -> str:
    """The fastest engine of each pattern, length and device of the simulation."""
    best: dict[tuple[str, ...], dict[str, str]] = {}
    for row in records("simulation-planned"):
        place = (row["tokens"], row["devices"], row["device"], row["pattern"])
        if place not in best or float(row["seconds"]) < float(best[place]["seconds"]):
            best[place] = row
    names = ("engine", "seconds", "compute_seconds", "transfer_seconds", "gib_a_device", "received_gib")
    heads = (
        "tokens",
        "devices",
        "device",
        "pattern",
        "engine",
        "s",
        "computing, s",
        "travelling, s",
        "GiB a device",
        "GiB received",
    )
    return table(heads, ((*place, *(row[name] for name in names)) for place, row in best.items()))


TABLES: dict[str, Callable[[], str]] = {
    "1K to 4K": lambda: of_length(1024, 4097),
    "4K to 32K": lambda: of_length(4097, 32768),
    "32K to 128K": lambda: of_length(32768, 131072 + 1),
    "over 128K": lambda: of_length(131072 + 1, None),
    "calls": calls,
    "flags": flags,
    "steps": steps,
    "planning": planning,
    "memory": memory,
    "rings": rings,
    "simulated": simulated,
    "planned": planned,
    "missed": missed,
    "performance": performance,
    "tolerances": tolerances,
    "versions": versions_run,
    **quality.TABLES,
}
