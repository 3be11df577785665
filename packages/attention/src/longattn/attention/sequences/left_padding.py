"""Padding on the left with every row left in its place: where rows are one rank's of a longer sequence, or count in dropout.

Padding is a document of its own before the rest, hidden as keys; so positions of the rest begin after it, whichever rank holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longattn.attention.schedules.base import Schedule
from longattn.attention.schedules.call_extents import CallExtents
from longattn.attention.schedules.extents import row_numbers
from longattn.attention.validate import check_pattern_argument, integers
from longattn.kernels.interface import as_seed, check_key_padding
from longattn.patterncache import Documents
from longattn.patterncache.spans import shortened


def attend_in_place(
    attention: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions_start: object,
    schedule: Schedule,
    options: dict[str, Any],
    crossing: bool = False,
) -> tuple[Tensor, Tensor]:
    """`attention` with padding on the left: (out, lse), as `varlen.aligned_attention` says.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """
    call = CallExtents(q, k, schedule)
    extents, pattern = call.extents(), check_pattern_argument(options["pattern"])
    starts = check_positions_start(positions_start, k.shape[0], extents.nk)
    first = extents.first_query(options.pop("q_start", None))
    if first < 0:
        raise ValueError(
            f"q_start must be given where queries outnumber keys and positions matter, got Nq={extents.nq}, Nk={extents.nk}"
        )
    end = max(extents.nk, first + extents.nq)
    keys = row_numbers(extents.k_rows).to(k.device)
    mask, padding = options.pop("attention_mask", None), options.pop("key_padding_mask", None)
    check_key_padding(padding, q, k)
    seed = as_seed(options.get("seed")) if options.get("dropout_p") else None
    outs: list[tuple[Tensor, Tensor]] = []
    order: list[int] = []
    for start in sorted(set(starts)):
        members = [b for b in range(len(starts)) if starts[b] == start]
        group = torch.tensor(members, device=q.device)
        group_options: dict[str, Any] = {"q_start": first, "attention_mask": mask}
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[0] > 1:
            group_options["attention_mask"] = mask[group]
        # Every rank hides something or none does, whatever rows it holds.
        hidden = (keys < start).expand(len(members), -1)
        group_padding = None if padding is None else padding[group]
        group_options["key_padding_mask"] = (
            group_padding if not start else hidden if group_padding is None else hidden | group_padding
        )
        group_options["pattern"] = Documents((0, start, end), pattern) if start and not crossing else pattern
        if seed is not None:
            group_options["seed"] = seed + start  # else elements of two groups would drop alike
        out, lse = attention(q[group], k[group], v[group], **(options | group_options))
        outs.append((out, lse))
        order += members
    return in_order([pair[0] for pair in outs], order), in_order([pair[1] for pair in outs], order)


def check_positions_start(value: object, batch: int, nk: int) -> list[int]:
    """(batch,) integers in [0, Nk] of the whole sequence, as a list."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
        raise TypeError(
            f"positions_start must be an integer tensor (batch,), got {shortened(value)} ({type(value).__name__})"
        )
    if value.shape != (batch,):
        raise ValueError(f"positions_start must have shape ({batch},), got {tuple(value.shape)}")
    starts = integers(value)
    if any(not 0 <= start <= nk for start in starts):
        raise ValueError(f"positions_start must lie in [0, {nk}], the keys there are, got {starts}")
    return starts


def in_order(parts: list[Tensor], order: list[int]) -> Tensor:
    """The parts' elements as the batch has them."""
    if len(parts) == 1:
        return parts[0]
    # torch.device may be a context of another device.
    inverse = torch.tensor(order, device="cpu").argsort()
    return torch.cat(parts)[inverse.to(parts[0].device)]
