"""Which rows of a sequence each rank holds.

| layout | rank r of n holds |
| --- | --- |
| contiguous | the r-th of n neighbouring shards |
| zigzag | chunks r and 2n - 1 - r of 2n: equal work for all ranks when causal (zhuzilin's ring-flash-attention) |
| striped | positions r, r + n, r + 2n, ...: equal work when causal, at any length (Brandon et al. 2023, arXiv:2311.09431) |

Rows are numbers of rows of a tensor; `take` says at which positions they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from longattn.patterncache import Span
from longattn.patterncache.spans import shortened

MOST_RANKS = 1024
"""Ranks of a group: the steps of each are looked at."""

MOST_LENGTH = 1 << 32
"""Tokens of a sequence whose rows are looked at: eight bytes each."""

Spans = tuple[Span, ...]
LayoutName = Literal["contiguous", "zigzag", "striped"]


class Layout(Protocol):
    """Every row on exactly one rank."""

    def rows(self) -> tuple[Spans, ...]:
        """The row numbers of each rank, in the order in which its shard holds them."""
        ...

    def cut(self, x: Tensor) -> list[Tensor]:
        """The shards of x (batch, seq, ...), a tensor for each rank; views where that is possible."""
        ...

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """The inverse of `cut`."""
        ...


@dataclass(frozen=True)
class Chunks:
    """Neighbouring rows stay together: the sizes of all chunks in order, and the numbers of those that each rank holds."""

    sizes: tuple[int, ...]
    held: tuple[tuple[int, ...], ...]

    def rows(self) -> tuple[Spans, ...]:
        """A span for each chunk; one for two that follow one another."""
        starts = [sum(self.sizes[:n]) for n in range(len(self.sizes))]
        return tuple(fuse([Span(starts[n], self.sizes[n]) for n in numbers]) for numbers in self.held)

    def cut(self, x: Tensor) -> list[Tensor]:
        """Views; copies where a rank holds two chunks."""
        chunks = torch.split(x, list(self.sizes), 1)
        return [_concatenated([chunks[n] for n in numbers]) for numbers in self.held]

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """Chunks in order."""
        chunks: dict[int, Tensor] = {}
        for numbers, shard in zip(self.held, shards, strict=True):
            chunks.update(zip(numbers, torch.split(shard, [self.sizes[n] for n in numbers], 1), strict=True))
        return _concatenated([chunks[n] for n in range(len(self.sizes))])


@dataclass(frozen=True)
class Stripes:
    """Rank r holds rows r, r + size, r + 2 * size, ..."""

    length: int
    size: int

    def rows(self) -> tuple[Spans, ...]:
        """One span with step `size` for each rank."""
        counts = _even(self.length, self.size)
        return tuple((Span(rank if n else 0, n, self.size),) for rank, n in enumerate(counts))

    def cut(self, x: Tensor) -> list[Tensor]:
        """Views."""
        return [x[:, rank :: self.size] for rank in range(self.size)]

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """Row by row, round the ranks."""
        first = shards[0]
        whole = first.new_empty((first.shape[0], self.length, *first.shape[2:]))
        for rank, shard in enumerate(shards):
            whole[:, rank :: self.size] = shard
        return whole


def _even(length: int, parts: int) -> tuple[int, ...]:
    """`length` in that many parts, which differ by one at most: the first ones are the longer ones."""
    return tuple(length // parts + (n < length % parts) for n in range(parts))


def contiguous(length: int, size: int) -> Layout:
    """Neighbouring shards."""
    return neighbours(_even(length, size))


def neighbours(lengths: Sequence[int]) -> Layout:
    """Neighbouring shards of any lengths."""
    return Chunks(tuple(lengths), tuple((rank,) for rank in range(len(lengths))))


def _zigzag(length: int, size: int) -> Layout:
    return Chunks(_even(length, 2 * size), tuple((rank, 2 * size - 1 - rank) for rank in range(size)))


LAYOUTS: dict[str, Callable[[int, int], Layout]] = {"contiguous": contiguous, "zigzag": _zigzag, "striped": Stripes}
"""How each layout is made from (length, ranks)."""


def check_layout(layout: object) -> str:
    """The name of a layout, or TypeError / ValueError that names the parameter."""
    if not isinstance(layout, str):
        raise TypeError(f"layout must be one of {tuple(LAYOUTS)}, got {shortened(layout)} ({type(layout).__name__})")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {tuple(LAYOUTS)}, got {shortened(layout)}")
    return layout


def count_rows(spans: Spans) -> int:
    """How many rows some spans have together."""
    return sum(span.length for span in spans)


def rows_by_rank(layout: Layout) -> list[int]:
    """How many rows each rank holds."""
    return [count_rows(rows) for rows in layout.rows()]


def flat(spans: Spans) -> list[int]:
    """(start, length, step) of each, one after the other, as the ops take them."""
    return [number for span in spans for number in span.numbers]


def take(spans: Spans, rows: Spans) -> Spans:
    """The positions of some rows of a tensor whose rows stand at `spans`."""
    positions: list[Span] = []
    for rows_span in rows:
        begin = 0
        for span in spans:
            end = begin + span.length
            # Members first .. last of `rows_span` are rows of this span.
            first = max(-((rows_span.start - begin) // rows_span.step), 0)
            last = min((end - 1 - rows_span.start) // rows_span.step, rows_span.length - 1)
            if first <= last:
                row = rows_span.start + first * rows_span.step
                positions.append(span.take(row - begin, last - first + 1, rows_span.step))
            begin = end
    return fuse(positions)


def select_rows(x: Tensor, axis: int, rows: Spans) -> Tensor:
    """Those rows of x along `axis`: a view where one span says which."""
    parts = [x[_index(x, axis, span)] for span in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def add_rows(total: Tensor, axis: int, rows: Spans, part: Tensor) -> None:
    """Add `part` to those rows of `total` along `axis`, in place: what `select_rows` took out."""
    parts = torch.split(part, [span.length for span in rows], axis)
    for span, piece in zip(rows, parts, strict=True):
        total[_index(total, axis, span)] += piece


def _index(x: Tensor, axis: int, span: Span) -> tuple[slice, ...]:
    index = [slice(None)] * x.dim()
    index[axis] = slice(span.start, span.start + span.length * span.step, span.step)
    return tuple(index)


def fuse(spans: Sequence[Span]) -> Spans:
    """The same positions in as few spans as neighbours allow, at least one: fewer spans are fewer branches."""
    fused: list[Span] = []
    for span in spans:
        if not span.length:
            continue
        if fused and fused[-1].step == span.step and fused[-1].last + span.step == span.start:
            span = Span(fused[-1].start, fused.pop().length + span.length, span.step)
        fused.append(span)
    return tuple(fused) or (Span(0, 0),)


def _concatenated(parts: Sequence[Tensor]) -> Tensor:
    """All parts along axis 1. A single part is itself, not a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
