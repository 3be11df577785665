"""From a plan to flat numbers: jobs of query rows that see the same keys, and the row sets of those keys.

Branches that share query rows become row classes: rows that the same tiles reach, over their keys once each with the log2 of how
often they count, in one softmax. Where that cannot be said in strides, branches run one after the other, in phases, and merge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from longattn.kernels.lowering.head_classes import head_classes
from longattn.kernels.lowering.write_order import WriteOrder
from longattn.kernels.native.progressions import (
    LONGEST_PERIOD,
    PeriodicRows,
    Progression,
    multiset,
    period_of,
    periodic,
    phases_at,
    pieces,
    residues,
    rows_of,
)
from longattn.patterncache import Branch, Plan, Span
from longattn.patterncache.indices import Affine, Index
from longattn.patterncache.plan import Band
from longattn.patterncache.spans import Rows

_MOST_TILES = 8192
"""Tiles of one head's branches up to which row classes are looked for: Python looks at each of them."""

_KEY = "native jobs"
_NO_BAND = Band()


@dataclass(frozen=True, slots=True)
class RowSet:
    """Rows, tile by tile, of one index form, where their positions are, and for keys who sees them."""

    index: Index | PeriodicRows
    at: tuple[int, int]
    band: Band = _NO_BAND


@dataclass(frozen=True, slots=True)
class Job:
    """Tiles of query rows, and the keys that tile t of them sees, for some heads.

    Attributes:
        fresh: no earlier phase wrote any of these rows.
    """

    heads: Span
    tiles: int
    queries: RowSet
    keys: tuple[RowSet, ...]
    fresh: bool = True


@dataclass(frozen=True)
class Lowered:
    """A plan in jobs.

    Attributes:
        phases: jobs that may run at the same time; one after the other.
        complete: every row of every head is written, and written before it is merged into.
        packed: what `structures` makes of a phase, by its number, and of all, by None; and by query heads to a kv head.
    """

    phases: tuple[tuple[Job, ...], ...]
    complete: bool
    packed: dict[tuple[int | None, int], object] = field(default_factory=dict)


def lower(plan: Plan) -> Lowered:
    """The plan in jobs. Kept with the plan.

    Raises:
        ValueError: rows lie outside the rectangle, or a query row stands in two tiles of a branch.
    """
    known: Lowered | None = plan.derived.get(_KEY)
    if known is None:
        for branch in plan.branches:
            _check(branch, plan.rectangle.shape)
        # Of two threads that lower at once, both use what the first one kept.
        lowered: Lowered = plan.derived.setdefault(_KEY, _in_phases(plan, list(_jobs(plan))))
        return lowered
    return known


def _check(branch: Branch, shape: tuple[int, int, int]) -> None:
    ends = [("heads", 0, -1)]
    if branch.heads.length:
        ends = [("heads", branch.heads.start, branch.heads.last)]
    ends += [(name, *_extent(index)) for name, index in (("queries", branch.q), ("keys", branch.k))]
    for (name, low, high), length in zip(ends, shape, strict=True):
        if low < 0 or high >= length:
            raise ValueError(f"a plan's {name} must lie in 0 .. {length}, got rows {low} to {high}")
    if branch.q.tiles != branch.k.tiles or not branch.q.distinct:
        raise ValueError(
            "a plan's branch must have as many tiles of keys as of queries, and no query row in two tiles, got "
            f"{branch.q.tiles} tiles of queries, {branch.k.tiles} of keys"
        )


def _extent(index: Index) -> tuple[int, int]:
    if not index.tiles or not index.count:
        return 0, -1
    if isinstance(index, Affine):
        ends = [
            index.start + t * index.tile_step + i * index.step
            for t in (0, index.tiles - 1)
            for i in (0, index.count - 1)
        ]
        return min(ends), max(ends)
    run = (index.run - 1) * index.step
    return int(index.starts.min()) + min(run, 0), int(index.starts.max()) + max(run, 0)


def _jobs(plan: Plan) -> Iterator[list[Job]]:
    """Lists of jobs in the order in which they must run; the jobs of a list share no row."""
    for heads, branches in _head_classes(plan):
        for at in dict.fromkeys(b.q_at for b in branches):
            some = [b for b in branches if b.q_at == at]
            classes = _row_classes(heads, some) if len(some) > 1 else None
            if classes is not None:
                yield classes
                continue
            for branch in some:
                yield [_whole(heads, branch)]


def _head_classes(plan: Plan) -> Iterator[tuple[Span, list[Branch]]]:
    """Heads that the same branches serve, as evenly spaced spans."""
    for alike in head_classes(plan.rectangle.shape[0], plan.branches):
        heads, branches = alike.owners, [branch for _, branch in alike.branches]
        steps = np.diff(heads)
        if len(steps) and (steps != steps[0]).any():
            yield from ((Span(head, 1), branches) for head in heads)
        else:
            yield Span(heads[0], len(heads), int(steps[0]) if len(steps) else 1), branches


def _whole(heads: Span, branch: Branch) -> Job:
    band = branch.band or _NO_BAND
    return Job(heads, branch.q.tiles, RowSet(branch.q, branch.q_at), (RowSet(branch.k, branch.k_at, band),))


def _row_classes(heads: Span, branches: Sequence[Branch]) -> list[Job] | None:
    """One job for the query rows that the same tiles reach; None where lists or periods stand in the way."""
    if sum(b.q.tiles for b in branches) > _MOST_TILES:
        return None
    tiles: list[tuple[Branch, Progression, Progression]] = []
    for branch in branches:
        if not isinstance(branch.q, Affine) or not isinstance(branch.k, Affine):
            return None
        tiles += [(branch, _tile(branch.q, t), _tile(branch.k, t)) for t in range(branch.q.tiles)]
    if (
        max(period_of([_tile(i, 0) for i in side]) for side in zip(*((b.q, b.k) for b in branches), strict=True))
        > LONGEST_PERIOD
    ):
        return None
    return list(_classes(heads, tiles))


def _tile(index: Index, t: int) -> Progression:
    assert isinstance(index, Affine)
    # A single row takes any step.
    return Progression(index.start + t * index.tile_step, index.step if index.count > 1 else 1, index.count)


def _classes(heads: Span, tiles: list[tuple[Branch, Progression, Progression]]) -> Iterator[Job]:
    queries = [q for _, q, _ in tiles]
    for begin, end, active in pieces(queries):
        there = [queries[i] for i in active]
        for members, offsets in residues(phases_at(begin, there)):
            rows = periodic(begin, end, period_of(there), offsets, (1,) * len(offsets))
            if rows is not None:
                reached = [tiles[active[m]] for m in members]
                yield Job(heads, 1, RowSet(rows, reached[0][0].q_at), tuple(_keys(reached)))


def _keys(reached: list[tuple[Branch, Progression, Progression]]) -> Iterator[RowSet]:
    """The keys of some tiles, each once; what differs in band or in where it stands is kept apart."""
    groups: dict[tuple[tuple[int, int], Band], list[Progression]] = {}
    bands = list(dict.fromkeys(branch.band for branch, _, _ in reached if branch.band is not None))
    for branch, q, k in reached:
        band = branch.band or _NO_BAND
        if branch.band is None and len(bands) == 1 and _covers(bands[0], branch, q, k):
            band = bands[0]  # says the same of this tile, and lets it share keys with the others
        groups.setdefault((branch.k_at, band), []).append(k)
    for (at, band), progressions in groups.items():
        yield from (RowSet(piece, at, band) for piece in multiset(progressions))


def _covers(band: Band, branch: Branch, q: Progression, k: Progression) -> bool:
    (i0, i1), (j0, j1) = (
        (at[0] + at[1] * p.start, at[0] + at[1] * p.last) for at, p in ((branch.q_at, q), (branch.k_at, k))
    )
    return band.covers(i0 - j1, i1 - j0)


def _in_phases(plan: Plan, ordered: list[list[Job]]) -> Lowered:
    """Each list of jobs in the first phase after those that wrote any of its rows."""
    order = WriteOrder(plan, len(ordered))
    phases: list[list[Job]] = []
    for jobs in ordered:
        marks = [(job, _written(job)) for job in jobs]
        # A job alone may run as soon as its own rows let it, which `write` finds out by itself.
        phase = None if len(jobs) == 1 else max((order.phase(at) for _, at in marks), default=0)
        before = [order.write(at, phase) for _, at in marks]
        phase = before[0] if phase is None else phase
        phases += [[] for _ in range(phase + 1 - len(phases))]
        phases[phase] += [
            replace(job, fresh=False) if first else job for (job, _), first in zip(marks, before, strict=True)
        ]
    return Lowered(tuple(map(tuple, phases)), order.complete)


def _written(job: Job) -> tuple[slice, slice | Rows]:
    """Where (heads, query rows) of a job are: slices where one says it, for packed documents make hundreds of jobs."""
    index, heads = job.queries.index, job.heads
    at = slice(heads.start, heads.start + heads.length * heads.step, heads.step)
    if isinstance(index, Affine) and index.tiles == 1 and index.step > 0:
        return at, slice(index.start, index.start + index.count * index.step, index.step)
    if isinstance(index, PeriodicRows) and len(index.offsets) == 1:
        first = index.start + index.offsets[0]
        return at, slice(first, first + index.count * index.period, index.period)
    return at, query_rows(job)


def query_rows(job: Job) -> Rows:
    """(rows,) int64 of all tiles."""
    index = job.queries.index
    return rows_of(index) if isinstance(index, PeriodicRows) else index.rows().reshape(-1)
