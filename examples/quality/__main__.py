"""`python -m examples.quality`: trains each family on each task, and appends a row for each run to a CSV file.

`--quick` is a minute: three families, recall only, few steps. `--predict` writes what the patterns' figures predict, and trains nothing.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import torch

from examples.quality import predictions
from examples.quality.families import FAMILIES
from examples.quality.tasks import TASKS
from examples.quality.training import Plan, append, run

QUICK = ("dense", "islands", "for_length, all residues")


def main() -> None:
    """Read the options, then run."""
    parser = argparse.ArgumentParser(prog="python -m examples.quality", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute: three families, recall, 300 steps")
    parser.add_argument("--predict", action="store_true", help="write predictions.csv and stop")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[3e-3, 1e-3], help="learning rates (default: 3e-3 1e-3)"
    )
    parser.add_argument("--length", type=int, default=128, help="tokens, a multiple of 16 (default: 128)")
    parser.add_argument("--steps", type=int, default=1000, help="at most (default: 1000)")
    parser.add_argument("--patience", type=int, default=400, help="steps without a better accuracy (default: 400)")
    parser.add_argument(
        "--out", type=Path, default=Path("quality.csv"), help="rows are appended here (default: quality.csv)"
    )
    options = parser.parse_args()
    if options.length < 64 or options.length % 16:
        parser.error(f"--length must be a multiple of 16 from 64 on, got {options.length}")
    if options.predict:
        predictions.write()
        return
    plan = Plan(length=options.length, steps=options.steps, patience=options.patience)
    runs = product(options.tasks, options.families, range(options.seeds), options.rates)
    if options.quick:
        plan, runs = Plan(steps=300), product(["recall"], QUICK, [0], [3e-3])
    torch.set_num_threads(1)
    for task, family, seed, rate in runs:
        row = run(task, family, seed, rate, plan, print)
        append(options.out, row)
        print(f"{task} | {family}: accuracy {row.accuracy:.3f} after {row.best_step} steps, {row.stopped}", flush=True)


if __name__ == "__main__":
    main()
