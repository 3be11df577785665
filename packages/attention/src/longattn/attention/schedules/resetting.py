"""`reset_calls`: after a failed call, ranks meet, end what is in flight between them, and count their calls alike again.

A message that one rank posted and the other did not can never complete by itself, and torch has no way to withdraw it. So each rank says what
it has posted in the failed pass, and for every message without a counterpart its peer posts one, of any content, which nobody reads.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import zip_longest

import torch

from longattn.attention.schedules.group_calls import HEADERS, Exchange, GroupCalls
from longattn.attention.schedules.headers import FORMAT, HEADER_BYTES
from longattn.attention.schedules.place import Parcel
from longattn.attention.schedules.waiting import PendingWorks
from longattn.attention.validate import integers

_NUMBERS = struct.Struct(f"<{HEADER_BYTES // 8}q")
_RESET_TAG = (1 << 29) - 1
Posted = dict[int, tuple[list[int], list[int]]]
"""{tag: bytes of each message sent to, and received from, one peer}."""


def reset_calls(calls: GroupCalls, timeout: float | None) -> None:
    """Take calls again, once every rank of the group is here.

    Raises:
        GroupError: a rank is gone, or silent for the timeout.
    """
    calls.begin_reset(timeout)
    try:
        if calls.rendezvous is None:
            calls.rendezvous = _Rendezvous(calls)
        theirs = calls.rendezvous.wait(calls)
        for peer, (number, _, posted) in theirs.items():
            _complete(calls, peer, max(number, calls.number), posted)
        for exchange in list(calls.unfinished):
            exchange.wait()
        numbers = [(calls.number, calls.calls), *((number, called) for number, called, _ in theirs.values())]
        calls.end_reset(max(n for n, _ in numbers), max(n for _, n in numbers))
    finally:
        calls.release()


class _Rendezvous:
    """What ranks tell one another at a reset. Kept until all have answered: a reset that ran out of time is continued by the next one."""

    def __init__(self, calls: GroupCalls) -> None:
        peers = [rank for rank in range(calls.size) if rank != calls.rank]
        device = calls.place.header_device
        sends: list[Parcel] = [
            (peer, torch.frombuffer(_encode(calls, peer), dtype=torch.uint8).to(device)) for peer in peers
        ]
        self.messages = [bytearray(HEADER_BYTES) for _ in peers]
        self.receives = [
            (p, torch.frombuffer(m, dtype=torch.uint8).to(device)) for p, m in zip(peers, self.messages, strict=True)
        ]
        try:
            works = list(calls.place.post(self.receives, sends, _RESET_TAG))
        except RuntimeError as error:
            raise calls.error(f"a rank is gone: {error}; make the group anew", None, "reset") from error
        self.jobs = [
            PendingWorks([(peer, x, work)]) for (peer, x), work in zip((*self.receives, *sends), works, strict=True)
        ]
        # Each in a thread of its own: the waiter may be held up by what the reset is to complete.
        for job in self.jobs:
            job.start()

    def wait(self, calls: GroupCalls) -> dict[int, tuple[int, int, Posted]]:
        """{peer: (number of its last pass, calls it has begun, what it has posted to and from this rank)}."""
        for job in self.jobs:
            calls.await_job(job, "reset")
        answers: dict[int, tuple[int, int, Posted]] = {}
        for (peer, received), message in zip(self.receives, self.messages, strict=True):
            held = message if received.device.type == "cpu" else bytes(integers(received))
            answers[peer] = _decode(held)
        return answers


def _encode(calls: GroupCalls, peer: int) -> bytearray:
    numbers = [FORMAT, calls.number, calls.calls, 0]
    for tag, directions in calls.posted.items():
        for received, messages in enumerate(directions):
            for rank, nbytes in messages:
                if rank == peer:
                    numbers += [tag, received, nbytes]
                    numbers[3] += 1
    assert len(numbers) <= HEADER_BYTES // 8
    return bytearray(_NUMBERS.pack(*numbers, *(0,) * (HEADER_BYTES // 8 - len(numbers))))


def _decode(message: bytes | bytearray) -> tuple[int, int, Posted]:
    _, number, called, count, *numbers = _NUMBERS.unpack(message)
    posted: Posted = {}
    for index in range(0, 3 * count, 3):
        tag, received, nbytes = numbers[index : index + 3]
        sends, receives = posted.setdefault(tag, ([], []))
        (receives if received else sends).append(nbytes)
    return number, called, posted


def _complete(calls: GroupCalls, peer: int, number: int, theirs: Posted) -> None:
    """Post what the other rank waits for and this one never posted, in pass `number`: one of the two has ended all passes before it."""
    first = calls.first_tag(number)
    ours = {
        tag: tuple([nbytes for rank, nbytes in messages if rank == peer] for messages in directions)
        for tag, directions in calls.posted.items()
    }
    for tag in sorted({*ours, *theirs}):
        if tag < first:
            continue
        sent, received = ours.get(tag, ([], []))
        their_sent, their_received = theirs.get(tag, ([], []))
        sends = [(peer, _any_content(n)) for n in _without_counterpart(their_received, sent)]
        receives = [(peer, _any_content(n)) for n in _without_counterpart(their_sent, received)]
        Exchange(calls, "reset", sends, receives, HEADERS, tag)


def _without_counterpart(posted: Sequence[int], counterparts: Sequence[int]) -> list[int]:
    """Messages of one tag meet in order: the last ones have no counterpart."""
    return [nbytes for nbytes, other in zip_longest(posted, counterparts) if nbytes is not None and other is None]


def _any_content(nbytes: int) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8)
