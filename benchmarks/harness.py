"""The stopwatch: interleaved pairs in one process, behind a gate.

`measure` runs ours and the peer's call in turn (A B A B ...), so that a change of the machine's speed hits both, and
reports medians with the 20th and 80th percentile. CPU time is the process's, summed over all of its threads; wall time
stands beside it. Threads that wait for work spin for a while after a call, libgomp's for milliseconds, and would be
charged to whoever runs next: a sample begins once they sleep. Nothing is reported while the experiment's own correctness check is red.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.experiment import Experiment
from benchmarks.memory import growth_in_fresh_process


class RedGateError(RuntimeError):
    """The correctness check failed, so there is nothing to report. The message lists every failure."""


@dataclass(frozen=True)
class Sample:
    """Milliseconds of one call: `cpu` summed over all threads of the process, `wall` as a clock on the wall."""

    cpu: float
    wall: float


@dataclass(frozen=True)
class Summary:
    """Median, 20th and 80th percentile of CPU milliseconds, and the median of wall milliseconds."""

    cpu: float
    cpu_p20: float
    cpu_p80: float
    wall: float
    samples: int


@dataclass(frozen=True)
class Outcome:
    """One measured experiment. Growth is peak memory over q+k+v; None where it was not measured."""

    ours: Summary
    peer: Summary
    our_growth: float | None
    peer_growth: float | None

    @property
    def ratio(self) -> float:
        """The peer's median CPU time over ours: above 1, ours is faster."""
        return self.peer.cpu / self.ours.cpu


@dataclass(frozen=True)
class Effort:
    """How much to measure: at least `min_pairs`, at most `max_pairs`, no new pair after `seconds`."""

    warmups: int = 1
    min_pairs: int = 3
    max_pairs: int = 9
    seconds: float = 40.0
    growth: bool = True
    threads: int = 2
    quick: bool = False


WAITING = "asleep"
"""What rows say of threads that wait for work: samples begin once they sleep. Rows that say "spinning" were measured before that was so."""

_GLANCE, _PATIENCE = 0.002, 5.0


def until_asleep(patience: float = _PATIENCE) -> None:
    """Return once no thread of this process computes any more.

    Raises:
        RuntimeError: one still does after `patience` seconds.
    """
    end = time.perf_counter() + patience
    while True:
        wall, cpu = time.perf_counter(), time.process_time()
        time.sleep(_GLANCE)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        if cpu < wall / 4:
            return
        if time.perf_counter() > end:
            raise RuntimeError(
                f"a thread of this process still computes {patience:g} s after the last call: it would be charged to the next one "
                "(OMP_WAIT_POLICY=active has idle threads spin without end)"
            )


def timed(call: Callable[[], object]) -> Sample:
    """One call, with threads asleep and the garbage collector out of the way; what it returns is dropped after the clock stops."""
    gc.collect()
    until_asleep()
    gc.disable()
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    finally:
        gc.enable()
    del result
    return Sample(cpu=cpu * 1e3, wall=wall * 1e3)


def summarize(samples: Sequence[Sample]) -> Summary:
    """Medians and percentiles of at least one sample; percentiles are interpolated between neighbours."""
    cpu = sorted(sample.cpu for sample in samples)
    return Summary(
        cpu=statistics.median(cpu),
        cpu_p20=_quantile(cpu, 0.2),
        cpu_p80=_quantile(cpu, 0.8),
        wall=statistics.median(sample.wall for sample in samples),
        samples=len(samples),
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def interleave(
    ours: Callable[[], object], peer: Callable[[], object], effort: Effort
) -> tuple[list[Sample], list[Sample]]:
    """Warm both up, then time them in turn: ours, peer, ours, peer, ...

    Returns:
        Samples of ours and of the peer, equally many.
    """
    for _ in range(effort.warmups):
        ours()
        peer()
    mine: list[Sample] = []
    theirs: list[Sample] = []
    # The collection before each call looks at what came after this line, not at all of torch's modules every time.
    gc.freeze()
    try:
        end = time.perf_counter() + effort.seconds
        while len(mine) < effort.max_pairs and (len(mine) < effort.min_pairs or time.perf_counter() < end):
            mine.append(timed(ours))
            theirs.append(timed(peer))
    finally:
        gc.unfreeze()
    return mine, theirs


def measure(experiment: Experiment, effort: Effort) -> Outcome:
    """Check the gate, then time both sides, then measure the memory of each in a fresh process.

    Raises:
        RedGateError: the experiment's check reported failures; nothing was timed.
        RuntimeError: a fresh process failed.
    """
    failures = experiment.check()
    if failures:
        raise RedGateError(f"{experiment.key}: " + "; ".join(failures))
    mine, theirs = interleave(experiment.prepare("ours").call, experiment.prepare("peer").call, effort)
    growths: list[float | None] = [None, None]
    if effort.growth:
        growths = [growth_in_fresh_process(experiment, side, effort.threads, effort.quick) for side in ("ours", "peer")]
    return Outcome(ours=summarize(mine), peer=summarize(theirs), our_growth=growths[0], peer_growth=growths[1])
