"""`TilingProcessor`: in which order, and in what pieces, a call with several queries meets its keys.

Two levels. A block of `block_size` rows meets at once all keys that each of its rows sees: a run of DENSE tiles, without a mask. What is
left at the edges of the window is met by tiles of `tile_size` rows, whose runs end in a TRIANGLE. SKIP tiles beyond an edge are neither
read nor computed. Rows are queries when Q-major, keys when K-major. The work itself is done by a row of longattn.kernels, and the states
merge. Small tiles go to it together, `least_rows` at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from longattn.attention.ring_buffer.config import RingBufferConfig, TileOrder, TileType
from longattn.attention.ring_buffer.parts import Part
from longattn.attention.validate import check_size, check_type
from longattn.kernels import AttentionState
from longattn.kernels.interface import add_sink, merge_into

Range = tuple[int, int]
"""First and count."""


class TileWork(NamedTuple):
    """A rectangle for one call of a row.

    Attributes:
        queries: rows of the call's q. part: which keys, `keys` of them. heads, kv_heads: of q, and of k and v.
        dense: every pair is seen.
    """

    queries: Range
    part: Part
    keys: Range
    heads: Range
    kv_heads: Range
    dense: bool


Attend = Callable[[TileWork], AttentionState]


@dataclass(frozen=True)
class Slope:
    """Row x of an outer axis sees the inner range [x + low, x + high), within 0 .. count; None is no bound."""

    low: int | None
    high: int | None
    count: int

    def seen_by_some(self, first: int, last: int) -> Range:
        """[start, stop) that some row of first .. last sees."""
        return self._start(first), max(self._start(first), self._stop(last - 1))

    def seen_by_all(self, first: int, last: int) -> Range:
        """[start, stop) that every row of first .. last sees."""
        start = self._start(last - 1)
        return start, max(start, self._stop(first))

    def _start(self, x: int) -> int:
        return 0 if self.low is None else min(self.count, max(0, x + self.low))

    def _stop(self, x: int) -> int:
        return self.count if self.high is None else min(self.count, max(0, x + self.high))


def slope(position: int, part: Part, q_major: bool, count: int) -> Slope:
    """What rows of queries from `position` see of a part (Q-major), or what rows of it see of `count` queries."""
    band, ahead = part.band, position - part.start
    if q_major:
        low = None if band.high is None else ahead - band.high
        return Slope(low, None if band.low is None else ahead - band.low + 1, part.length)
    low = None if band.low is None else band.low - ahead
    return Slope(low, None if band.high is None else band.high - ahead + 1, count)


class TilingProcessor:
    """The scheduler of a `RingBufferAttention`. Its settings may be changed at any time; results do not depend on them.

    Attributes:
        tile_order, tile_size, block_size, head_tile_size, prefill_size: as in `RingBufferConfig`.
        least_rows: rows that one call of a kernel has at least, where there are so many. Default 128: fewer cost more in calls than
            they save.
        counts: tiles of each type in the last call with several queries and without gradients: tile_size x tile_size, for each
            group of heads.
    """

    def __init__(self, config: RingBufferConfig) -> None:
        self.tile_size, self.block_size = config.tile_size, config.block_size
        self.head_tile_size, self.prefill_size = config.head_tile_size, config.prefill_size
        self.least_rows = 128
        self._order = TileOrder.Q_MAJOR
        self.counts = dict.fromkeys(TileType, 0)

    @property
    def tile_order(self) -> TileOrder:
        """Which tile stays. Default TileOrder.Q_MAJOR.

        Raises:
            TypeError: set to something else than a TileOrder.
        """
        return self._order

    @tile_order.setter
    def tile_order(self, order: TileOrder) -> None:
        self._order = check_type("tile_order", order, TileOrder, "a TileOrder")

    def run(
        self,
        q: Tensor,
        position: int,
        parts: Sequence[Part],
        attend: Attend,
        sink_logits: Tensor | None = None,
        value_dim: int | None = None,
    ) -> Tensor:
        """Attend with queries from `position` to parts, in passes, each rounded once.

        Args:
            q: (batch, n, heads, head_dim). attend: does one rectangle. sink_logits: (heads,), a learned sink, or None.
            value_dim: head_dim of v. Default: q's.

        Returns:
            out (batch, n, heads, value_dim) in q's dtype.
        """
        for name in ("tile_size", "block_size", "head_tile_size", "prefill_size", "least_rows"):
            check_size(name, getattr(self, name))
        out = q.new_empty((*q.shape[:3], q.shape[3] if value_dim is None else value_dim))
        counts = dict.fromkeys(TileType, 0)
        for first in range(0, q.shape[1], self.prefill_size):
            count = min(self.prefill_size, q.shape[1] - first)
            # Partial states stand for one pass at a time.
            state = AttentionState.empty(out[:, first : first + count])
            for work in self.schedule((first, count), q.shape[2], position, parts, counts):
                rows, heads = (work.queries[0] - first, work.queries[1]), work.heads
                partial = attend(work)
                out_rows, lse_rows = (x.narrow(1, *rows).narrow(2, *heads) for x in (state.out, state.lse))
                merge_into(out_rows, lse_rows, partial.out, partial.lse)
            if sink_logits is not None:
                state = add_sink(state, sink_logits)
            out[:, first : first + count] = state.out
        self.counts = counts
        return out

    def schedule(
        self, rows: Range, heads: int, position: int, parts: Sequence[Part], counts: dict[TileType, int]
    ) -> Iterator[TileWork]:
        """The work of one pass over the queries `rows`, in order; adds its tiles to `counts`."""
        for q_heads, kv_heads in _head_tiles(heads, parts, self.head_tile_size):
            for part in parts:
                # Keys that no query of this pass sees are out before tiles are looked at.
                start, stop = slope(position + rows[0], part, True, rows[1]).seen_by_some(0, rows[1])
                visible = part._replace(
                    k=part.k[:, start:stop],
                    v=part.v[:, start:stop],
                    start=part.start + start,
                    column=part.column + start,
                )
                self._count(rows[1], position + rows[0], part, counts)
                if visible.length:
                    yield from self._blocks(rows, position, visible, q_heads, kv_heads)

    def _blocks(self, rows: Range, position: int, part: Part, heads: Range, kv_heads: Range) -> Iterator[TileWork]:
        q_major = self._order is TileOrder.Q_MAJOR
        visible = slope(position + rows[0], part, q_major, rows[1])
        outer = rows[1] if q_major else part.length

        def work(outer_range: Range, inner_range: Range, dense: bool) -> TileWork:
            queries, keys = (outer_range, inner_range) if q_major else (inner_range, outer_range)
            return TileWork((rows[0] + queries[0], queries[1]), part, keys, heads, kv_heads, dense)

        size, block = max(self.tile_size, self.least_rows), max(self.block_size, self.least_rows)
        for first in range(0, outer, block):
            last = min(first + block, outer)
            start, stop = visible.seen_by_all(first, last)
            if start < stop:
                yield work((first, last - first), (start, stop - start), True)
            for tile in range(first, last, size):
                end = min(tile + size, last)
                begin, finish = visible.seen_by_some(tile, end)
                edges = (
                    ((begin, min(start, finish)), (max(stop, begin), finish)) if start < stop else ((begin, finish),)
                )
                for low, high in edges:
                    if low < high:
                        yield work((tile, end - tile), (low, high - low), False)

    def _count(self, queries: int, position: int, part: Part, counts: dict[TileType, int]) -> None:
        size, visible = self.tile_size, slope(position, part, True, queries)
        across = -(-part.length // size)
        for first in range(0, queries, size):
            last = min(first + size, queries)
            start, stop = visible.seen_by_some(first, last)
            touched = -(-stop // size) - start // size if start < stop else 0
            start, stop = visible.seen_by_all(first, last)
            # The last tile is dense when all that there is of it is seen.
            dense = max(0, (across if stop == part.length else stop // size) - -(-start // size)) if start < stop else 0
            counts[TileType.DENSE] += dense
            counts[TileType.TRIANGLE] += touched - dense
            counts[TileType.SKIP] += across - touched


def _head_tiles(heads: int, parts: Sequence[Part], limit: int) -> Iterator[tuple[Range, Range]]:
    """(heads, kv_heads) of each group: at most `limit` query heads, but whole kv heads where they are shared by fewer."""
    group = heads // parts[0].k.shape[2] if parts else 1
    if limit < group:
        for kv in range(heads // group):
            for first in range(0, group, limit):
                yield (kv * group + first, min(limit, group - first)), (kv, 1)
        return
    step = limit // group
    for kv in range(0, heads // group, step):
        count = min(step, heads // group - kv)
        yield (kv * group, count * group), (kv, count)
