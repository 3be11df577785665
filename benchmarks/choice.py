"""`python -m benchmarks.choice`: whether the row that is chosen is the best one; rows of `benchmarks/results/choice.csv`.

Every row of the table that can serve a problem is timed by name, in turn with dense SDPA and compiled FlexAttention. Regret is the
chosen row's CPU time over the best of those that compute the same: the rows, and dense SDPA where the pattern is dense. Asked: a median
regret of at most 1.02 and a worst of 1.10; never over 1.05 times dense SDPA's where the pattern is dense; less than dense SDPA's from
2048 tokens on where at most half of the pairs are seen. The gate holds every contender to the float64 oracle first.
"""

import argparse
import csv
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import gate, record
from benchmarks.choice_problems import Problem, flex, problems, sdpa, tiny
from benchmarks.gate import Attention
from benchmarks.harness import WAITING, Sample, summarize, timed
from longattn.attention import pattern_attention
from longattn.kernels import explain

MEDIAN, WORST, OVER_DENSE = 1.02, 1.10, 1.05
ROUNDS, HOPELESS, CHECKED_ROWS = 5, 2.5, 16
LEAST_MS, MOST_CALLS, SHORT_MS = 10.0, 200, 10.0
"""CPU time of a sample, in so many calls at most: short calls are repeated. Below which a first call is short."""


@dataclass(frozen=True)
class Line:
    """One contender of one problem. `regret` and `verdict` stand beside the chosen row; times are CPU and wall milliseconds."""

    problem: str
    dtype: str
    seq_len: int
    queries: int
    heads: int
    head_dim: int
    direction: str
    seen: float
    contender: str
    cpu_ms: float
    cpu_p20: float
    cpu_p80: float
    wall_ms: float
    samples: int
    expected_ms: float | None
    chosen: bool
    regret: float | None
    verdict: str
    where: record.Surroundings
    waiting: str


def contenders(problem: Problem, with_flex: bool) -> tuple[dict[str, Attention], str, dict[str, float | None]]:
    """Everything that is timed, the name of the row that a call without `backend` takes, and expected milliseconds."""
    shape = (1, problem.queries, problem.heads, problem.head_dim)
    keys = (1, problem.seq_len, problem.heads, problem.head_dim)
    q, k, v, _ = problem.tensors()
    with torch.no_grad():
        pattern_attention(q, k, v, problem.pattern)  # measures what has no figures yet
    options = {"dtype": q.dtype, "requires_grad": problem.direction != "forward"}
    explanation = explain(problem.pattern, shape, keys, **options)
    rivals: dict[str, Attention] = {name: _by(problem, name) for name, reasons in explanation.rows if not reasons}
    if explanation.backend is None:
        raise ValueError(f"no row serves {problem.key}")
    rivals["dense SDPA"] = sdpa(problem)
    compiled = flex(problem) if with_flex else None
    if compiled is not None:
        rivals["FlexAttention"] = compiled
    times = {name: None if seconds is None else seconds * 1e3 for name, seconds, _ in explanation.expected}
    return rivals, explanation.backend, times


def _by(problem: Problem, backend: str) -> Attention:
    return lambda q, k, v: pattern_attention(q, k, v, problem.pattern, backend=backend)


def check(problem: Problem, rivals: dict[str, Attention]) -> list[str]:
    """Every contender that computes the pattern, on sampled rows beside float64."""
    if problem.queries < problem.seq_len:
        return _check_short(problem, rivals)
    gradients = problem.direction != "forward"
    rows = gate.sampled_rows(problem.seq_len, (), CHECKED_ROWS)
    tensors = problem.tensors()
    truth = gate.oracle(*tensors, problem.pattern, rows)
    failures = []
    for name, attention in _computing_it(problem, rivals).items():
        errors = gate.errors(attention, *tensors, truth, gradients=gradients)
        failures += gate.red(name, errors, tensors[0].dtype)
    return failures


def _check_short(problem: Problem, rivals: dict[str, Attention]) -> list[str]:
    q, k, v, _ = problem.tensors()
    truth = sdpa(problem)(q.double(), k.double(), v.double())
    errors = {name: gate.relative_error(call(q, k, v), truth) for name, call in rivals.items()}
    return [failure for name, error in errors.items() for failure in gate.red(name, {"out": error}, q.dtype)]


def _computing_it(problem: Problem, rivals: dict[str, Attention]) -> dict[str, Attention]:
    return {name: call for name, call in rivals.items() if problem.dense or name != "dense SDPA"}


def time_in_turn(problem: Problem, rivals: dict[str, Attention], rounds: int) -> dict[str, list[Sample]]:
    """Samples of each contender, round by round; whoever takes several times as long as the best is timed once."""
    calls = {name: _call(problem, attention) for name, attention in rivals.items()}
    # The collection before each sample looks at what came after this line, not at all of torch's modules every time.
    gc.freeze()
    try:
        # The gate has run everything once, but without gradients: what is compiled is compiled again where they may be wanted.
        if "FlexAttention" in calls:
            calls["FlexAttention"]()
        first = {name: _first_sample(call) for name, call in calls.items()}
        best = min(sample.cpu for sample in first.values())
        close = [name for name, sample in first.items() if sample.cpu <= HOPELESS * best]
        samples = {name: [] if name in close else [sample] for name, sample in first.items()}
        for _ in range(rounds):
            for name in close:
                many = max(1, min(MOST_CALLS, int(LEAST_MS / first[name].cpu)))
                sample = timed(_repeated(calls[name], many))
                samples[name].append(Sample(sample.cpu / many, sample.wall / many))
    finally:
        gc.unfreeze()
    return samples


def _first_sample(call: Callable[[], object]) -> Sample:
    """Of a short call the third: the second one of a signature is bound to its kernel, which costs more than the work."""
    sample = timed(call)
    for _ in range(2 if sample.cpu < SHORT_MS else 0):
        sample = timed(call)
    return sample


def _repeated(call: Callable[[], object], times: int) -> Callable[[], object]:
    def run() -> None:
        for _ in range(times):
            call()

    return run


def _call(problem: Problem, attention: Attention) -> Callable[[], object]:
    q, k, v, grad = problem.tensors()
    if problem.direction == "forward":
        return lambda: attention(q, k, v)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    return lambda: torch.autograd.grad(attention(*inputs), inputs, grad)


def verdict(problem: Problem, chosen: str, cpu: dict[str, float]) -> tuple[float, str]:
    """(regret, `met` or what was missed) from median CPU times."""
    rivals = [name for name in cpu if name != "FlexAttention" and (problem.dense or name != "dense SDPA")]
    best = min(rivals, key=cpu.__getitem__)
    regret, over = cpu[chosen] / cpu[best], cpu[chosen] / cpu["dense SDPA"]
    missed = []
    if regret > WORST:
        missed.append(f"regret {regret:.2f} > {WORST:g}, {best} is faster")
    if problem.dense and over > OVER_DENSE:
        missed.append(f"{over:.2f} of dense SDPA > {OVER_DENSE:g}")
    if problem.seen <= 0.5 and problem.queries >= 2048 and over >= 1:
        missed.append(f"{over:.2f} of dense SDPA, not faster")
    return regret, "missed: " + "; ".join(missed) if missed else "met"


def lines(problem: Problem, rounds: int, where: record.Surroundings, with_flex: bool = True) -> list[Line]:
    """Measure a problem.

    Raises:
        RuntimeError: a contender is not within the oracle's tolerance.
    """
    rivals, chosen, expected = contenders(problem, with_flex)
    failures = check(problem, rivals)
    if failures:
        raise RuntimeError(f"{problem.key}: " + "; ".join(failures))
    summaries = {name: summarize(some) for name, some in time_in_turn(problem, rivals, rounds).items()}
    regret, said = verdict(problem, chosen, {name: summary.cpu for name, summary in summaries.items()})
    return [
        Line(
            problem.name,
            problem.dtype,
            problem.seq_len,
            problem.queries,
            problem.heads,
            problem.head_dim,
            problem.direction,
            round(problem.seen, 4),
            name,
            round(summary.cpu, 3),
            round(summary.cpu_p20, 3),
            round(summary.cpu_p80, 3),
            round(summary.wall, 3),
            summary.samples,
            None if expected.get(name) is None else round(expected[name] or 0.0, 3),
            name == chosen,
            round(regret, 3) if name == chosen else None,
            said if name == chosen else "",
            where=where,
            waiting=WAITING,
        )
        for name, summary in summaries.items()
    ]


def recorded(path: Path, where: record.Surroundings) -> set[tuple[str, ...]]:
    """Problems that the file has from this commit, processor and number of threads."""
    rows = csv.DictReader(path.read_text().splitlines()) if path.exists() else []
    here = {"cpu_model": where.cpu_model, "commit": where.commit, "threads": str(where.threads)}
    return {_known_by(row) for row in rows if here.items() <= row.items()}


def _known_by(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[key] for key in ("problem", "dtype", "seq_len", "queries", "heads", "head_dim", "direction"))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for, append it, and say how well the choice does. 1 where a gate is red."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choice", description=main.__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="problems whose key contains TEXT")
    parser.add_argument("--resume", action="store_true", help="leave out what this commit has recorded on this machine")
    parser.add_argument("--list", action="store_true", help="print the problems' keys and stop")
    parser.add_argument("--quick", action="store_true", help="tiny problems, standard output only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--without-flex", action="store_true", help="leave FlexAttention out: it is compiled for each problem"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no new problem after so long")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    where, path = record.surroundings(), arguments.results / "choice.csv"
    done = recorded(path, where) if arguments.resume else set()
    regrets, green = [], True
    end = time.monotonic() + 60 * arguments.minutes
    for problem in tiny() if arguments.quick else problems():
        if not all(text in problem.key for text in arguments.only):
            continue
        if arguments.list:
            print(problem.key)
            continue
        if _known_by({k: str(v) for k, v in asdict(problem).items()} | {"problem": problem.name}) in done:
            continue
        if time.monotonic() > end:
            print(f"{arguments.minutes:g} minutes are over; --resume goes on with {problem.key}", flush=True)
            break
        try:
            measured = lines(problem, arguments.rounds, where, not arguments.without_flex)
        except RuntimeError as red:
            print(f"RED, not reported: {red}", file=sys.stderr, flush=True)
            green = False
            continue
        for line in measured:
            if not arguments.quick:
                record.append(line, path)
            if line.regret is not None:
                regrets.append(line.regret)
        shown = "  ".join(f"{line.contender}{'*' * line.chosen} {line.cpu_ms:.2f}" for line in measured)
        print(f"{problem.key}: {shown}  {next(line.verdict for line in measured if line.chosen)}", flush=True)
    if regrets:
        print(f"{len(regrets)} problems: median regret {statistics.median(regrets):.3f}, worst {max(regrets):.3f}")
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main())
