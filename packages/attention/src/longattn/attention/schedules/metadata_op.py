"""`longattn::roll_call` and `longattn::row_positions`: the metadata that ranks exchange before a call, and where rows stand, as ops.

Both are opaque to traced code, so that a graph serves any lengths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longattn.attention.schedules.extents import row_numbers
from longattn.attention.schedules.group import COLUMNS
from longattn.attention.schedules.registry import parse_schedule

LIBRARY: Any = torch.library.Library("longattn", "FRAGMENT")
_TORCH_LIBRARY: Any = torch.library  # partly untyped
LIBRARY.define("roll_call(Tensor? seed, SymInt nq, SymInt nk, int flags, str schedule) -> Tensor")
LIBRARY.define("row_positions(Tensor? roll, SymInt nq, SymInt nk, SymInt? start, str schedule) -> (Tensor, Tensor)")


def _exchange_metadata(seed: Tensor | None, nq: int, nk: int, flags: int, schedule: str) -> Tensor:
    return parse_schedule(schedule).gather_metadata(nq, nk, flags, None if seed is None else int(seed))


def _exchange_metadata_fake(seed: Tensor | None, nq: int, nk: int, flags: int, schedule: str) -> Tensor:
    return torch.empty((parse_schedule(schedule).ranks, COLUMNS), dtype=torch.int64, device="cpu")


def _row_positions(
    metadata: Tensor | None, nq: int, nk: int, start: int | None, schedule: str
) -> tuple[Tensor, Tensor]:
    extents = parse_schedule(schedule).extents(nq, nk, metadata)
    return row_numbers(extents.q_rows) + extents.first_query(start), row_numbers(extents.k_rows)


def _row_positions_fake(
    metadata: Tensor | None, nq: int, nk: int, start: int | None, schedule: str
) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty(n, dtype=torch.int64, device="cpu") for n in (nq, nk))  # type: ignore[return-value]


LIBRARY.impl("roll_call", _exchange_metadata, "CompositeExplicitAutograd")
_TORCH_LIBRARY.register_fake("longattn::roll_call", _exchange_metadata_fake, lib=LIBRARY)
LIBRARY.impl("row_positions", _row_positions, "CompositeExplicitAutograd")
_TORCH_LIBRARY.register_fake("longattn::row_positions", _row_positions_fake, lib=LIBRARY)
