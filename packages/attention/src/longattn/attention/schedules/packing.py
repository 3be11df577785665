"""`Packing`: which of one rank's keys another rank's queries see, and how these travel.

Exactly the (key row, kv head) pairs that some query sees travel; the plan says which. Packed rows stand head by head within a
row, in one contiguous tensor; where everything is seen, the tensor itself travels and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longattn.patterncache import Branch, Plan

Lease = Callable[[tuple[int, ...]], Tensor]
"""A contiguous tensor of that shape, unwritten."""


@dataclass(frozen=True, eq=False)
class Packing:
    """Which pairs of `rows` x `heads` travel.

    Attributes:
        rows, heads: of the tensor (batch, rows, heads, head_dim) that they are taken from.
        pairs: row * heads + head of each, ascending, int64; None: all.
        count: how many.
    """

    rows: int
    heads: int
    pairs: Tensor | None
    count: int

    def shape(self, batch: int, head_dim: int) -> tuple[int, int, int]:
        """(batch, count, head_dim) of the packed tensor."""
        return batch, self.count, head_dim

    def pack(self, x: Tensor, lease: Lease) -> Tensor:
        """The pairs of x (batch, rows, heads, head_dim), contiguous, in leased memory; x itself where that is all of it."""
        flat: Tensor = x.contiguous().flatten(1, 2)
        if self.pairs is None:
            return flat
        return torch.index_select(flat, 1, self.pairs.to(x.device), out=lease(self.shape(len(x), x.shape[-1])))

    def unpack(self, packed: Tensor, lease: Lease) -> Tensor:
        """(batch, rows, heads, head_dim): what was packed, at its place, and zero elsewhere: a kernel may read keys that no query sees."""
        if self.pairs is None:
            return torch.unflatten(packed, 1, (self.rows, self.heads))
        into = lease((len(packed), self.rows, self.heads, packed.shape[-1]))
        into.zero_().flatten(1, 2).index_copy_(1, self.pairs.to(packed.device), packed)
        return into

    def add(self, total: Tensor, packed: Tensor) -> None:
        """Add packed rows to `total` (batch, rows, heads, head_dim), contiguous, in place."""
        flat = total.flatten(1, 2)
        if self.pairs is None:
            flat += packed
        else:
            flat.index_add_(1, self.pairs.to(total.device), packed)


def packing_of(plan: Plan, kv_heads: int) -> Packing:
    """What of the plan's key rows its queries see, for keys of that many heads. Kept with the plan."""
    key = f"packing for {kv_heads} kv heads"
    packing: Packing | None = plan.derived.get(key)
    if packing is None:
        visible = visible_key_rows(plan, kv_heads)
        pairs = None if visible.all() else torch.as_tensor(np.flatnonzero(visible), device="cpu")
        packing = plan.derived[key] = Packing(visible.shape[0], visible.shape[1], pairs, int(visible.sum()))
    return packing


def visible_key_rows(plan: Plan, kv_heads: int) -> npt.NDArray[np.bool_]:
    """(key rows, kv heads) bool: whether some query of some head of the group sees it."""
    heads, _, rows = plan.rectangle.shape
    visible = np.zeros((rows, kv_heads), bool)
    for branch in plan.branches:
        kv_heads_of_branch = np.unique(branch.heads.positions() * kv_heads // heads)
        visible[_visible_rows(branch)[:, None], kv_heads_of_branch] = True
    return visible


def _visible_rows(branch: Branch) -> npt.NDArray[np.int64]:
    """Key rows that some query of the branch sees."""
    rows = branch.k.rows()
    if branch.band is None:
        return rows.ravel()
    if not branch.uniform:
        assert branch.visible is not None
        return rows[np.broadcast_to(branch.visible.any(1), rows.shape)]
    # Every tile shows the same: the union of the query rows' ranges, as a running count of those that are open.
    begin, end = branch.key_range()
    nonempty = begin <= end
    opened = np.zeros(branch.k.count + 1, np.int64)
    np.add.at(opened, begin[nonempty], 1)
    np.add.at(opened, end[nonempty] + 1, -1)
    return rows[:, np.cumsum(opened)[:-1] > 0].ravel()
