"""`Ring`: queries stay, keys and values travel. Each rank holds one shard of the sequence; k and v go round.

Life of one pass, for each rank: 1. its queries are a shard; 2. its own keys arrive, then those of its neighbours, one shard a step,
against the direction of travel; 3. states merge; 4. `join` puts the rows back into the caller's order. Without a process group all
ranks are played in this process, one after the other, by the same schedule.

Ring attention: Liu et al. 2023, arXiv:2310.01889; striped: Brandon et al. 2023, arXiv:2311.09431; zigzag: zhuzilin's ring-flash-attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from longattn.attention.schedule import Shard, Spans, Step
from longattn.attention.validate import check_size
from longattn.kernels import AttentionState
from longattn.kernels.check import check_qkv
from longattn.patterncache import Span


class Layout(Protocol):
    """Which rows of a sequence each rank holds: every row on exactly one rank."""

    def rows(self) -> tuple[Spans, ...]:
        """The row numbers of each rank, in the order in which its shard holds them."""
        ...

    def cut(self, x: Tensor) -> list[Tensor]:
        """The shards of x (batch, seq, ...), a tensor for each rank. Differentiable at the cost of one copy."""
        ...

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """The inverse of `cut`."""
        ...


@dataclass(frozen=True)
class Chunks:
    """Neighbouring rows stay together: equal chunks, sizes differing by at most one, and the numbers of those that a rank holds."""

    length: int
    held: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> list[int]:
        """Rows of each chunk: the first ones are the longer ones."""
        parts = sum(len(numbers) for numbers in self.held)
        return [self.length // parts + (n < self.length % parts) for n in range(parts)]

    def rows(self) -> tuple[Spans, ...]:
        """A span for each chunk; one for two that follow one another."""
        sizes = self.sizes
        starts = [sum(sizes[:n]) for n in range(len(sizes))]
        return tuple(_fused([Span(starts[n], sizes[n]) for n in numbers]) for numbers in self.held)

    def cut(self, x: Tensor) -> list[Tensor]:
        """Views; copies where a rank holds two chunks."""
        chunks = x.split(self.sizes, 1)
        return [_concatenated([chunks[n] for n in numbers]) for numbers in self.held]

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """Chunks in order."""
        sizes = self.sizes
        chunks: dict[int, Tensor] = {}
        for numbers, shard in zip(self.held, shards, strict=True):
            chunks.update(zip(numbers, shard.split([sizes[n] for n in numbers], 1), strict=True))
        return _concatenated([chunks[n] for n in range(len(sizes))])


@dataclass(frozen=True)
class Stripes:
    """Rank r holds rows r, r + size, r + 2 * size, ..."""

    length: int
    size: int

    def _shares(self) -> tuple[int, int]:
        """Rows that every rank holds, and how many ranks hold one more. torch.compile does not trace divmod."""
        return self.length // self.size, self.length % self.size

    def rows(self) -> tuple[Spans, ...]:
        """One span with step `size` for each rank."""
        whole, rest = self._shares()
        counts = [whole + (rank < rest) for rank in range(self.size)]
        return tuple((Span(rank if n else 0, n, self.size),) for rank, n in enumerate(counts))

    def cut(self, x: Tensor) -> list[Tensor]:
        """Views; copies for the ranks that hold a row more."""
        whole, rest = self._shares()
        # One split and one unbind: n slices would each write a gradient as long as x.
        body, tail = x.split([self.length - rest, rest], 1)
        stripes = body.unflatten(1, (whole, self.size)).unbind(2)
        extra = [(row,) for row in tail.split(1, 1)] if rest else []
        extra += [()] * (self.size - rest)
        return [_concatenated([stripe, *more]) for stripe, more in zip(stripes, extra, strict=True)]

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """Row by row, round the ranks."""
        whole, rest = self._shares()
        body = torch.stack([shard[:, :whole] for shard in shards], 2).flatten(1, 2)
        return _concatenated([body, *(shard[:, whole:] for shard in shards[:rest])])


def _contiguous(length: int, size: int) -> Layout:
    return Chunks(length, tuple((rank,) for rank in range(size)))


def _zigzag(length: int, size: int) -> Layout:
    return Chunks(length, tuple((rank, 2 * size - 1 - rank) for rank in range(size)))


LAYOUTS = {"contiguous": _contiguous, "zigzag": _zigzag, "striped": Stripes}
"""How each layout is made from (length, ranks)."""


@dataclass(frozen=True, init=False)
class Ring:
    """A ring of `size` ranks, played in this process. Gives what `Local` gives: out, lse and gradients, at any length and size.

    | layout | rank r of n holds |
    | --- | --- |
    | contiguous | the r-th of n neighbouring shards |
    | zigzag | chunks r and 2n - 1 - r of 2n: equal work for all ranks when causal |
    | striped | positions r, r + n, r + 2n, ...: equal work when causal, at any length |

    Shards differ by at most one row; where there are more ranks than rows, some hold none. Where Nq != Nk, queries and keys are
    each cut by the same layout.

    Args:
        group: process groups are not supported by this version; None.
        size: number of ranks, >= 1.
        layout: "contiguous" (default), "zigzag" or "striped".

    Raises:
        TypeError, ValueError: a bad argument, by name.

    Example:
        >>> x = torch.randn(1, 10, 2, 16)
        >>> pattern_attention(x, x, x, Dilated((4, 8), (1, 2)), schedule=Ring(size=4)).shape
        torch.Size([1, 10, 2, 16])
    """

    size: int
    layout: Literal["contiguous", "zigzag", "striped"]

    def __init__(
        self,
        group: None = None,
        size: int | None = None,
        layout: Literal["contiguous", "zigzag", "striped"] = "contiguous",
    ) -> None:
        if group is not None:
            raise ValueError(
                f"group must be None: this version plays the ring in one process, as Ring(size=n), "
                f"and supports no process groups, got {type(group).__name__}"
            )
        if not isinstance(layout, str):
            raise TypeError(f"layout must be one of {tuple(LAYOUTS)}, got {layout!r} ({type(layout).__name__})")
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {tuple(LAYOUTS)}, got {layout!r}")
        object.__setattr__(self, "size", check_size("size", size))
        object.__setattr__(self, "layout", layout)

    def shards(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans | None) -> Iterator[Shard]:
        """Each rank's queries, with the ranks' keys in the order in which they come round.

        Raises:
            TypeError, ValueError: q, k and v do not fit together, by name.
        """
        check_qkv(q, k, v)
        nq, nk = q.shape[1], k.shape[1]
        # Queries that outnumber keys without positions: the forward lets them pass only where positions do not matter.
        spans = (Span(max(nk - nq, 0), nq),) if spans is None else spans
        queries, keys = self.placed(nq), self.placed(nk)
        cut = zip(keys.cut(k), keys.cut(v), keys.rows(), strict=True)
        steps = [Step(key, value, rows, rows) for key, value, rows in cut]
        for rank, (shard, rows) in enumerate(zip(queries.cut(q), queries.rows(), strict=True)):
            arriving = (steps[(rank - distance) % self.size] for distance in range(self.size))
            yield Shard(shard, arriving, take(spans, rows), rows)

    def join(self, states: Sequence[AttentionState]) -> AttentionState:
        """The ranks' states in the caller's order of queries."""
        layout = self.placed(sum(state.lse.shape[1] for state in states))
        return AttentionState(layout.join([s.out for s in states]), layout.join([s.lse for s in states]))

    def placed(self, length: int) -> Layout:
        """Who holds which rows of a sequence of that length."""
        return LAYOUTS[self.layout](length, self.size)


def take(spans: Spans, rows: Spans) -> Spans:
    """The positions of some rows of a tensor whose rows stand at `spans`."""
    found: list[Span] = []
    for part in rows:
        begin = 0
        for span in spans:
            end = begin + span.length
            # Members first .. last of `part` are rows of this span.
            first = max(-((part.start - begin) // part.step), 0)
            last = min((end - 1 - part.start) // part.step, part.length - 1)
            if first <= last:
                row = part.start + first * part.step
                found.append(span.take(row - begin, last - first + 1, part.step))
            begin = end
    return _fused(found)


def _fused(spans: list[Span]) -> Spans:
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
