"""How many keys each query of a plan sees."""

from __future__ import annotations

import numpy as np

from longattn.patterncache.indices import Affine
from longattn.patterncache.interop.csr import head_classes
from longattn.patterncache.plan import Branch, Plan
from longattn.patterncache.spans import Rows


def keys_per_query(plan: Plan) -> tuple[Rows, Rows]:
    """((heads,) class of each head, (classes, queries) int64 keys that each query sees), with multiplicity, without dense counts."""
    classes, members = head_classes(plan)
    total = np.zeros((len(members), plan.rectangle.shape[1]), np.int64)
    for b, branch in enumerate(plan.branches):
        number = _keys_of_tiles(branch)
        for c, some in enumerate(members):
            # No query row stands twice in a branch, so nothing is added to itself.
            if b in some and isinstance(branch.q, Affine) and branch.q.tiles == 1:
                end = branch.q.start + branch.q.count * branch.q.step
                total[c, branch.q.start : end : branch.q.step] += np.broadcast_to(number, (1, branch.q.count))[0]
            elif b in some:
                total[c, branch.q.rows()] += number
    return classes, total


def _keys_of_tiles(branch: Branch) -> Rows:
    """(tiles or 1, q count or 1): how many keys each query row of each tile sees."""
    if branch.band is None:
        return np.array([[branch.k.count]])
    if branch.uniform:
        begin, end = branch.key_range()
        return np.maximum(end - begin + 1, 0)[None]
    assert branch.visible is not None
    return branch.visible.sum(axis=2)
