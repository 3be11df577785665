"""A branch cut by segments and residues: what one branch of `Dilated` shows of it, or hides, still in strides.

Runs are cut at borders of segments, then parted by residue modulo the rate; parts of equal steps and geometry make one branch. What is
not made of runs at all is listed instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

import numpy as np
import numpy.typing as npt

from longattn.patterncache.indices import Affine
from longattn.patterncache.plan import Band, Branch
from longattn.patterncache.planning.block_runs import Runs, cut_runs, made_of_runs, regroup, runs_of
from longattn.patterncache.planning.intervals import expand
from longattn.patterncache.planning.limits import add_pairs
from longattn.patterncache.planning.listing import listed_part
from longattn.patterncache.spans import Rows

_MOST_PHASES = 64
"""Residues beside the one that is looked for, up to which each has branches of its own; more of them share branches that list their tiles."""


@dataclass(frozen=True)
class Residue:
    """Pairs of one segment of `size` whose keys, and with `both` whose queries, equal `offset` modulo `rate` in it; j <= i if causal."""

    size: int
    rate: int
    offset: int
    both: bool
    causal: bool

    def shows(self, i: Rows, j: Rows) -> npt.NDArray[np.bool_]:
        """Elementwise."""
        shown = (i // self.size == j // self.size) & (j % self.size % self.rate == self.offset)
        if self.both:
            shown = shown & (i % self.size % self.rate == self.offset)
        return shown & (j <= i) if self.causal else shown


@dataclass(frozen=True)
class _Parts:
    """Runs that lie in one segment each, with the step of their rows."""

    runs: Runs
    segment: Rows
    step: int

    def some(self, chosen: npt.NDArray[np.bool_] | Rows) -> _Parts:
        runs = self.runs
        picked = Runs(runs.tile[chosen], runs.row[chosen], runs.position[chosen], runs.count[chosen])
        return _Parts(picked, self.segment[chosen], self.step)


def shown_by(branch: Branch, residue: Residue) -> Iterator[Branch]:
    """The pairs of `branch` that a residue shows."""
    band = _and(branch.band, Band(0, None) if residue.causal else Band())
    if not _countable(branch):
        return
    if not made_of_runs(branch, band):
        yield from listed_part(branch, residue.shows)
        return
    q, k = _sides(branch, residue.size)
    q = _matching(q, branch.q_at[1], residue) if residue.both else q
    yield from _within_segments(branch, q, _matching(k, branch.k_at[1], residue), band)


def hidden_by(branch: Branch, residue: Residue) -> Iterator[Branch]:
    """The pairs of `branch` that it hides: of two segments, of another residue, and, where causal, of the future."""
    if not _countable(branch):
        return
    if not made_of_runs(branch, branch.band):
        yield from listed_part(branch, lambda i, j: ~residue.shows(i, j))
        return
    q, k = _sides(branch, residue.size)
    yield from _across_segments(branch, q, residue.size)
    chosen = q
    if residue.both:
        chosen = _matching(q, branch.q_at[1], residue)
        for others in _others(q, branch.q_at[1], residue):
            yield from _within_segments(branch, others, k, branch.band)
    for others in _others(k, branch.k_at[1], residue):
        yield from _within_segments(branch, chosen, others, branch.band)
    if residue.causal:
        future = _and(branch.band, Band(None, -1))
        yield from _within_segments(branch, chosen, _matching(k, branch.k_at[1], residue), future)


def _and(band: Band | None, other: Band) -> Band | None:
    both = other if band is None else band & other
    return None if both == Band() else both


def _countable(branch: Branch) -> bool:
    return bool(branch.q.tiles and branch.q.count and branch.k.count)


def _sides(branch: Branch, size: int) -> tuple[_Parts, _Parts]:
    """Queries and keys cut at borders of segments."""
    q, k = (
        _Parts(*cut_runs(index, at, size), index.step)
        for index, at in ((branch.q, branch.q_at), (branch.k, branch.k_at))
    )
    return q, k


def _phases(parts: _Parts, position_step: int, residue: Residue) -> tuple[Rows, int]:
    """(the first member of each run that has the residue, or -1; how many members apart they are)."""
    apart = parts.step * position_step
    divisor = gcd(apart, residue.rate)
    every = residue.rate // divisor
    inverse = pow(apart // divisor, -1, every) if every > 1 else 0
    ahead = residue.offset - (parts.runs.position - parts.segment * residue.size)
    return np.where(ahead % divisor == 0, ahead // divisor * inverse % every, -1), every


def _taken(parts: _Parts, position_step: int, phase: Rows, every: int) -> _Parts:
    """Every `every`-th member of each run, from member `phase` on; runs without one are left out."""
    runs = parts.runs
    moved = Runs(
        runs.tile,
        runs.row + phase * parts.step,
        runs.position + phase * parts.step * position_step,
        (runs.count - phase + every - 1) // every,
    )
    return _Parts(moved, parts.segment, parts.step * every).some((phase >= 0) & (phase < runs.count))


def _matching(parts: _Parts, position_step: int, residue: Residue) -> _Parts:
    phase, every = _phases(parts, position_step, residue)
    return _taken(parts, position_step, phase, every)


def _others(parts: _Parts, position_step: int, residue: Residue) -> Iterator[_Parts]:
    """The members of other residues, each residue by itself where they are few."""
    phase, every = _phases(parts, position_step, residue)
    if every <= _MOST_PHASES:
        for ahead in range(every):
            # The same distance ahead of the residue in every run, so that runs of all segments are alike.
            at = np.where(phase < 0, ahead, (phase + ahead) % every)
            others = _taken(parts, position_step, np.where(at == phase, -1, at), every)
            if len(others.segment):
                yield others
        return
    owner, at = expand(np.minimum(parts.runs.count, every))
    yield _taken(parts.some(owner), position_step, np.where(at == phase[owner], -1, at), every)


def _within_segments(branch: Branch, q: _Parts, k: _Parts, band: Band | None) -> Iterator[Branch]:
    """Pairs of one tile and one segment."""
    if not len(q.segment) or not len(k.segment):
        return
    tiles = branch.q.tiles
    q_code, k_code = (side.segment * tiles + side.runs.tile for side in (q, k))
    order = np.argsort(k_code, kind="stable")
    first, end = (np.searchsorted(k_code[order], q_code, side=side) for side in ("left", "right"))
    owner, ahead = expand(end - first)
    if len(owner):
        add_pairs(len(owner))
        yield from _of_pairs(branch, q, k.runs, k.step, (owner, order[first[owner] + ahead]), band)


def _across_segments(branch: Branch, q: _Parts, size: int) -> Iterator[Branch]:
    """Pairs of one tile and two segments: of each query run the keys before its segment, and those behind."""
    whole = runs_of(branch.k, branch.k_at)
    apart = branch.k.step * branch.k_at[1]
    first = np.searchsorted(whole.tile, np.arange(branch.k.tiles + 1))
    owner, ahead = expand(np.diff(first)[q.runs.tile])
    add_pairs(len(owner))
    run = first[q.runs.tile[owner]] + ahead
    low = q.segment[owner] * size
    begin, count = whole.position[run], whole.count[run]
    before = np.clip(-((begin - low) // apart), 0, count)
    behind = np.clip(-((begin - low - size) // apart), 0, count)
    for skipped, number in ((np.zeros_like(before), before), (behind, count - behind)):
        some = np.flatnonzero(number)
        keys = Runs(
            whole.tile[run[some]],
            whole.row[run[some]] + skipped[some] * branch.k.step,
            begin[some] + skipped[some] * apart,
            number[some],
        )
        if len(some):
            pairs = owner[some], np.arange(len(some), dtype=np.int64)
            yield from _of_pairs(branch, q, keys, branch.k.step, pairs, branch.band)


def _of_pairs(
    branch: Branch, q: _Parts, k: Runs, k_step: int, pairs: tuple[Rows, Rows], band: Band | None
) -> Iterator[Branch]:
    # Only heads, steps and positions of the branch count here.
    template = replace(branch, q=Affine(0, 1, 0, 1, q.step), k=Affine(0, 1, 0, 1, k_step), band=None)
    yield from regroup(template, q.runs, k, pairs, band)
