"""`python -m benchmarks.buffer_figures`: what the manager promises and no stopwatch tells, as rows of `results/buffer-figures.csv`.

Memory that is retained over the live peak of traces, drawn and recorded, counted and resident; operations of many threads for the
CPU time of one and for that of as many over torch.empty; huge pages; what modules that share a pool hold; what options cost; and the
peak of a step with the manager over the same step without.
"""

import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import record
from benchmarks.buffer_traces import dilated_steps, every_trace, exact_key_pool, live_peak, replay, retained
from benchmarks.cases.buffer_steps import steps
from benchmarks.figures import Figure, append, run_together
from benchmarks.memory import ResidentPeak, growth_in_fresh_process
from longattn.bufmgr import ArenaAllocator, AttentionBufferManager, BufferType, MemoryPool

OVER_LIVE_PEAK, STEADY = 1.10, 1.02
THREADS, OPERATIONS = 16, 100_000
MORE_PEAK = 1.10
_ALWAYS_HELD = ArenaAllocator().floor_bytes  # nothing is promised for what is less at its peak
_CPU = torch.device("cpu")


def counted(passes: int = 3, recorded: bool = True) -> Iterator[Figure]:
    """What is held at most, first from an empty pool, then once all of it was seen before."""
    for name, trace in every_trace(recorded=recorded):
        live = live_peak(trace)
        first, *later = retained(trace, passes)
        beside = f"a pool with exact keys {exact_key_pool(trace) / live:.2f}; live peak {live / 2**20:.0f} MiB"
        over, steady = (OVER_LIVE_PEAK, STEADY) if live > _ALWAYS_HELD else (None, None)
        yield Figure("retained over the live peak", name, "ratio", first / live, beside, most=over)
        yield Figure("retained in steady state", name, "ratio", max(later) / live, beside, most=steady)


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
        live = live_peak(trace)
        if growth is not None:
            most = OVER_LIVE_PEAK if live > _ALWAYS_HELD else None
            yield Figure("resident over the live peak", name, "ratio", growth / live, most=most)


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


def huge_pages(mib: int = 64, turns: int = 20) -> Iterator[Figure]:
    """CPU time with huge pages asked for, over the system's own choice: of memory that is new each time, and of memory that comes back."""
    cost: dict[bool | None, dict[str, list[float]]] = {}
    for asked in (None, True) * 2:
        arena = ArenaAllocator(huge_pages=asked)
        manager = AttentionBufferManager(upstream=arena)
        slot = manager.prepare(BufferType.TEMP, (mib << 18,), torch.float32, _CPU)
        for use in ("first write", "write again"):
            slot.acquire().fill_(1.0)
            for _ in range(turns):
                if use == "first write":
                    manager.clear_cache()
                    arena.trim()
                began = time.process_time()
                slot.acquire().fill_(1.0)
                cost.setdefault(asked, {}).setdefault(use, []).append(time.process_time() - began)
    for use, ours in cost[True].items():
        least, others = min(ours), min(cost[None][use])
        beside = f"{least * 1e3:.2f} and {others * 1e3:.2f} ms"
        yield Figure("CPU time with huge pages over without", f"{mib} MiB, {use}", "ratio", least / others, beside)


def against_torch(operations: int = OPERATIONS // 4) -> Iterator[Figure]:
    """Operations of many threads for a CPU-second, over those that torch.empty gets from as many; the best of three turns each, in turn."""
    best = dict.fromkeys(_WAYS, 0.0)
    for _ in range(3):
        for setting, way in _WAYS.items():
            manager, done = AttentionBufferManager(), []
            work = [_operations(way(manager, n), operations, done) for n in range(THREADS)]
            began = time.process_time()
            run_together(work)
            best[setting] = max(best[setting], operations * THREADS / (time.process_time() - began))
    torchs = best.pop("torch.empty")
    for setting, ours in best.items():
        where, beside = (
            f"{THREADS} threads x {operations}, {setting}",
            f"torch.empty: {1e9 / torchs:.0f} ns an operation",
        )
        yield Figure(
            "operations for a CPU-second, over torch.empty's", where, "ratio", ours / torchs, beside, least=1.0
        )


def sharing(layers: int = 4) -> Iterator[Figure]:
    """The most bytes that managers of modules which run in turn hold over one pool, over those that they hold over a pool each."""
    trace = dilated_steps(rounds=4)
    held: list[int] = []
    for shared in (True, False):
        pools = [MemoryPool() for _ in range(1 if shared else layers)]
        peak = 0
        for manager in [AttentionBufferManager(upstream=pools[n % len(pools)]) for n in range(layers)]:
            for _ in replay(trace, manager):
                arenas = [pool.get_stats()["arena"] for pool in pools]
                peak = max(peak, sum(arena["in_use"] + arena["dirty"] for arena in arenas))
        held.append(peak)
    beside = f"{held[0] / 2**20:.0f} and {held[1] / 2**20:.0f} MiB"
    setting = f"{layers} managers, dilated steps"
    yield Figure("held over one pool, over a pool each", setting, "ratio", held[0] / held[1], beside, most=1.0)


_OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "enable_profiling": {"enable_profiling": True},
    "enable_profiling, not lightweight": {"enable_profiling": True, "lightweight": False},
    "adaptive_cache": {"adaptive_cache": True},
}


def options(operations: int = OPERATIONS) -> Iterator[Figure]:
    """CPU time of `allocate` and drop with what is off by default, over without; the best of three turns each, in turn."""
    best = dict.fromkeys(_OPTIONS, float("inf"))
    for _ in range(3):
        for name, chosen in _OPTIONS.items():
            take = _by_key(AttentionBufferManager(**chosen), BufferType.TEMP)
            began = time.process_time()
            _operations(take, operations, [])()
            best[name] = min(best[name], (time.process_time() - began) / operations)
    plain = best.pop("")
    for name, seconds in best.items():
        beside = f"{seconds * 1e9:.0f} and {plain * 1e9:.0f} ns"
        yield Figure("allocate and drop with an option, over without", name, "ratio", seconds / plain, beside)


GROUPS = {
    "counted": counted,
    "resident": resident,
    "threads": threads,
    "against-torch": against_torch,
    "huge-pages": huge_pages,
    "sharing": sharing,
    "options": options,
    "peaks": peaks,
}


def main() -> int:
    """Measure the groups that the command line names, or all; print them, and append them to the results."""
    for group in sys.argv[1:] or GROUPS:
        append("buffer-figures", GROUPS[group](), record.surroundings())
    return 0


if __name__ == "__main__":
    sys.exit(main())
