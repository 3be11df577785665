"""What a mask_mod answers: asked about batch entries, heads, queries and keys, within a limit that says what asking would cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from longattn.patterncache.planning.limits import VARIABLE, cost_of, is_limited
from longattn.patterncache.spans import Rows

Shown = npt.NDArray[np.bool_]

MOST_CELLS = 1 << 28
"""(head, query, key) triples of a mask that are looked at one by one: a quarter of a gigabyte of booleans."""

STRIP_CELLS = 1 << 20
"""Triples that are compared at once, which keeps them in the processor's cache."""

BYTES_PER_CELL = 5
"""Of an arbitrary mask, at once; for error messages only."""

_CELLS_PER_SECOND = 2e8
"""What a core compares, roughly; for error messages only."""


def check_cells(shape: tuple[int, ...]) -> None:
    """Raise ValueError where a mask of this shape is too large to look at pair by pair."""
    cells = prod(shape)
    if cells > MOST_CELLS:
        raise ValueError(f"mask must have at most {MOST_CELLS} (head, query, key) triples, got {shape}: {cells}")


@dataclass(frozen=True)
class MaskMod:
    """A mask_mod, and how to call it.

    Attributes:
        function: (b, h, q, k) -> whether q sees k, elementwise.
        as_tensor: makes what the function takes of an int64 array.
    """

    function: Callable[..., Any]
    as_tensor: Callable[..., Any]

    def sees(self, entry: int, h: Rows, q: Rows, k: Rows) -> Shown:
        """What it says of a batch entry's heads, queries and keys, which broadcast; False where it returns no booleans."""
        answer = self._answer(entry, (h, q, k))
        return answer if answer.dtype == np.bool_ else np.zeros(1, bool)

    def of_first_head(self, q: Rows, k: Rows) -> Shown:
        """What it says of pairs of the first entry's first head, elementwise; False where it returns another shape."""
        answer = self.sees(0, np.zeros((1, 1, 1), np.int64), q.reshape(1, -1, 1), k.reshape(1, -1, 1))
        return np.broadcast_to(answer.reshape(-1), q.shape) if answer.size in (1, len(q)) else np.zeros(len(q), bool)

    def whole(self, entry: int, shape: tuple[int, ...]) -> Shown:
        """What it says of one batch entry, (heads, queries, keys); asked some rows at a time, as its numbers take more room.

        Raises:
            TypeError, ValueError: it does not return booleans of that shape.
        """
        heads, queries, keys = shape
        shown, rows = np.empty(shape, bool), max(1, STRIP_CELLS // max(1, heads * keys))
        for first in range(0, queries, rows):
            q = np.arange(first, min(first + rows, queries), dtype=np.int64)
            shown[:, first : first + rows] = self._rows(entry, heads, q, keys)
        return shown

    def _rows(self, entry: int, heads: int, q: Rows, keys: int) -> Shown:
        shape = heads, len(q), keys
        h, k = (np.arange(length, dtype=np.int64) for length in (heads, keys))
        answer = self._answer(entry, (h.reshape(-1, 1, 1), q.reshape(1, -1, 1), k.reshape(1, 1, -1)))
        if answer.dtype != np.bool_:
            raise TypeError(f"mask_mod must return booleans{self._hint}, got {answer.dtype}")
        try:
            return np.broadcast_to(answer, shape)
        except ValueError as error:
            raise ValueError(f"mask_mod must return what broadcasts to {shape}, got shape {answer.shape}") from error

    def _answer(self, entry: int, axes: tuple[Rows, Rows, Rows]) -> npt.NDArray[Any]:
        numbers = (np.full((1, 1, 1), entry, np.int64), *axes)
        try:
            return np.asarray(self.function(*map(self.as_tensor, numbers)))
        except TypeError as error:
            raise TypeError(f"mask_mod must take int64 arrays (b, h, q, k){self._hint}, got {error}") from error

    @property
    def _hint(self) -> str:
        if self.as_tensor is not np.asarray:
            return ""
        return "; one written with torch functions or tables needs as_tensor=torch.from_numpy"


def check_allowed(shape: tuple[int, int, int], batch: int, listed: str | None, what: str, most_bytes: int) -> None:
    """Raise ValueError with the cost of comparing every pair of a large mask, unless that is allowed."""
    cells = prod(shape) * batch
    if cells > MOST_CELLS and is_limited(listed):
        raise ValueError(
            f"mask_mod must be asked about at most {MOST_CELLS} (batch entry, head, query, key) cells, got {(batch, *shape)}: {cells}. "
            f"Comparing all of {what} takes {cost_of(cells, _CELLS_PER_SECOND, most_bytes)}; "
            f'listed="allow" (or {VARIABLE}=allow in the environment) does so; verify="samples" asks about some pairs of each query'
        )
