"""`GroupError`: what every rank raises where a call over a process group cannot go on."""

from __future__ import annotations

from collections.abc import Mapping


class GroupError(RuntimeError):
    """Ranks differ, a peer is gone or silent, or an earlier call on the group failed. Results of the call are nowhere.

    After it, schedules refuse calls on that group until every rank has called their `reset()`, or the group was made anew.

    Attributes:
        rank: the rank of the group that differs, is gone or silent; None where it is this one alone.
        call: number of the call on the group, from 1; 0: unknown. phase, step: what of the call, such as "backward" and "keys 2".
        field: what the ranks disagree about, such as "dtype", or None. values: {rank: what it has}, for those that were compared.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        call: int = 0,
        phase: str = "",
        step: str = "",
        field: str | None = None,
        values: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.rank, self.call, self.phase, self.step = rank, call, phase, step
        self.field, self.values = field, dict(values or {})
