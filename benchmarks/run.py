"""`python -m benchmarks.run [case ...]`: measure the cases and append their rows to `benchmarks/results/*.csv`.

A row is on disk as soon as it is shown, so a run may be stopped at any time; `--resume` goes on with what it left out.
`--quick` is a smoke test on tiny sizes: it writes to standard output only and judges nothing but correctness. A red
correctness gate writes no row for its experiment and ends the run with exit status 1; a missed target is a row like any
other, marked `missed`.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.experiment import CASES, Experiment, experiments
from benchmarks.harness import Effort, RedGateError, measure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; unknown cases end the process with argparse's message."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Measure longattn beside its peers.")
    parser.add_argument("cases", nargs="*", metavar="case", help=f"any of: {', '.join(CASES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, standard output only")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="experiments whose key contains TEXT; every one given",
    )
    parser.add_argument("--resume", action="store_true", help="leave out what this commit has recorded on this machine")
    parser.add_argument("--list", action="store_true", help="print the experiments' keys and stop")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--pairs", type=int, default=9, help="at most so many interleaved pairs (default 9)")
    parser.add_argument("--seconds", type=float, default=40.0, help="no new pair after so long (default 40)")
    parser.add_argument("--no-growth", action="store_true", help="skip the memory measurements in fresh processes")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the CSV files")
    arguments = parser.parse_args(argv)
    unknown = [case for case in arguments.cases if case not in CASES]
    if unknown:
        parser.error(f"case must be any of {', '.join(CASES)}, got {', '.join(unknown)}")
    if arguments.threads < 1 or arguments.pairs < 1:
        parser.error("--threads and --pairs must be at least 1")
    return arguments


def effort_of(arguments: argparse.Namespace, first: bool) -> Effort:
    """How much to measure: in a quick run two pairs, and memory for the first experiment only."""
    if arguments.quick:
        growth = first and not arguments.no_growth
        return Effort(1, 2, 2, 0.0, growth=growth, threads=arguments.threads, quick=True)
    return Effort(
        min_pairs=min(3, arguments.pairs),
        max_pairs=arguments.pairs,
        seconds=arguments.seconds,
        growth=not arguments.no_growth,
        threads=arguments.threads,
    )


def show(row: record.Row) -> str:
    """One line for the reader; the CSV keeps every column."""
    mask = "causal" if row.causal else "full"
    memory = "" if row.our_growth is None else f"  growth {row.our_growth:.2f}x"
    if row.peer_growth is not None:
        memory += f" against {row.peer_growth:.2f}x"
    return (
        f"{row.case} {row.variant} {row.seq_len} {row.dtype} {mask} {row.direction} / {row.peer}: "
        f"{row.our_cpu_ms:.1f} against {row.peer_cpu_ms:.1f} CPU ms, {row.ratio_cpu:.2f}x{memory}  {row.verdict}"
    ).rstrip()


def csv_of(experiment: Experiment, arguments: argparse.Namespace) -> Path:
    """The file of an experiment's row: one for each case."""
    return arguments.results / f"{experiment.labels.case}.csv"


def chosen(arguments: argparse.Namespace, where: record.Surroundings) -> Iterator[Experiment]:
    """The experiments that the command line asks for, in order."""
    for case in arguments.cases or CASES:
        for experiment in experiments(case, quick=arguments.quick):
            if not all(text in experiment.key for text in arguments.only):
                continue
            if arguments.resume and record.is_recorded(experiment.labels, where, csv_of(experiment, arguments)):
                continue
            yield experiment


def run_one(experiment: Experiment, arguments: argparse.Namespace, where: record.Surroundings, first: bool) -> bool:
    """Measure one experiment and record it; False if its gate was red."""
    try:
        outcome = measure(experiment, effort_of(arguments, first))
    except RedGateError as red:
        print(f"RED, not reported: {red}", file=sys.stderr, flush=True)
        return False
    row = record.make_row(experiment.labels, experiment.targets, outcome, where)
    print(show(row), flush=True)
    if not arguments.quick:
        record.append(row, csv_of(experiment, arguments))
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for.

    Returns:
        0, or 1 if any gate was red, or 2 if no experiment has a key with the texts of --only.
    """
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    where = record.surroundings()
    print("# " + ", ".join(f"{name}: {value}" for name, value in asdict(where).items()), flush=True)
    green = True
    first = True
    experiment = None
    for experiment in chosen(arguments, where):
        if arguments.list:
            print(f"{experiment.labels.case} {experiment.key}")
            continue
        green = run_one(experiment, arguments, where, first) and green
        first = False
    if experiment is None and not arguments.resume:
        print(f"--only must be in some experiment's key (--list shows them), got {arguments.only}", file=sys.stderr)
        return 2
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main())
