"""The README's picture, as an SVG in plain text: `python -m tools.pages.picture` writes docs/picture.svg.

It is written by hand and not by matplotlib, so that it is the same in every byte wherever it is drawn; a test draws it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from longattn.patterncache import Dilated, Pattern

FILE = Path(__file__).resolve().parents[2] / "docs" / "picture.svg"
LENGTH = 64
_CELL, _GAP, _TOP = 5, 40, 28
_SHADES = {1: "#7fb3d0", 2: "#2f6f8f", 3: "#12303f"}

PANELS: tuple[tuple[str, Pattern], ...] = (
    ("Dilated((8, 16), (1, 2)): four islands", Dilated((8, 16), (1, 2), causal=True)),
    ("Dilated.for_length(64, layers=4): one", Dilated.for_length(LENGTH, layers=4)),
)


def cells(pattern: Pattern, left: int) -> Iterator[str]:
    """A rectangle for each run of equal counts in a row; what is not seen is left blank. Head 0."""
    for row, counts in enumerate(pattern.to_dense(LENGTH)[0].tolist()):
        column = 0
        for count, run in groupby(counts):
            width = len(list(run))
            if count:
                place = f'x="{left + column * _CELL}" y="{_TOP + row * _CELL}" width="{width * _CELL}" height="{_CELL}"'
                yield f'<rect {place} fill="{_SHADES[min(count, max(_SHADES))]}"/>'
            column += width


def picture() -> str:
    """The SVG's text."""
    side = LENGTH * _CELL
    width, height = len(PANELS) * side + (len(PANELS) + 1) * _GAP, side + _TOP + 12
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for at, (title, pattern) in enumerate(PANELS):
        left = _GAP + at * (side + _GAP)
        lines.append(f'<text x="{left}" y="{_TOP - 10}" font-size="13" fill="#26303a">{title}</text>')
        lines.append(f'<rect x="{left}" y="{_TOP}" width="{side}" height="{side}" fill="#f4f5f7" stroke="#c9ced6"/>')
        lines.extend(cells(pattern, left))
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    FILE.write_text(picture(), encoding="utf-8")
