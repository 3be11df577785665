"""`GroupCalls`: what this process has called over one process group, in which order, and what of it is in flight.

Life of a pass, which is one forward, one backward or one exchange of integers or rows: 1. `underway` begins it: one thread at a time, and none
after a failure. 2. `announce` sends every other rank a `Header` and waits for theirs; they are compared before anything else is posted.
3. Data goes out in `Exchange`s, whose receives have the sizes that were announced, under tags of this pass alone: a message of another
pass is never taken for one of this. 4. The pass ends; an exception after 2 is a failure, and the group takes no more calls until `reset`.
"""

from __future__ import annotations

import secrets
import threading
import time
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor

from longattn.attention.schedules.errors import GroupError
from longattn.attention.schedules.headers import (
    HEADER_BYTES,
    OWN,
    Fields,
    Header,
    check_headers,
    encoded,
    has_arrived,
    installed_version,
)
from longattn.attention.schedules.notices import Lookout, leave_notice
from longattn.attention.schedules.place import Parcel, Place, TransportEvent, note
from longattn.attention.schedules.waiting import Patience, PendingWorks, Waiter
from longattn.attention.validate import integers

HEADERS, KEYS, GRADIENTS = range(3)
"""Kinds of messages of a pass."""
_FIRST_TAG = 1 << 29
"""Tags below are those of others on the group."""
_PASSES = 1 << 26
_MOMENT = 2e-3
"""Seconds."""

Announced = Mapping[int, tuple[Sequence[int], Sequence[int]]]
"""{rank: bytes of each message of KEYS and of GRADIENTS that it is sent}."""


class GroupCalls:
    """Of one process group, in this process.

    Attributes:
        place: the group. number: passes announced so far. calls: calls begun so far.
        failure: why no more calls are taken, or None. version: of this package, as headers say it. timeout: seconds that the pass underway waits for a message.
    """

    def __init__(self, place: Place) -> None:
        self.place, self.rank, self.size = place, place.rank, place.size
        self.number, self.calls = 0, 0
        self.failure: str | None = None
        self.version = installed_version()
        self.timeout = 0.0
        self.fields, self.call = Fields(), 0
        self.posted: dict[int, tuple[list[tuple[int, int]], list[tuple[int, int]]]] = {}
        self.unfinished: list[Exchange] = []
        self.rendezvous: Any = None
        self._announced = False
        self._session, self._since = secrets.randbits(62), 0
        self._notice_key: str | None = None
        self._headers: list[Header] = []
        self._taken: dict[tuple[int, int], int] = {}
        self._lock = threading.Lock()
        self._waiter, self._patience = Waiter(), Patience()
        self._callers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._module_numbers = count(1)

    @contextmanager
    def underway(self, timeout: float | None = None) -> Generator[None]:
        """One pass.

        Raises:
            GroupError: an earlier one failed, or another thread is in one.
        """
        self.refuse_after_failure()
        if self.size == 1:
            # No other rank can see another order; and one group of one rank may stand for several dimensions of a mesh.
            yield
            return
        if not self._lock.acquire(blocking=False):
            raise GroupError(
                f"rank {self.rank}: group {self.place.name!r} is in a call of another thread; calls of two threads have no order that all ranks share"
            )
        self._announced, self.timeout = False, self.place.timeout if timeout is None else timeout
        try:
            yield
        except BaseException as error:
            if self._announced:
                self.failure = f"call {self.call} ({self.fields.phase}): {type(error).__name__}: {str(error)[:500]}"
                self._tell_others(error)
            raise
        finally:
            self._lock.release()

    def begin_reset(self, timeout: float | None) -> None:
        """Hold the group for a reset, until `release`."""
        if not self._lock.acquire(blocking=False):
            raise GroupError(
                f"rank {self.rank}: group {self.place.name!r} is in a call, and cannot be reset before it ends"
            )
        self.timeout = self.place.timeout if timeout is None else timeout
        self._notice_key = None  # what it says is known

    def end_reset(self, number: int, calls: int) -> None:
        """Take calls again, and go on from these numbers."""
        self.number, self.calls, self.failure, self.rendezvous = number, calls, None, None
        self._since = number
        self.posted.clear()

    def release(self) -> None:
        """Let go of what `begin_reset` holds."""
        self._lock.release()

    def refuse_after_failure(self) -> None:
        """Raise GroupError if an earlier pass failed."""
        if self.failure is not None:
            raise GroupError(
                f"rank {self.rank}: schedules refuse calls on group {self.place.name!r} after a call that failed; call reset() of the schedule on "
                f"every rank, or make the group anew. {self.failure}",
                call=self.call,
                phase=self.fields.phase,
            )

    def next_call(self) -> int:
        """The number of a call that begins."""
        self.refuse_after_failure()
        self.calls += 1
        return self.calls

    def caller(self, module: object) -> str:
        """How a module is named in headers: its class, and a number in the order in which modules first called over this group."""
        if module is None:
            return ""
        if module not in self._callers:
            # Counted, because modules that are gone leave the dictionary, and not at one time on all ranks.
            self._callers[module] = next(self._module_numbers)
        return f"{type(module).__name__} number {self._callers[module]}"

    def announce(
        self, fields: Fields, call: int = 0, own: Sequence[int] = (), follow: Announced | None = None
    ) -> list[Header]:
        """Send every rank a header, and wait for theirs.

        Args:
            fields: alike on every rank. call: likewise. own: up to 4 integers that may differ.
            follow: what this rank will send in the pass.

        Returns:
            The header of each rank, this one's included.

        Raises:
            GroupError: ranks differ, or one is gone or silent.
        """
        self.fields, self.call, self.number = fields, call, self.number + 1
        self.posted.clear()
        self._taken.clear()
        text, own = encoded(fields._replace(version=self.version)), (*own, *(0,) * (OWN - len(own)))
        mine = Header(self.number, call, own, (), (), text, self._session)
        self._headers = [mine] * self.size
        self._announced = self._announced or self.size > 1
        device = self.place.header_device
        sends: list[Parcel] = []
        messages: list[bytearray] = []
        peers = [(self.rank + n) % self.size for n in range(1, self.size)]
        for peer in peers:
            keys, gradients = ((), ()) if follow is None else follow.get(peer, ((), ()))
            header = Header(self.number, call, own, tuple(keys), tuple(gradients), text, self._session)
            sends.append((peer, torch.frombuffer(header.encode(), dtype=torch.uint8).to(device)))
            messages.append(bytearray(HEADER_BYTES))
        receives = [
            (p, torch.frombuffer(m, dtype=torch.uint8).to(device)) for p, m in zip(peers, messages, strict=True)
        ]
        exchange = Exchange(self, "header", sends, receives, HEADERS)
        if device.type == "cpu" and self._arrive_soon(messages):
            exchange.job.run()
        else:
            self._waiter.submit(exchange.job)
        exchange.wait()
        note(TransportEvent("header", fields.phase))
        for (peer, received), message in zip(receives, messages, strict=True):
            held = message if device.type == "cpu" else bytes(integers(received))
            self._headers[peer] = Header.decode(held, peer)
        # All ranks know the number that rank 0 drew: a group that is made anew on the same store has another one.
        self._notice_key = f"longattn failed {self._headers[0].session} {self._since}"
        check_headers(self._headers, self.place.name)
        return self._headers

    def _arrive_soon(self, messages: Sequence[bytearray]) -> bool:
        """Whether every rank's header is there within a moment. Then no wait for it, or for ours, can last, and the waiter is not asked."""
        deadline = time.monotonic() + _MOMENT
        for message in messages:
            while not has_arrived(message, self.number):
                if time.monotonic() > deadline:
                    return False
                time.sleep(5e-5)
        return True

    def check_announced(self, kind: int, peer: int, nbytes: int, step: str) -> None:
        """Raise GroupError unless the next message of that kind from `peer` is one of `nbytes`."""
        sizes = self._headers[peer].keys if kind == KEYS else self._headers[peer].gradients
        index = self._taken.get((kind, peer), 0)
        self._taken[kind, peer] = index + 1
        announced = sizes[index] if index < len(sizes) else None
        if announced != nbytes:
            raise self.error(
                f"rank {peer} must send {nbytes} bytes, got a header that announces {announced}", peer, step, "bytes", {peer: str(announced), self.rank: str(nbytes)}
            )  # fmt: skip

    @staticmethod
    def first_tag(number: int) -> int:
        """The lowest tag of the messages of a pass; one for each kind."""
        return _FIRST_TAG + 3 * (number % _PASSES)

    def error(self, what: str, rank: int | None, step: str, field: str | None = None, values: Mapping[int, str] | None = None) -> GroupError:  # fmt: skip
        """A GroupError of the pass underway."""
        phase = self.fields.phase
        caller = f" of {self.fields.caller}" if self.fields.caller else ""
        where = f"rank {self.rank} of group {self.place.name!r}, call {self.call}{caller}, {phase}, {step}"
        return GroupError(
            f"{where}: {what}", rank=rank, call=self.call, phase=phase, step=step, field=field, values=values
        )

    def _tell_others(self, error: BaseException) -> None:
        """Leave a notice for ranks that wait, or will: this one takes no more calls. It names the rank that the error blames, by default this one."""
        if self._notice_key is not None:
            blamed = error.rank if isinstance(error, GroupError) and error.rank is not None else self.rank
            text = f"rank {self.rank} failed in call {self.call} ({self.fields.phase}): {type(error).__name__}: {str(error)[:500]}"
            leave_notice(self.place, self._notice_key, f"{blamed} {text}")

    def await_job(self, job: PendingWorks, step: str) -> None:
        """Wait for a job; raise GroupError where a peer is gone, or silent for the timeout, or any rank has left a notice."""
        lookouts: list[Lookout] = []

        def look() -> None:
            if not lookouts and self._notice_key is not None:
                lookouts.append(Lookout(self.place, self._notice_key))
            for lookout in lookouts:
                if lookout.seen is not None:
                    blamed, _, text = lookout.seen.partition(" ")
                    raise self.error(text, None if int(blamed) == self.rank else int(blamed), step)

        try:
            who = f"rank {self.rank} of group {self.place.name!r}, {step},"
            ended = self._patience.ended(job, self.timeout, who, look)
        finally:
            for lookout in lookouts:
                lookout.stop()
        if not ended:
            peer = job.peers[min(job.position, len(job.peers) - 1)]
            raise self.error(f"rank {peer} was silent for {self.timeout:g} s", peer, step)
        if job.error is not None:
            peer = job.peers[job.position]
            raise self.error(f"rank {peer} is gone: {str(job.error).splitlines()[0]}", peer, step) from job.error

    def submit(self, exchange: Exchange) -> None:
        """Let the waiter wait for it; for headers, `announce` says who waits."""
        self.unfinished.append(exchange)
        if exchange.label != "header":
            self._waiter.submit(exchange.job)

    def close(self) -> None:
        """Break off what is in flight, and end the waiter: the group is gone, or the process ends."""
        if self.failure is None and self.unfinished:
            self.failure = "the group was closed"
        jobs = [exchange.job for exchange in self.unfinished]
        jobs += [] if self.rendezvous is None else self.rendezvous.jobs
        for job in jobs:
            job.break_off()
        self.unfinished.clear()
        self._waiter.stop()


class Exchange:
    """Parcels in flight.

    1. Made: everything is posted, without waiting. 2. `wait`, once: all receives are complete, and sent tensors may change.
    """

    def __init__(
        self,
        calls: GroupCalls,
        label: str,
        sends: Sequence[Parcel],
        receives: Sequence[Parcel],
        kind: int,
        tag: int | None = None,
    ) -> None:
        self.calls, self.label = calls, label
        if kind != HEADERS:
            for peer, tensor in receives:
                calls.check_announced(kind, peer, tensor.numel() * tensor.element_size(), label)
        # Both ranks leave out empty tensors.
        incoming = [(peer, x) for peer, x in receives if x.numel()]
        outgoing = [(peer, x) for peer, x in sends if x.numel()]
        tag = calls.first_tag(calls.number) + kind if tag is None else tag
        sent, received = calls.posted.setdefault(tag, ([], []))
        parcels, works = (*incoming, *outgoing), list[Any]()
        try:
            for work in calls.place.post(incoming, outgoing, tag):
                works.append(work)
        except RuntimeError as error:
            peer = parcels[len(works)][0]
            raise calls.error(
                f"rank {peer} is gone: a message could not be posted: {str(error).splitlines()[0]}", peer, label
            ) from error
        sent += [(peer, _nbytes(x)) for peer, x in outgoing]
        received += [(peer, _nbytes(x)) for peer, x in incoming]
        self.job = PendingWorks([(peer, x, work) for (peer, x), work in zip(parcels, works, strict=True)])
        if works:
            calls.submit(self)
        if kind != HEADERS:
            note(TransportEvent("post", label))
            for peer, tensor in sends:
                note(TransportEvent("send", label, peer, _nbytes(tensor)))
        self._noted = kind != HEADERS

    def wait(self) -> None:
        """Wait until all receives are complete.

        Raises:
            GroupError: a peer is gone, or was silent for the timeout.
        """
        calls, job = self.calls, self.job
        if not job.works:
            return
        calls.await_job(job, self.label)
        calls.unfinished.remove(self)
        # The sent tensors were held for as long as they were read.
        job.tensors, job.works = [], []
        if self._noted:
            note(TransportEvent("arrive", self.label))


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
