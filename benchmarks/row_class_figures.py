"""`python -m benchmarks.row_class_figures`: what the native row would lose with the row classes of the Triton rows.

Both cut the query rows of a plan into classes that meet the same tiles (ADR 0031). Here the classes that the Triton rows stream as arrays are
turned into jobs of the native row, and the same call runs over both lowerings, in turn. Rows go to `benchmarks/results/row-classes.csv`.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import record
from benchmarks.cases.attention import RATES, SEGMENTS
from benchmarks.figures import Figure, append
from longattn.kernels import prepare
from longattn.kernels.native import row
from longattn.kernels.native.lowering import Job, Lowered, RowSet, _head_classes, _in_phases, _jobs
from longattn.kernels.native.progressions import PeriodicRows
from longattn.kernels.triton.row_classes import FAR, RowRuns, row_classes
from longattn.patterncache import Dilated, Pattern, Plan, Rectangle, Span
from longattn.patterncache.indices import Affine
from longattn.patterncache.plan import Band

HEADS, HEAD_DIM, ROUNDS = 8, 64, 7


def from_periods(plan: Plan) -> Lowered:
    """As the native row lowers it, with nothing kept."""
    return _in_phases(plan, list(_jobs(plan)))


def from_arrays(plan: Plan) -> Lowered:
    """The same plan in the row classes of the Triton rows, one job for each."""
    jobs = []
    for heads, branches in _head_classes(plan):
        members = [(0, branch) for branch in branches]
        unique = all(branch.band is None for branch in branches)  # as those rows ask for it
        for each in row_classes(members, own_keys=False, unique=unique):
            keys = tuple(_row_set(each.met, i) for i in range(len(each.met)))
            jobs.append(Job(heads, 1, _row_set(each.owned, 0, banded=False), keys))
    return _in_phases(plan, [jobs])


def _row_set(runs: RowRuns, i: int, banded: bool = True) -> RowSet:
    start, step, count, times = (int(column[i]) for column in (runs.start, runs.step, runs.count, runs.times))
    index = Affine(start, 1, 0, count, step) if times == 1 else PeriodicRows(start, step, (0,), (times,), count)
    low, high = int(runs.low[i]), int(runs.high[i])
    band = Band(None if low <= -FAR else low, None if high >= FAR else high) if banded else Band()
    return RowSet(index, (int(runs.origin[i]), int(runs.scale[i])), band)


def pairs(lowered: Lowered) -> int:
    """(query, key) products that the jobs ask for, before bands."""
    return sum(
        job.heads.length * job.tiles * job.queries.index.count * sum(keys.index.count for keys in job.keys)
        for phase in lowered.phases
        for job in phase
    )


def medians(tasks: list[Callable[[], object]]) -> list[float]:
    """CPU milliseconds of each, interleaved; the first round warms up."""
    spent: list[list[float]] = [[] for _ in tasks]
    for _ in range(ROUNDS + 1):
        for task, times in zip(tasks, spent, strict=True):
            began = time.process_time()
            task()
            times.append((time.process_time() - began) * 1e3)
    return [statistics.median(times[1:]) for times in spent]


def figures(length: int = 8192) -> Iterator[Figure]:
    """Arrays over periods: pairs, time to lower, time of a call."""
    generator = torch.Generator().manual_seed(0)
    for causal in (False, True):
        pattern = Dilated(SEGMENTS, RATES, causal=causal)
        plan = pattern.plan(Rectangle(HEADS, Span(0, length), Span(0, length)))
        periods, arrays = from_periods(plan), from_arrays(plan)
        setting = f"LongNet {length} {'causal' if causal else 'full'}"
        yield Figure("pairs of arrays over those of periods", setting, "ratio", pairs(arrays) / pairs(periods))
        ours, theirs = medians([lambda plan=plan: from_periods(plan), lambda plan=plan: from_arrays(plan)])
        yield Figure("time to lower from arrays over periods", setting, "ratio", theirs / ours, f"{ours:.2f} ms")
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = (torch.randn(1, length, HEADS, HEAD_DIM, generator=generator).to(dtype) for _ in range(3))
            ours, theirs = medians(
                [bound_call(q, k, v, pattern, 0.125, periods), bound_call(q, k, v, pattern, 0.12500001, arrays)]
            )
            label = f"{setting} {str(dtype).removeprefix('torch.')}"
            yield Figure("time of a call over arrays over periods", label, "ratio", theirs / ours, f"{ours:.1f} ms")


def bound_call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, scale: float, lowered: Lowered
) -> Any:
    """The call bound to these jobs. Its scale makes it a signature of its own, for the memo would give one call to both."""
    with patch.object(row, "lower", lambda plan: lowered):
        prepared = prepare(pattern, q, k, v, softmax_scale=scale, backend="native")
        for _ in range(2):  # jobs are bound at the second call
            prepared(q, k, v)
    return lambda: prepared(q, k, v)


def main() -> int:
    """Measure all figures, print them, and append them to the results."""
    torch.set_num_threads(1)
    append("row-classes", figures(), record.surroundings())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
