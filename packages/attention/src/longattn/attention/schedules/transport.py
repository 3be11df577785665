"""What ranks send one another: point-to-point exchanges that go on while the caller computes, and the exchange of a few integers before them.

`batch_isend_irecv` over any torch.distributed backend. Run here: gloo on the CPU. Never run here: NCCL; with it, a wait holds the
current stream rather than the process, and buffers are the device's.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from longattn.kernels.interface import Allocator

Parcel = tuple[int, Tensor]
"""(rank in the group, tensor that is sent to it or filled from it)."""


@dataclass(frozen=True)
class Event:
    """An event on this rank: `what` is "post", "send" (with its bytes) or "arrive"; `label` names the exchange."""

    what: str
    label: str
    peer: int = -1
    nbytes: int = 0


_WATCHERS: list[list[Event]] = []


@contextmanager
def watch() -> Generator[list[Event], None, None]:
    """A list that fills with this process's events, in order, as long as the context is open."""
    events: list[Event] = []
    _WATCHERS.append(events)
    try:
        yield events
    finally:
        _WATCHERS.remove(events)


def note(event: Event) -> None:
    """Append to every open `watch`."""
    for events in _WATCHERS:
        events.append(event)


@dataclass(frozen=True)
class Place:
    """A process group by its name: what crosses into ops, copies and pickles. Rank and size are those of the calling process."""

    name: str

    @classmethod
    def of(cls, group: object) -> Place:
        """The place of a ProcessGroup, of a DeviceMesh of one dimension (`mesh["ring"]`), or of a name.

        Raises:
            TypeError, ValueError: something else, a mesh of several dimensions, or no torch.distributed yet.
        """
        if isinstance(group, str):
            return cls(group)
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(f"group must be a DeviceMesh of one dimension, such as mesh['ring'], got {group.ndim}")
            group = group.get_group()
        if not isinstance(group, ProcessGroup):
            raise TypeError(
                f"group must be a ProcessGroup or a DeviceMesh of one dimension, got {type(group).__name__}"
            )
        return cls(group.group_name)

    @property
    def group(self) -> ProcessGroup:
        """The group itself, looked up as torch's functional collectives look up theirs."""
        try:
            return dist.distributed_c10d._resolve_process_group(self.name)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise ValueError(f"group must be one that this process is in, got {self.name!r}: {error}") from error

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return dist.get_world_size(self.group)

    def members(self) -> list[int]:
        """The group's ranks, by their numbers in the world."""
        return dist.get_process_group_ranks(self.group)


class Exchange:
    """Parcels in flight.

    1. Made: everything is posted, without waiting. 2. `wait`, once: all receives are complete, and sent tensors may change.
    """

    def __init__(self, place: Place, label: str, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> None:
        group = place.group
        self.label = label
        # Both ranks leave out empty tensors.
        self._parcels = [(dist.isend, *p) for p in sends if p[1].numel()]
        self._parcels += [(dist.irecv, *p) for p in receives if p[1].numel()]
        operations = [
            dist.P2POp(how, tensor, dist.get_global_rank(group, peer), group) for how, peer, tensor in self._parcels
        ]
        self._works = dist.batch_isend_irecv(operations) if operations else []
        note(Event("post", label))
        for peer, tensor in sends:
            note(Event("send", label, peer, tensor.numel() * tensor.element_size()))

    def wait(self) -> None:
        """Wait until all receives are complete."""
        for work in self._works:
            work.wait()
        if self._works:
            note(Event("arrive", self.label))
        # The sent tensors were held for as long as they were read.
        self._works, self._parcels = [], []


def gather_integers(place: Place, row: Sequence[int]) -> Tensor:
    """(ranks, len(row)) int64 on the CPU: the integers of each rank."""
    group = place.group
    own_row = torch.tensor(row, dtype=torch.int64, device="cpu")
    if "cpu" not in dist.get_backend_config(group) and dist.get_backend(group) == "nccl":
        own_row = own_row.to(torch.device("cuda", torch.cuda.current_device()))
    rows = [torch.empty_like(own_row) for _ in range(place.size)]
    cast(Any, dist).all_gather(rows, own_row, group)
    return torch.stack(rows).cpu()


def swap(
    place: Place, label: str, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], allocator: Allocator
) -> list[Tensor]:
    """Send parts[r] to rank r, and receive a tensor of shapes[r] from it. Waits. This rank's own part is itself, made contiguous.

    An all-to-all of any sizes; where every part is the same tensor, an all-gather.
    """
    me = place.rank
    own_part = parts[me].contiguous()
    shared = {id(x): own_part for x in parts if x is parts[me]}
    sends = [(r, shared.get(id(x), x).contiguous()) for r, x in enumerate(parts) if r != me]
    received = [
        own_part if r == me else allocator.empty(s, own_part.dtype, own_part.device, "comm")
        for r, s in enumerate(shapes)
    ]
    Exchange(place, label, sends, [(r, x) for r, x in enumerate(received) if r != me]).wait()
    return received
