"""`longattn show`: a pattern's map, its lint, what layers join, and a picture."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict

from longattn.attention.cli.patterns import pattern_of
from longattn.attention.cli.report import Report, Table
from longattn.patterncache.analysis.reduced import reduced_counts

CELLS = 48
"""Rows and columns of a map on the terminal."""

SHADES = " .:-=+*#%@"


def run(options: Namespace) -> Report:
    """The map of one head, and the sentences of `lint` and `reach`."""
    pattern = pattern_of(options)
    if options.head >= options.heads:
        raise ValueError(f"--head must be below --heads={options.heads}, got {options.head}")
    verdict = pattern.lint(options.length, options.heads, head_dim=options.head_dim, dtype=options.dtype)
    data = {"pattern": pattern.canonical(), "lint": asdict(verdict)}
    lint_text = str(verdict)
    parts: list[Table | str] = [pattern.canonical(), _map(pattern, options), lint_text]
    if options.layers is not None:
        reach = pattern.reach(options.layers, options.length, options.heads)
        data["reach"] = asdict(reach)
        parts.append(str(reach))
    if options.png is not None:
        pattern.describe(options.length, options.heads, options.head, png=options.png)
        data["png"] = options.png
        parts.append(f"picture: {options.png}")
    return Report(data, parts)


def _map(pattern: object, options: Namespace) -> str:
    """Rows see columns: the darker, the more of a cell's pairs are seen, or the more often."""
    mean = reduced_counts(pattern, options.length, options.heads, head=options.head, cells=CELLS)  # type: ignore[arg-type]
    most = mean.max() or 1.0
    # The square root keeps a sparse far region visible beside the diagonal.
    levels = ((mean / most) ** 0.5 * (len(SHADES) - 1)).round().astype(int)
    levels[(mean > 0) & (levels == 0)] = 1
    tile = max(1, options.length // len(mean))
    lines = ["".join(SHADES[level] * 2 for level in row).rstrip() for row in levels]
    return "\n".join(
        [
            f"head {options.head} of {options.heads}: rows are queries, columns keys, {tile} x {tile} tokens a cell",
            *lines,
        ]
    )
