"""`IndexArrays`: a plan as plain index arrays, for kernels of one's own: compressed rows, as sparse matrices have them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from longattn.patterncache.plan import Branch, Plan
from longattn.patterncache.spans import Rows, check_flag, check_kind, shortened

Small = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class IndexArrays:
    """Compressed rows: query row i of head h sees keys `indices[begin:end]`, ascending, each `counts[begin:end]` times.

    With c = head_class[h], begin and end are `indptr[c, i]` and `indptr[c, i + 1]`. Rows are rows of the tensors at hand, not positions.
    Transposed, a row is a key and `indices` are the queries that see it: what a backward over keys walks.

    Attributes:
        head_class: (heads,) int32; heads that see the same share a class and its rows.
        indptr: (classes, rows + 1) int64, offsets into `indices` and `counts`.
        indices: (pairs,) int32.
        counts: (pairs,) int32, at least 1.
        transposed: whether rows are keys.
    """

    head_class: Small
    indptr: Rows
    indices: Small
    counts: Small
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all four arrays."""
        return self.head_class.nbytes + self.indptr.nbytes + self.indices.nbytes + self.counts.nbytes


def index_arrays(plan: Plan, *, transposed: bool = False) -> IndexArrays:
    """The plan's counts as read-only arrays; time and memory go with the pairs that are seen.

    Args:
        plan: any plan.
        transposed: rows are keys instead of queries. Default False.

    Raises:
        TypeError: an argument is not such a value.
    """
    check_kind("plan", plan, Plan)
    check_flag("transposed", transposed)
    _, queries, keys = plan.rectangle.shape
    rows, columns = (keys, queries) if transposed else (queries, keys)
    classes, members = head_classes(plan)
    indptr = np.zeros((len(members), rows + 1), np.int64)
    cells_of_classes: list[tuple[Rows, Rows]] = []
    total = 0
    for c, some in enumerate(members):
        parts = [_cells(plan.branches[b], columns, transposed) for b in some]
        cells, counts = np.unique(np.concatenate(parts or [np.empty(0, np.int64)]), return_counts=True)
        row = cells // max(1, columns)
        indptr[c] = total + np.searchsorted(row, np.arange(rows + 1))
        cells_of_classes.append((cells - row * columns, counts))
        total += len(cells)
    indices, counts = (np.concatenate(side).astype(np.int32) for side in zip(*cells_of_classes, strict=True))
    arrays = (classes.astype(np.int32), indptr, indices, counts)
    for array in arrays:
        array.flags.writeable = False
    return IndexArrays(*arrays, transposed)


def as_device(device: Any) -> Any:
    """A torch.device, where torch knows such a one and can put a tensor there.

    Raises:
        TypeError, ValueError: it does not, or cannot, by name.
    """
    torch = import_module("torch")
    try:
        known = torch.device(device)
        if known.type != "cpu":
            torch.empty(
                0, device=known
            )  # one without a driver, or that torch was built without, is known by name alone
    except (
        RuntimeError,
        TypeError,
        ValueError,
        AssertionError,
        ImportError,
    ) as error:  # which one, each backend says its own way
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"device must be one that torch has here, got {shortened(device)}: {str(error).partition(chr(10))[0][:200]}"
        ) from error
    return known


def head_classes(plan: Plan) -> tuple[Rows, list[tuple[int, ...]]]:
    """((heads,) class of each head, the branches of each class): heads of one class are in the same branches."""
    heads = plan.rectangle.shape[0]
    inside = np.zeros((heads, len(plan.branches)), bool)
    for b, branch in enumerate(plan.branches):
        inside[branch.heads.positions(), b] = True
    distinct, which = np.unique(inside, axis=0, return_inverse=True)
    members = [tuple(np.flatnonzero(row).tolist()) for row in distinct]
    return which.reshape(-1), members or [()]


def _cells(branch: Branch, columns: int, transposed: bool) -> Rows:
    """row * columns + column of every pair that a branch shows, in no order."""
    return np.concatenate([a * columns + b for a, b in _pairs(branch, transposed)])


def _pairs(branch: Branch, transposed: bool) -> Iterator[tuple[Rows, Rows]]:
    visible = branch.visible
    for t, (q, k) in enumerate(zip(branch.q.rows(), branch.k.rows(), strict=True)):
        if visible is None:
            a, b = np.repeat(q, len(k)), np.tile(k, len(q))
        else:
            i, j = np.nonzero(visible[t if len(visible) > 1 else 0])
            a, b = q[i], k[j]
        yield (b, a) if transposed else (a, b)
