"""`WriteOrder`: which writer of query rows comes first, and which ones merge onto what an earlier one wrote."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from longattn.patterncache import Plan


class WriteOrder:
    """Writers of (head, query row) pairs, told one after the other. Those of one phase may run at the same time.

    Args:
        plan: whose heads and query rows are written.
        writers: how many will be told, at most.
    """

    def __init__(self, plan: Plan, writers: int) -> None:
        # One more than the last phase that wrote a row; 0: nobody did. There are at most as many phases as writers.
        self._last = np.zeros(plan.rectangle.shape[:2], np.min_scalar_type(writers))
        self._merged_into_nothing = False

    def phase(self, at: Any) -> int:
        """The first phase in which these rows may be written: after every one that wrote any of them. `at` indexes (heads, rows)."""
        return int(self._last[at].max(initial=0))

    def write(self, at: Any, phase: int | None = None, seeing: npt.NDArray[np.bool_] | None = None) -> int:
        """Note that these rows are written, and return what `phase` says of them: 0 where no earlier writer wrote any of them.

        Args:
            at: which (heads, rows).
            phase: in which phase. Default: the first that may. Several writers of phase 0 may share rows: one launch writes them, and
                merges nothing.
            seeing: of these rows those that see a key and so are written, broadcastable to them. Default: all.
        """
        written = self._last[at]
        first = int(written.max(initial=0))
        phase = first if phase is None else phase
        if phase and first and not written.all():
            self._merged_into_nothing = True
        self._last[at] = phase + 1 if seeing is None or seeing.all() else np.where(seeing, phase + 1, written)
        return first

    @property
    def complete(self) -> bool:
        """Whether every row is written, and written before it is merged into, so that memory may start as it comes."""
        return not self._merged_into_nothing and bool(self._last.all())
