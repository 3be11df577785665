"""`pair_counts`: a plan as a function of tensors, `count(h, q, k)`, for code that asks about single pairs (FlexAttention's mods)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from math import gcd
from typing import Any

import numpy as np

from longattn.patterncache.indices import Affine, Index
from longattn.patterncache.plan import Band, Branch, Plan
from longattn.patterncache.planning.block_runs import runs_of
from longattn.patterncache.spans import Rows, Span

MOST_CELLS = 1 << 26
"""Cells of the table of a branch that lists its rows: one byte or two each."""

Count = Callable[[Any, Any, Any], Any]


def pair_counts(plan: Plan, device: Any) -> Count:
    """count(h, q, k) -> int64: how many times query row q of head row h sees key row k; elementwise over broadcast integer tensors.

    Strided branches are integer arithmetic. Branches that list are a table of units: the longest runs of rows that they never cut,
    which for block masks are the blocks.

    Raises:
        ValueError: such a table would have more than 2 ** 26 cells.
    """
    terms = [_strided(branch) for branch in plan.branches if _arithmetic(branch)]
    listed: dict[tuple[Span, Band | None], list[Branch]] = {}
    for branch in plan.branches:
        if not _arithmetic(branch):
            listed.setdefault((branch.heads, branch.band), []).append(branch)
    terms += [_tabled(some, plan, device) for some in listed.values()]

    def count(h: Any, q: Any, k: Any) -> Any:
        # Zero of the right shape, so that a plan without branches answers too.
        total = (h + q + k) * 0
        for term in terms:
            total = total + term(h, q, k)
        return total

    return count


def _arithmetic(branch: Branch) -> bool:
    return isinstance(branch.q, Affine) and isinstance(branch.k, Affine) and (branch.q.tiles == 1 or branch.q.distinct)


def _member(row: Any, index: Affine, tile: Any) -> Any:
    """Whether `row` is in tile `tile` of an affine index."""
    ahead = row - index.start - tile * index.tile_step
    return (ahead >= 0) & (ahead % index.step == 0) & (ahead < index.count * index.step)


def _inside(h: Any, heads: Span) -> Any:
    ahead = h - heads.start
    return (ahead >= 0) & (ahead % heads.step == 0) & (ahead < heads.length * heads.step)


def _seen(band: Band | None, branch: Branch, q: Any, k: Any) -> Any:
    """Whether the band shows rows q and k."""
    if band is None:
        return True
    (q_origin, q_step), (k_origin, k_step) = branch.q_at, branch.k_at
    distance = (q_origin + q_step * q) - (k_origin + k_step * k)
    shown = distance == distance
    if band.low is not None:
        shown = shown & (distance >= band.low)
    if band.high is not None:
        shown = shown & (distance <= band.high)
    return shown


def _strided(branch: Branch) -> Count:
    q_index, k_index = branch.q, branch.k
    assert isinstance(q_index, Affine) and isinstance(k_index, Affine)

    def count(h: Any, q: Any, k: Any) -> Any:
        ahead = q - q_index.start
        tile = ahead * 0
        if q_index.tiles > 1:
            # Tiles that follow one another, or that interleave within one step.
            apart = q_index.tile_step > (q_index.count - 1) * q_index.step
            tile = (ahead if apart else ahead % q_index.step) // q_index.tile_step
        there = (tile >= 0) & (tile < q_index.tiles)
        shown = _inside(h, branch.heads) & there & _member(q, q_index, tile) & _member(k, k_index, tile)
        return (shown & _seen(branch.band, branch, q, k)) * 1

    return count


def _tabled(branches: Sequence[Branch], plan: Plan, device: Any) -> Count:
    """Branches of one band and the same heads, as one table of units."""
    torch = import_module("torch")
    _, queries, keys = plan.rectangle.shape
    q_unit = _unit([branch.q for branch in branches], queries)
    k_unit = _unit([branch.k for branch in branches], keys)
    shape = -(-queries // q_unit), -(-keys // k_unit)
    if shape[0] * shape[1] > MOST_CELLS:
        raise ValueError(
            f"pattern must list at most {MOST_CELLS} pairs of units, got {shape} units of {q_unit} queries and {k_unit} keys"
        )
    table = np.zeros(shape, np.int16)
    for branch in branches:
        q, k = _units(branch.q, q_unit), _units(branch.k, k_unit)
        np.add.at(table, (q[:, :, None], k[:, None, :]), 1)
    cells, one = torch.from_numpy(table).to(device), branches[0]

    def count(h: Any, q: Any, k: Any) -> Any:
        shown = _inside(h, one.heads) & _seen(one.band, one, q, k)
        return cells[q // q_unit, k // k_unit].to(q.dtype) * shown

    return count


def _unit(indices: Sequence[Index], length: int) -> int:
    """The longest run of rows, counted from 0, that no index cuts."""
    unit = 0
    for index in indices:
        runs = runs_of(index, (0, 1))
        if index.step != 1 and index.count > 1:
            return 1
        ends = runs.row + runs.count
        # The last unit may be short.
        for border in (runs.row, ends[ends < length]):
            unit = gcd(unit, int(np.gcd.reduce(border))) if len(border) else unit
    return unit or length


def _units(index: Index, unit: int) -> Rows:
    """(tiles, units) int64: the units of each tile, in which it has whole units only."""
    return index.rows()[:, ::unit] // unit if unit > 1 else index.rows()
