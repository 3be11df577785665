"""`Place`: a process group by its name, and messages between its ranks.

Run here: gloo on the CPU. Never run here: NCCL; with it, a wait holds the current stream rather than the process, buffers are the
device's, and tags are ignored: there headers alone keep calls apart.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from longattn.patterncache.spans import shortened

Parcel = tuple[int, Tensor]
"""(rank in the group, tensor that is sent to it or filled from it)."""


@dataclass(frozen=True)
class TransportEvent:
    """An event on this rank: `what` is "header", "post", "send" (with its bytes) or "arrive"; `label` names the exchange."""

    what: str
    label: str
    peer: int = -1
    nbytes: int = 0


_WATCHERS: list[list[TransportEvent]] = []


@contextmanager
def watch() -> Generator[list[TransportEvent], None, None]:
    """A list that fills with this process's events, in order, as long as the context is open. Headers have no bytes in it."""
    events: list[TransportEvent] = []
    _WATCHERS.append(events)
    try:
        yield events
    finally:
        _WATCHERS.remove(events)


def note(event: TransportEvent) -> None:
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
                f"group must be a ProcessGroup or a DeviceMesh of one dimension, got {type(group).__name__} "
                "(a ring of ranks in one process is Ring(size=4))"
            )
        return cls(group.group_name)

    @property
    def group(self) -> ProcessGroup:
        """The group itself, looked up as torch's functional collectives look up theirs."""
        try:
            return dist.distributed_c10d._resolve_process_group(self.name)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise ValueError(
                f"group must be one that this process is in, got {shortened(self.name)}: {str(error)[:200]}"
            ) from error

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return dist.get_world_size(self.group)

    @property
    def header_device(self) -> torch.device:
        """Where messages must be that are no part of a tensor of the caller: on the CPU, unless the backend cannot send from there."""
        if "cpu" not in dist.get_backend_config(self.group) and dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    @property
    def timeout(self) -> float:
        """Seconds: the group's own timeout."""
        backend = cast(Any, self.group)._get_backend(self.header_device)
        timeout: timedelta = backend.options._timeout
        return timeout.total_seconds()

    def members(self) -> list[int]:
        """The group's ranks, by their numbers in the world."""
        return dist.get_process_group_ranks(self.group)

    def post(self, receives: Sequence[Parcel], sends: Sequence[Parcel], tag: int) -> Iterator[Any]:
        """Begin receives and sends; torch's `Work` of each, in that order, as it is begun: an error is that of the next one."""
        group: Any = self.group
        if not receives and not sends:
            return
        if dist.get_backend(group) != "nccl":
            # What isend and irecv do, without their checks of each tensor and rank: headers are on every call's way.
            yield from (group.recv([x], peer, tag) for peer, x in receives)
            yield from (group.send([x], peer, tag) for peer, x in sends)
            return
        operations = [dist.P2POp(dist.irecv, x, dist.get_global_rank(group, p), group, tag) for p, x in receives]
        operations += [dist.P2POp(dist.isend, x, dist.get_global_rank(group, p), group, tag) for p, x in sends]
        yield from cast(Any, dist.batch_isend_irecv(operations))


def many_processes() -> bool:
    """Whether torch.distributed has a default group of more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
