"""`python -m benchmarks.adaptive_figures`: whether caches that adapt their limits pay, as rows of `results/adaptive-figures.csv`.

Hit rates of a manager over the seeded traces of `buffer_traces`, with `adaptive_cache` and without, and the most bytes that its caches kept free.
"""

import sys
from collections.abc import Iterator

from benchmarks import record
from benchmarks.buffer_traces import TRACES, replay
from benchmarks.figures import Figure, append
from longattn.bufmgr import AttentionBufferManager, MemoryPool

_MIB = 1 << 20


def hit_rates(passes: int = 3) -> Iterator[Figure]:
    """Hits of a few passes over each trace, and free memory beside them."""
    for name, trace_of in TRACES.items():
        trace = trace_of()
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


def main() -> int:
    """Measure, print, and append to the results."""
    append("adaptive-figures", hit_rates(), record.surroundings())
    return 0


if __name__ == "__main__":
    sys.exit(main())
