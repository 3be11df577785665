"""Learns what a step allocates through a manager, and readies the memory of the next one before it begins."""

# A learner sees its manager's requests and readies blocks in its caches.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from longattn.bufmgr.checks import check_kind
from longattn.bufmgr.leasing.lease import Lease
from longattn.bufmgr.manager import AttentionBufferManager
from longattn.bufmgr.spec import BufferType

_STEPS_KEPT = 3


class ExpectedRequest(NamedTuple):
    """One request for host memory: its type, its bytes, and how many of that type and size were in use then, this one included."""

    kind: BufferType
    nbytes: int
    in_use: int


Step = tuple[ExpectedRequest, ...]


def _as_the_last(steps: Sequence[Step]) -> Step:
    return steps[-1]


def _as_the_last_but_one(steps: Sequence[Step]) -> Step:
    return steps[-2] if len(steps) > 1 else steps[-1]


def _growing(steps: Sequence[Step]) -> Step:
    """Each request as much larger than the last as that one was over the one before, as with caches that grow by a token."""
    last, before = steps[-1], _as_the_last_but_one(steps)
    if [request.kind for request in last] != [request.kind for request in before]:
        return last
    pairs = zip(last, before, strict=True)
    return tuple(ExpectedRequest(now.kind, max(1, 2 * now.nbytes - then.nbytes), now.in_use) for now, then in pairs)


_RULES: tuple[Callable[[Sequence[Step]], Step], ...] = (_as_the_last, _as_the_last_but_one, _growing)


def _agreement(expected: Step, came: Step) -> int:
    """How many requests that came were expected, by type and bytes, in whatever order."""
    counts = [Counter((request.kind, request.nbytes) for request in step) for step in (expected, came)]
    return (counts[0] & counts[1]).total()


class StepLearner:
    """Predicts the requests of each step from the last three, and takes their memory from the upstream before the step begins.

        learner = StepLearner(manager)
        for batch in data:
            with learner.step():
                train(batch)

    Three rules predict: as the last step, as the last but one, and each request as much larger than the last as that one had grown.
    The rule that would have predicted the latest step best is taken, if it would have predicted half of it. What is readied stays within max_cached_mb of its type; the limit
    of buffers rises up to four times where a step needs more at once, and goes back when memory gets short.

    Inside a step every request to the manager takes the slow path, some microseconds more each, and what is readied waits in caches: see
    the rows of `python -m benchmarks.adaptive_figures` for whether that pays. Raises TypeError for what is no manager.
    """

    def __init__(self, manager: AttentionBufferManager) -> None:
        check_kind("manager", manager, AttentionBufferManager, "an AttentionBufferManager")
        self._manager = manager
        self._steps: deque[Step] = deque(maxlen=_STEPS_KEPT)
        self._counts = dict.fromkeys(("steps", "requests", "misses", "readied"), 0)
        self._predicted = self._predictable = 0

    def predict(self) -> Step:
        """Return the requests that the next step is expected to make, in order; none before the first step, and none where the best rule
        would have predicted less than half of the latest step.
        """
        steps = tuple(self._steps)
        if len(steps) < 2:
            return steps[0] if steps else ()
        agreements = [_agreement(rule(steps[:-1]), steps[-1]) for rule in _RULES]
        best = max(agreements)
        return _RULES[agreements.index(best)](steps) if 2 * best >= len(steps[-1]) else ()

    @contextmanager
    def step(self) -> Generator[None]:
        """A context for one step. Raises RuntimeError while another step over the same manager is open."""
        manager = self._manager
        if manager.watch_request is not None:
            raise RuntimeError("step must be closed to begin another one over its manager, got an open one")
        expected = self.predict()
        self._counts["readied"] += self._ready(expected)
        came: list[ExpectedRequest] = []
        misses = manager.get_stats()["cache_misses"]
        manager.open_scope()
        manager.watch_request = lambda lease: came.append(self._describe(lease))
        try:
            yield
        finally:
            manager.watch_request = None
            manager.open_scopes -= 1
            step = tuple(came)
            if self._counts["steps"]:
                self._predictable += len(step)
                self._predicted += _agreement(expected, step)
            self._counts["steps"] += 1
            self._counts["requests"] += len(step)
            self._counts["misses"] += manager.get_stats()["cache_misses"] - misses
            self._steps.append(step)

    def get_stats(self) -> dict[str, float]:
        """`steps requests misses readied` are counts (of blocks, the last); `accuracy` is the share, 0 to 1, of the requests since the second
        step that were predicted by type and bytes.
        """
        return {**self._counts, "accuracy": self._predicted / self._predictable if self._predictable else 0.0}

    def _describe(self, lease: Lease) -> ExpectedRequest:
        same = [other for other in self._manager._book.outstanding(lease.kind) if other.nbytes == lease.nbytes]
        return ExpectedRequest(lease.kind, lease.nbytes, len(same))

    def _ready(self, expected: Step) -> int:
        at_once: Counter[tuple[BufferType, int]] = Counter()
        for kind, nbytes, in_use in expected:
            at_once[kind, nbytes] = max(at_once[kind, nbytes], in_use)
        return self._manager.ready(at_once.elements())
