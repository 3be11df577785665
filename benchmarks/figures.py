"""`python -m benchmarks.figures`: what the cache promises and no stopwatch tells, as rows of `benchmarks/results/cache-figures.csv`.

Hit ratios beside Belady's, who knows the future, and beside the best fixed set of keys, which no cache without that knowledge can pick;
builds per key under threads; hits of many threads for the CPU time of one; the hit rate of a training loop; bytes of plans.
"""

import csv
import io
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from benchmarks import record
from benchmarks.cases.cache import KEY, PATTERN, VALUE
from longattn.attention import RingDilatedAttentionV3
from longattn.patterncache import BlockSparse, PatternCache, Rectangle, Span, plan_to_bytes, reset_global_pattern_cache
from longattn.patterncache.testing import TRACES, belady

OF_BELADY = 0.85
THREADS = 32


@dataclass(frozen=True)
class Figure:
    """One figure. `ours` should be at least `least` and at most `most`, where they are given; `beside` says what others reach."""

    name: str
    setting: str
    unit: str
    ours: float
    beside: str = ""
    least: float | None = None
    most: float | None = None

    @property
    def verdict(self) -> str:
        """`met`, `missed`, or nothing where nothing was promised."""
        if self.least is None and self.most is None:
            return ""
        low, high = self.least is not None and self.ours < self.least, self.most is not None and self.ours > self.most
        return "missed" if low or high else "met"


def hit_ratios(sizes: Sequence[int] = (10, 20, 50, 100, 200, 400)) -> Iterator[Figure]:
    """Shares of Belady's hits, and never fewer hits than LRU."""
    for name, trace_of in TRACES.items():
        trace = trace_of(1)
        requests = Counter(trace)
        for size in sizes:
            best = belady(trace, size)
            ours, lru = (_hit_rate(trace, size, policy) for policy in ("s3fifo", "lru"))
            fixed = sum(times - 1 for _, times in requests.most_common(size)) / len(trace)
            setting = f"{name}, {size} entries of {len(requests)} keys"
            beside = f"lru {lru / best:.3f}; best fixed set {fixed / best:.3f}; Belady hits {best:.3f}"
            promised = OF_BELADY if name != "decode lengths" else None
            yield Figure("hits, share of Belady's", setting, "ratio", ours / best, beside, least=promised)
            yield Figure("hits, over those of LRU", setting, "ratio", ours / lru, least=1.0)


def _hit_rate(trace: Sequence[Hashable], size: int, policy: str) -> float:
    cache = PatternCache(size, policy)
    for key in trace:
        cache.get_or_build(key, int)
    return cache.get_stats()["hit_rate"]


def builds() -> Iterator[Figure]:
    """Threads that ask for one key at once."""
    cache, built, barrier = PatternCache(), [], threading.Barrier(THREADS)

    def ask() -> None:
        barrier.wait()
        for key in range(100):
            cache.get_or_build(key, lambda key=key: built.append(key) or time.sleep(0.001))

    run_together([ask] * THREADS)
    yield Figure("builds", f"{THREADS} threads, 100 keys", "per key", len(built) / 100, least=1, most=1)


def threads(many: int = 2_000_000) -> Iterator[Figure]:
    """Hits for a CPU-second, beside one thread; the best of five turns each, in turn."""
    rates: dict[int, list[float]] = {1: [], THREADS: []}
    for _ in range(5):
        for count, measured in rates.items():
            cache = PatternCache()
            cache.get_or_build(KEY, lambda: VALUE)
            began = time.process_time()
            run_together([_asking(cache, many // count)] * count)
            measured.append(many / (time.process_time() - began))
    one, all_of_them = (max(measured) for measured in rates.values())
    beside = f"one thread: {1e9 / one:.0f} ns a hit"
    yield Figure(
        "hits for a CPU-second, over one thread's", f"{THREADS} threads", "ratio", all_of_them / one, beside, least=0.9
    )


def _asking(cache: PatternCache, many: int) -> Callable[[], None]:
    def ask() -> None:
        for _ in range(many):
            cache.get_or_build(KEY, object)

    return ask


def run_together(targets: Sequence[Callable[[], None]]) -> None:
    """Each in a thread of its own; returns when all have ended."""
    started = [threading.Thread(target=target) for target in targets]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()


def training(steps: int = 400) -> Iterator[Figure]:
    """A module's own view over steps of batches whose length varies, padded to multiples of 16, forward and backward."""
    rng, model = np.random.default_rng(0), RingDilatedAttentionV3((16, 32, 64), (1, 2, 4), use_pattern_cache=True)
    reset_global_pattern_cache()
    for _ in range(steps):
        length = int(np.clip(np.exp(rng.normal(4.5, 0.4)), 16, 512)) // 16 * 16
        q, k, v = (torch.randn(1, length, 4, 8, requires_grad=True) for _ in range(3))
        model(q, k, v).sum().backward()
    view = model._pattern_cache
    assert view is not None
    rate = view.get_stats()["hit_rate"]
    yield Figure(
        "hit rate of a training loop",
        f"{steps} steps, lengths in steps of 16",
        "ratio",
        rate,
        "the seeds say 0.9",
        least=0.9,
    )


def plan_bytes() -> Iterator[Figure]:
    """What a plan takes, as it would be sent; and how far lists are packed."""
    plan = PATTERN.plan(Rectangle(8, Span(0, 1 << 20), Span(0, 1 << 20)))
    yield Figure("bytes of a plan", "dilated, 1048576 tokens", "bytes", len(plan_to_bytes(plan)), most=10_000)
    mask = np.random.default_rng(0).random((1024, 1024)) < 0.1
    cache, pattern = PatternCache(), BlockSparse(64, mask)
    cache.get_or_build("blocks", lambda: pattern.plan(Rectangle(1, Span(0, 65536), Span(0, 65536))))
    yield Figure("compression", "1048576 block cells, 10 % seen", "ratio", cache.get_stats()["compression"])


GROUPS = (hit_ratios, builds, threads, training, plan_bytes)


def append(name: str, figures: Iterable[Figure], where: record.Surroundings) -> None:
    """Print figures as they come, and append each to `benchmarks/results/<name>.csv`."""
    path = record.RESULTS / f"{name}.csv"
    for figure in figures:
        row = {**asdict(figure), "ours": round(figure.ours, 4), "verdict": figure.verdict, **asdict(where)}
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(row), lineterminator="\n")
        if not path.exists():
            writer.writeheader()
        writer.writerow(row)
        with path.open("a") as file:
            file.write(text.getvalue())
        print(figure.name, figure.setting, row["ours"], figure.unit, figure.beside, figure.verdict, flush=True)


def main() -> int:
    """Measure all figures, print them, and append them to the results."""
    append("cache-figures", (figure for group in GROUPS for figure in group()), record.surroundings())
    return 0


if __name__ == "__main__":
    sys.exit(main())
