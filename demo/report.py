"""What the demo prints: progress on standard error, results on standard output."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from demo.options import LAYERS, Options

NAMES = {
    "ours": "longattn",
    "joined": "longattn, joined",
    "baseline": "gather-scatter",
    "dense": "dense SDPA",
}
_MIB = 1 << 20

Clock = Literal["wall", "cpu"]

_NOTES = (
    "Times are medians; memory is the peak above q, k, v and dO in a fresh process.",
    "Errors are the largest over the largest true value, on sampled rows, beside the",
    "float64 oracle. Dense attention runs once, forward only. gather-scatter is a",
    "torchscale-style pipeline: its merge weights carry no gradient, as there, so its",
    "dq and dk are not the gradients of its output.",
)


class Steps:
    """Numbered steps: a live bar on a terminal, a line per step elsewhere."""

    def __init__(self, total: int) -> None:
        self._console = Console(stderr=True)
        self._total = total
        self._done = 0
        self._progress: Progress | None = None
        self._task: Any = None

    @contextmanager
    def running(self) -> Iterator["Steps"]:
        """Show the bar while the block runs."""
        if not self._console.is_terminal:
            yield self
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            self._progress, self._task = progress, progress.add_task("", total=self._total)
            yield self

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """One step; it counts as done when the block ends."""
        if self._progress is None:
            self._console.print(
                f"[{self._done + 1}/{self._total}] {text}", markup=False, highlight=False, soft_wrap=True
            )
        else:
            self._progress.update(self._task, description=escape(text))
        yield
        self._done += 1
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done)


@dataclass(frozen=True)
class Result:
    """One path: its passes, each [forward] or [forward, backward] in milliseconds; memory and errors.

    `wall` is what a clock shows, `cpu` is summed over threads; `growth` is peak memory above the inputs, in bytes.
    """

    wall: list[list[float]]
    cpu: list[list[float]]
    growth: int | None
    errors: dict[str, float]

    @property
    def backward(self) -> bool:
        """Whether the path ran backward too."""
        return len(self.wall[0]) == 2

    def forward_ms(self, clock: Clock = "wall") -> float:
        """Median of forward."""
        return statistics.median(one[0] for one in self._passes(clock))

    def whole_ms(self, clock: Clock = "wall") -> float:
        """Median of all that a pass does."""
        return statistics.median(sum(one) for one in self._passes(clock))

    def _passes(self, clock: Clock) -> list[list[float]]:
        return self.wall if clock == "wall" else self.cpu


def gather(passes: list[dict[str, Any]], errors: dict[str, float]) -> Result:
    """A worker's answers as one result."""
    return Result([one["wall"] for one in passes], [one["cpu"] for one in passes], passes[0]["growth"], errors)


def show(options: Options, source: str, ready: dict[str, Any], results: dict[str, Result], seconds: float) -> None:
    """Print everything: what ran, why, the table, the ratios, and the picture's place."""
    console = Console(highlight=False)
    branches = ", ".join(f"{s}/{r}" for s, r in zip(options.segments, options.rates, strict=True))
    console.print(
        f"[bold]Causal dilated attention[/bold], {options.seq_len} tokens of {escape(source)}", soft_wrap=True
    )
    console.print(
        f"segments/rates {branches}; {options.heads} heads of {options.head_dim}; {options.dtype} on {options.device}, "
        f"torch {ready['torch']}, {ready['threads']} threads",
        soft_wrap=True,
    )
    assert options.seq_len is not None, "the text decided the length"
    # Said as text: a line of figures that rich must not wrap or colour.
    console.print(options.pattern.lint(options.seq_len, options.heads).line, markup=False, soft_wrap=True)
    console.print(f"backend: [bold]{escape(str(ready['backend']))}[/bold], because", soft_wrap=True)
    for line in str(ready["explain"]).splitlines():
        console.print("  " + line, markup=False, soft_wrap=True)
    console.print(_table(options, results))
    for line in ratios(results):
        console.print(line, soft_wrap=True)
    console.print(f"joined: {_described(options)}", markup=False, soft_wrap=True)
    for line in _NOTES:
        console.print(line, soft_wrap=True)
    console.print(f"Picture: {escape(options.png)}   ({seconds:.0f} s in all)", soft_wrap=True)


def _described(options: Options) -> str:
    """What the joined pattern is, and what it joins."""
    assert options.seq_len is not None, "the text decided the length"
    reached = options.joined.reach(LAYERS, options.seq_len, options.heads)
    joins = "every token hears of all before it" if reached.complete else f"{reached}"
    return f"Dilated.for_length({options.seq_len}, layers={LAYERS}): in {LAYERS} layers {joins}"


def _table(options: Options, results: dict[str, Result]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("\npath", no_wrap=True)
    for heading in ("forward\nms", "fwd+bwd\nms", "peak\nMiB", "over\nq+k+v", "error\nout", "\ndq", "\ndk", "\ndv"):
        table.add_column(heading, justify="right")
    for path, result in results.items():
        growth = result.growth
        table.add_row(
            NAMES[path],
            _ms(result.forward_ms()),
            _ms(result.whole_ms()) if result.backward else "-",
            "-" if growth is None else f"{growth / _MIB:.0f}",
            "-" if growth is None else f"{growth / options.input_bytes:.2f}x",
            *(f"{result.errors[name]:.0e}" if name in result.errors else "-" for name in ("out", "dq", "dk", "dv")),
        )
    return table


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def ratios(results: dict[str, Result]) -> list[str]:
    """A line per peer: how many times our time (wall, and CPU in brackets) and our memory it takes."""
    ours = results["ours"]
    lines = []
    for path, peer in results.items():
        if path in ("ours", "joined"):
            continue
        wall, cpu = (peer.forward_ms(clock) / ours.forward_ms(clock) for clock in ("wall", "cpu"))
        parts = [f"forward {wall:.2f}x the time ({cpu:.2f}x CPU)"]
        if peer.backward:
            wall, cpu = (peer.whole_ms(clock) / ours.whole_ms(clock) for clock in ("wall", "cpu"))
            parts.append(f"forward + backward {wall:.2f}x ({cpu:.2f}x CPU)")
            if peer.growth is not None and ours.growth:
                parts.append(f"memory {peer.growth / ours.growth:.2f}x")
        lines.append(f"{NAMES[path]} over longattn: " + ", ".join(parts))
    return lines
