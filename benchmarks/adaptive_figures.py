"""`python -m benchmarks.adaptive_figures`: whether caches that adapt, and steps that are learned, pay, as rows of `results/adaptive-figures.csv`.

Over the traces of `buffer_traces`. `limits`: hit rates with `adaptive_cache` and without, and the most bytes that caches kept free. `learning`: misses and
CPU time of recorded steps with a `StepLearner` and without, every buffer written, from the third step on; and how much of the requests it predicted.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from benchmarks import record
from benchmarks.buffer_traces import RECORDED, Event, every_trace, replay, replay_steps
from benchmarks.figures import Figure, append
from longattn.bufmgr import AttentionBufferManager, MemoryPool, StepLearner

_MIB = 1 << 20
_UNMEASURED = 2  # steps


def limits(passes: int = 3) -> Iterator[Figure]:
    """Hits of a few passes over each trace, and free memory beside them."""
    for name, trace in every_trace():
        results: list[tuple[float, int]] = []
        for adaptive in (False, True):
            manager = AttentionBufferManager(upstream=MemoryPool(), adaptive_cache=adaptive)
            most = 0
            for number in range(passes):
                for step, _ in enumerate(replay(trace, manager)):
                    if number == passes - 1 and step % 50 == 0:
                        most = max(most, manager.get_stats()["cached_bytes"])
            results.append((manager.get_stats()["cache_hit_rate"], most))
        (fixed, fixed_bytes), (adaptive_rate, adaptive_bytes) = results
        beside = f"fixed limits {fixed:.3f}; free at most {adaptive_bytes / _MIB:.0f} and {fixed_bytes / _MIB:.0f} MiB"
        yield Figure("hit rate with adaptive_cache", f"{name}, {passes} passes", "ratio", adaptive_rate, beside)


def learning(recorded: Mapping[str, Callable[[], list[list[Event]]]] = RECORDED, turns: int = 5) -> Iterator[Figure]:
    """Misses, which must be fewer, and CPU time, the best of a few turns each, in turn."""
    for name, steps_of in recorded.items():
        steps = steps_of()
        runs = {learned: [_run(steps, learned) for _ in range(turns)] for learned in (False, True)}
        (plain, learned), (seconds, slower) = (
            [fold(run[place] for run in runs[way]) for way in (False, True)] for place, fold in ((0, max), (1, min))
        )
        accuracy, free = runs[True][0][2], [runs[way][0][3] / _MIB for way in (False, True)]
        setting = f"{name}, {len(steps)} steps"
        beside = f"{learned:.0f} of {plain:.0f} misses; predicted {accuracy:.3f}; free after it {free[1]:.0f} and {free[0]:.0f} MiB"
        yield Figure(
            "misses with a StepLearner, over without", setting, "ratio", learned / max(plain, 1), beside, most=1.0
        )
        beside = f"{slower * 1e3:.0f} and {seconds * 1e3:.0f} ms"
        yield Figure("CPU time with a StepLearner, over without", setting, "ratio", slower / seconds, beside)


def _run(steps: Sequence[Sequence[Event]], learned: bool) -> tuple[float, float, float, float]:
    """Misses, CPU seconds, predicted share, and bytes that caches keep free at the end."""
    manager = AttentionBufferManager(upstream=MemoryPool())
    learner = StepLearner(manager) if learned else None
    before = began = 0.0
    for number, _ in enumerate(replay_steps(steps, manager, learner), start=1):
        if number == _UNMEASURED:
            before, began = manager.get_stats()["cache_misses"], time.process_time()
    seconds, stats = time.process_time() - began, manager.get_stats()
    accuracy = 0.0 if learner is None else learner.get_stats()["accuracy"]
    return stats["cache_misses"] - before, seconds, accuracy, stats["cached_bytes"]


GROUPS = {"limits": limits, "learning": learning}


def main() -> int:
    """Measure the groups that the command line names, or all; print them, and append them to the results."""
    for group in sys.argv[1:] or GROUPS:
        append("adaptive-figures", GROUPS[group](), record.surroundings())
    return 0


if __name__ == "__main__":
    sys.exit(main())
