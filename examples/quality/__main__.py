"""`python -m examples.quality`: trains each family on each task, and appends a row for each run to a CSV file.

Runs that the file holds are not made again, so a stopped command goes on where it was. `--quick` is a minute: three families, recall only, 300 steps, and
an error if dense attention learns no recall, or islands do. `--predict` writes what the patterns' figures predict, and trains nothing.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch

from examples.quality import predictions
from examples.quality.families import FAMILIES, MIXED
from examples.quality.rows import append, finished
from examples.quality.tasks import TASKS
from examples.quality.training import Plan, run

QUICK = ("dense", "islands", "for_length, all residues")


def main() -> None:
    """Read the options, then run."""
    parser = argparse.ArgumentParser(prog="python -m examples.quality", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute: three families, recall, 300 steps")
    parser.add_argument("--predict", action="store_true", help="write predictions.csv and stop")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), help="default: all; in four layers mixtures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[3e-3, 1e-3], help="learning rates (default: 3e-3 1e-3)"
    )
    parser.add_argument(
        "--equal", choices=("parameters", "flops"), default="parameters", help="what families have in common"
    )
    parser.add_argument("--length", type=int, default=128, help="tokens, a multiple of 32 (default: 128)")
    parser.add_argument("--layers", type=int, choices=(2, 4), default=2)
    parser.add_argument("--steps", type=int, default=3000, help="at most (default: 3000)")
    parser.add_argument("--patience", type=int, default=600, help="steps without a better accuracy (default: 600)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--out", type=Path, default=Path("quality.csv"), help="rows are appended here (default: quality.csv)"
    )
    options = parser.parse_args()
    if options.length < 64 or options.length % 32:
        parser.error(f"--length must be a multiple of 32 from 64 on, got {options.length}")
    if options.predict:
        predictions.write()
        return
    torch.set_num_threads(1)
    if options.quick:
        learnt = {family: run("recall", family, 0, 3e-3, Plan(steps=300), print).accuracy for family in QUICK}
        print(", ".join(f"{family}: {accuracy:.3f}" for family, accuracy in learnt.items()))
        if min(learnt["dense"], learnt["for_length, all residues"]) < 0.8 or learnt["islands"] > 0.4:
            raise SystemExit("recall must be learnt by dense attention and by all residues, and not by islands")
        return
    plan = Plan(
        options.length,
        options.layers,
        equal=options.equal,
        steps=options.steps,
        patience=options.patience,
        device=options.device,
    )
    families = options.families or (predictions.TWO if options.layers == 2 else ("window", *MIXED))
    for task, rate, seed, family in product(options.tasks, options.rates, options.seeds, families):
        named = {"task": task, "family": family, "seed": seed, "rate": rate}
        if finished(
            options.out, named | {name: getattr(plan, name) for name in ("length", "layers", "heads", "equal")}
        ):
            continue
        row = run(task, family, seed, rate, plan, print)
        append(options.out, asdict(row))
        print(f"{task} | {family}: accuracy {row.accuracy:.3f} after {row.best_step} steps, {row.stopped}", flush=True)


if __name__ == "__main__":
    main()
