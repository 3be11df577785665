"""Which branches of a plan one launch takes, for which heads, and the tables of each launch, kept with the plan on its device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longattn.kernels.triton.joblist import JobTables, job_tables
from longattn.kernels.triton.row_classes import gathered
from longattn.patterncache import Branch, Plan

Groups = list[tuple[list[int], list[tuple[int, Branch]]]]


@dataclass(frozen=True)
class Pass:
    """One launch over some branches of a plan.

    Attributes:
        branches: its branches. unique: whether a key met twice is streamed once, with a multiplicity.
        fresh: no row that it writes was written by an earlier pass.
    """

    branches: tuple[Branch, ...]
    unique: bool
    fresh: bool


@dataclass(frozen=True)
class Passes:
    """All launches of a plan, in order; `complete`: every row is written, and written before it is merged onto."""

    launches: tuple[Pass, ...]
    complete: bool


def query_passes(plan: Plan) -> Passes:
    """How queries own a plan: in one launch over row classes where that wastes nothing, else branch by branch.

    Without bands, classes meet unique keys. With bands and different steps, rows of a class lie so far apart that its diagonal tiles
    are mostly empty; there branches whose rows do not overlap share a launch, and later ones merge onto what is there.
    """
    found: Passes | None = plan.derived.get("triton passes")
    if found is None:
        banded = any(branch.band is not None for branch in plan.branches)
        alike = len({branch.q.step for branch in plan.branches}) <= 1
        together = not banded or alike or gathered(plan.branches)
        levels = [0] * len(plan.branches) if together else _levels(plan)
        found = plan.derived["triton passes"] = _in_levels(plan, levels, not banded and not gathered(plan.branches))
    return found


def _levels(plan: Plan) -> list[int]:
    """For each branch the number of the launch that takes it: after every earlier branch with which it shares a row."""
    next_level = np.zeros(plan.rectangle.shape[:2], np.int64)
    levels = []
    for branch in plan.branches:
        at = (branch.heads.positions()[:, None], branch.q.rows().reshape(1, -1))
        levels.append(int(next_level[at].max()))
        next_level[at] = levels[-1] + 1
    return levels


def _in_levels(plan: Plan, levels: Sequence[int], unique: bool) -> Passes:
    written = np.zeros(plan.rectangle.shape[:2], bool)
    launches, complete = [], True
    for level in range(max(levels, default=-1) + 1):
        branches = tuple(branch for branch, mine in zip(plan.branches, levels, strict=True) if mine == level)
        before = written.copy()
        for branch in branches:
            at = (branch.heads.positions()[:, None], branch.q.rows().reshape(1, -1))
            complete &= level == 0 or bool(before[at].all())
            written[at] = True
        launches.append(Pass(branches, unique and len(branches) > 1, level == 0))
    return Passes(tuple(launches), complete and bool(written.all()))


def head_groups(plan: Plan, branches: Sequence[Branch], members: int) -> Groups:
    """Owners of `members` neighbouring query heads each, those with the same branches together."""
    serves = np.zeros((plan.rectangle.shape[0], len(branches)), bool)
    for number, branch in enumerate(branches):
        serves[branch.heads.positions(), number] = True
    alike: dict[bytes, list[int]] = {}
    for owner in range(len(serves) // members):
        alike.setdefault(serves[owner * members : (owner + 1) * members].tobytes(), []).append(owner)
    groups: Groups = []
    for owners in alike.values():
        first = owners[0] * members
        own = [(m, branches[int(b)]) for m in range(members) for b in np.flatnonzero(serves[first + m])]
        if own:
            groups.append((owners, own))
    return groups


def packable(plan: Plan, members: int) -> bool:
    """Whether the heads that share a kv head are in the same branches, so that they can be rows of one tile."""
    groups = head_groups(plan, plan.branches, members)
    return all(
        len({tuple(id(b) for m, b in own if m == member) for member in range(members)}) == 1 for _, own in groups
    )


def key_groups(plan: Plan, members: int) -> Groups:
    """Owners of keys: kv heads, each with the branches of all its query heads."""
    return head_groups(plan, plan.branches, members)


@dataclass(frozen=True)
class DeviceTables:
    """`JobTables` on a device."""

    jobs: Tensor
    entries: Tensor
    weights: Tensor
    rows: Tensor
    listed: bool

    @property
    def count(self) -> int:
        """Jobs."""
        return self.jobs.shape[0]


def tables_on(
    plan: Plan, key: tuple[object, ...], device: torch.device, build: Callable[[], JobTables]
) -> DeviceTables:
    """The tables that `build` makes, copied to the device once and kept with the plan, so that later calls neither copy nor wait."""
    kept: dict[tuple[object, ...], DeviceTables] = plan.derived.setdefault("triton tables", {})
    found = kept.get((key, device))
    if found is None:
        tables = build()
        arrays = (tables.jobs, tables.entries, tables.weights, tables.rows)
        jobs, entries, weights, rows = (torch.from_numpy(x).to(device) for x in arrays)
        found = kept[key, device] = DeviceTables(jobs, entries, weights, rows, tables.listed)
    return found


def query_tables(plan: Plan, number: int, block: tuple[int, int], pack: int = 1, parts: int = 1) -> JobTables:
    """Tables of the `number`-th launch where queries own; packed, of the heads that share a kv head as one owner."""
    launch = query_passes(plan).launches[number]
    groups = head_groups(plan, launch.branches, pack)
    if pack > 1:
        groups = [(owners, [(m, b) for m, b in own if m == 0]) for owners, own in groups]
    listed, size = gathered(launch.branches), (max(1, block[0] // pack), block[1])
    return job_tables(groups, own_keys=False, unique=launch.unique, listed=listed, block=size, parts=parts)


def key_tables(plan: Plan, members: int, block: tuple[int, int]) -> JobTables:
    """Tables of the one launch where keys own."""
    listed = gathered(plan.branches)
    unique = not listed and all(branch.band is None for branch in plan.branches)
    return job_tables(key_groups(plan, members), own_keys=True, unique=unique, listed=listed, block=block)
