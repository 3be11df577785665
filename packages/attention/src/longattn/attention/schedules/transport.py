"""Exchanges that wait: an all-to-all of tensors, and the gathering of a few integers. Each is announced before its data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longattn.attention.schedules.callers import caller_fields
from longattn.attention.schedules.group_calls import KEYS, Exchange, GroupCalls
from longattn.attention.schedules.headers import Fields
from longattn.kernels.interface import ScratchAllocator


class Swapped(NamedTuple):
    """A tensor in parts: parts[r] goes to rank r, and one of shapes[r] comes from it, all of one dtype."""

    parts: Sequence[Tensor]
    shapes: Sequence[Sequence[int]]


def swap(
    calls: GroupCalls, fields: Fields, call: int, tensors: Sequence[Swapped], allocator: ScratchAllocator
) -> list[list[Tensor]]:
    """What comes from each rank, for each tensor. Waits. This rank's own part is itself, made contiguous.

    An all-to-all of any sizes; where every part of a tensor is the same one, an all-gather.
    """
    me = calls.rank
    sends: list[tuple[int, Tensor]] = []
    received: list[list[Tensor]] = []
    for parts, shapes in tensors:
        own_part = parts[me].contiguous()
        shared = {id(x): own_part for x in parts if x is parts[me]}
        sends += [(r, shared.get(id(x), x).contiguous()) for r, x in enumerate(parts) if r != me]
        received.append(
            [
                own_part if r == me else allocator.empty(s, own_part.dtype, own_part.device, "comm")
                for r, s in enumerate(shapes)
            ]
        )
    receives = [(r, x) for parts in received for r, x in enumerate(parts) if r != me]
    follow = {
        peer: ([x.numel() * x.element_size() for r, x in sends if r == peer], ())
        for peer in range(calls.size)
        if peer != me
    }
    calls.announce(fields, call, follow=follow)
    Exchange(calls, fields.step, sends, receives, KEYS).wait()
    return received


def gather_integers(
    calls: GroupCalls, phase: str, row: Sequence[int], call: int = 0, schedule: str = "", timeout: float | None = None
) -> Tensor:
    """(ranks, 4) int64 on the CPU: up to 4 integers of each rank. A pass of its own.

    phase: what for. schedule: alike on every rank, without its group.
    """
    with calls.underway(timeout):
        fields = Fields(phase=phase, schedule=schedule, **caller_fields(calls))
        headers = calls.announce(fields, call, row)
    return torch.tensor([header.own for header in headers], dtype=torch.int64, device="cpu")
