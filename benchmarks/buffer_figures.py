"""`python -m benchmarks.buffer_figures`: what the manager promises and no stopwatch tells, as rows of `results/buffer-figures.csv`.

Memory that is retained over the live peak of traces, drawn and recorded, counted and resident; operations of many threads for the
CPU time of one; and the peak of a step with the manager over the same step without.
"""

import functools
import sys
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks import record
from benchmarks.buffer_traces import every_trace, exact_key_pool, live_peak, replay, retained
from benchmarks.cases.buffer_steps import steps
from benchmarks.figures import Figure, append, run_together
from benchmarks.memory import ResidentPeak, growth_in_fresh_process
from longattn.bufmgr import AttentionBufferManager, BufferType, MemoryPool

OVER_LIVE_PEAK, STEADY = 1.10, 1.02
THREADS, OPERATIONS = 16, 100_000
MORE_PEAK = 1.10
_CPU = torch.device("cpu")


def counted(passes: int = 3, recorded: bool = True) -> Iterator[Figure]:
    """What is held at most, first from an empty pool, then once all of it was seen before."""
    for name, trace in every_trace(recorded=recorded):
        live = live_peak(trace)
        first, *later = retained(trace, passes)
        beside = f"a pool with exact keys {exact_key_pool(trace) / live:.2f}; live peak {live / 2**20:.0f} MiB"
        yield Figure("retained over the live peak", name, "ratio", first / live, beside, most=OVER_LIVE_PEAK)
        yield Figure("retained in steady state", name, "ratio", max(later) / live, beside, most=STEADY)


def resident() -> Iterator[Figure]:
    """The same as the system sees it: growth of resident memory while every page is written."""
    for name, trace in every_trace():
        manager = AttentionBufferManager(upstream=MemoryPool())
        manager.allocate("temp", (1 << 16,)).fill_(1.0)
        peak = ResidentPeak()
        peak.start()
        for _ in replay(trace, manager, touch=True):
            pass
        growth = peak.growth()
        if growth is not None:
            yield Figure("resident over the live peak", name, "ratio", growth / live_peak(trace), most=OVER_LIVE_PEAK)


Take = Callable[[], object]
_SHAPE = (4, 8, 64)


def _by_key(manager: AttentionBufferManager, kind: BufferType) -> Take:
    return functools.partial(manager.allocate, kind, _SHAPE, torch.float32, _CPU, False)


# How thread number n takes its buffers. The last is what torch itself keeps of its speed: nothing is promised for it.
_WAYS: dict[str, Callable[[AttentionBufferManager, int], Take]] = {
    "one key": lambda manager, n: _by_key(manager, BufferType.TEMP),
    "ten keys": lambda manager, n: _by_key(manager, list(BufferType)[n % len(BufferType)]),
    "a prepared slot each": lambda manager, n: manager.prepare(BufferType.TEMP, _SHAPE, torch.float32, _CPU).acquire,
    "torch.empty": lambda manager, n: functools.partial(torch.empty, _SHAPE, dtype=torch.float32),
}


def threads(operations: int = OPERATIONS) -> Iterator[Figure]:
    """Acquire and drop, operations for a CPU-second, beside one thread; the best of three turns each, in turn."""
    for setting, way in _WAYS.items():
        rates: dict[int, list[float]] = {1: [], THREADS: []}
        for _ in range(3):
            for count, measured in rates.items():
                manager, done = AttentionBufferManager(), []
                each = operations * THREADS // count
                work = [_operations(way(manager, n), each, done) for n in range(count)]
                began = time.process_time()
                run_together(work)
                measured.append(operations * THREADS / (time.process_time() - began))
                manager.check_valid()
                assert done == [each] * count, "a thread met an error"
        one, many = (max(measured) for measured in rates.values())
        beside = f"one thread: {1e9 / one:.0f} ns an operation; no error"
        least = None if setting == "torch.empty" else 0.9
        where = f"{THREADS} threads x {operations}, {setting}"
        yield Figure("operations for a CPU-second, over one thread's", where, "ratio", many / one, beside, least=least)


def _operations(take: Take, many: int, done: list[int]) -> Callable[[], None]:
    def work() -> None:
        for _ in range(many):
            take()
        done.append(many)  # a thread that met an error does not come here

    return work


def peaks() -> Iterator[Figure]:
    """Resident memory that one round of a step grows by, with the manager over without, each in a fresh process."""
    for step in steps(quick=False):
        ours, without = (growth_in_fresh_process(step, side, 2, quick=False) for side in ("ours", "peer"))
        if ours is None or without is None:
            return
        most = MORE_PEAK if "default" in step.labels.variant else None
        setting = f"{step.labels.variant}, {step.labels.direction}"
        beside = f"{ours:.3f} and {without:.3f} of q + k + v; the seeds say 1.7 to 2.8"
        yield Figure(
            "peak of a step, over the same without a manager", setting, "ratio", ours / without, beside, most=most
        )


GROUPS = {"counted": counted, "resident": resident, "threads": threads, "peaks": peaks}


def main() -> int:
    """Measure the groups that the command line names, or all; print them, and append them to the results."""
    for group in sys.argv[1:] or GROUPS:
        append("buffer-figures", GROUPS[group](), record.surroundings())
    return 0


if __name__ == "__main__":
    sys.exit(main())
