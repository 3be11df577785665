"""`Waiter`: a thread that waits for what is in flight, so that the caller stays interruptible and decides how long it waits.

torch's `Work.wait` of a point-to-point message neither returns early for a signal nor ends without closing every connection of the group;
`is_completed` says nothing before a wait. So waits are in a thread of their own, without a limit, and the caller waits for the thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any

from torch import Tensor

from longattn.patterncache.progress import PATIENCE, progress

logger = logging.getLogger("longattn.attention")

_FOREVER = timedelta(days=365)
_SLICE = 0.25
"""Seconds: a signal's handler runs after so long at most."""


class PendingWorks:
    """Messages in flight, in the order in which they are waited for.

    Attributes:
        peers, tensors, works: of each message: the rank at its other end, what is sent or filled, torch's `Work`.
        position: messages that are complete. error: what the next one raised, or None.
    """

    def __init__(self, messages: Sequence[tuple[int, Tensor, Any]]) -> None:
        self.peers = [peer for peer, _, _ in messages]
        self.tensors = [tensor for _, tensor, _ in messages]
        self.works = [work for _, _, work in messages]
        self.position = 0
        self.error: RuntimeError | None = None
        self._ended: SimpleQueue[None] = SimpleQueue()

    def run(self) -> None:
        """Wait for every message, in the waiter's thread."""
        try:
            while self.position < len(self.works):
                self.works[self.position].wait(_FOREVER)
                self.position += 1
        except RuntimeError as error:
            self.error = error.with_traceback(None)
        self._ended.put(None)

    def start(self) -> None:
        """Run in a thread of its own."""
        threading.Thread(target=self.run, name="longattn waiter", daemon=True).start()

    def ended_within(self, seconds: float, between: Callable[[], None] | None = None) -> bool:
        """Whether `run` ended; waits so long at most, in slices, and handles signals meanwhile. between: called after each slice."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self._ended.get(timeout=max(0.0, min(_SLICE, deadline - time.monotonic())))
            except Empty:
                if time.monotonic() >= deadline:
                    return False
                if between is not None:
                    between()
            else:
                self._ended.put(None)
                return True

    def break_off(self) -> None:
        """End `run` with an error: every connection of the group closes, here and at its peers."""
        if self.position < len(self.works) and self.error is None:
            try:
                self.works[self.position].wait(timedelta(milliseconds=1))
            except RuntimeError as error:
                self.error = self.error or error.with_traceback(None)


class Patience:
    """Of one group: the first long wait says for whom, once."""

    def __init__(self) -> None:
        self._said = False

    def ended(self, job: PendingWorks, seconds: float, who: str, between: Callable[[], None] | None = None) -> bool:
        """Whether a job ends within the time; the rest as for `ended_within`."""
        early = min(PATIENCE, seconds)
        if self._said or early == seconds:
            return job.ended_within(seconds, between)
        if job.ended_within(early, between):
            return True
        self._said = True
        peer = job.peers[min(job.position, len(job.peers) - 1)]
        with progress(f"{who} waits for rank {peer}, for up to {seconds:g} s", logger, after=0):
            return job.ended_within(seconds - early, between)


class Waiter:
    """Runs jobs one after the other in a thread, which begins with the first one and ends with `stop`."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[PendingWorks | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: PendingWorks) -> None:
        """Run a job after those that were submitted before."""
        if self._thread is None:
            self._thread = threading.Thread(target=_serve, args=(self._jobs,), name="longattn waiter", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def stop(self, seconds: float = 1.0) -> None:
        """End the thread after its jobs."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(seconds)
            self._thread = None


def _serve(jobs: SimpleQueue[PendingWorks | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()
        # Its tensors are not kept until the next one comes.
        del job
