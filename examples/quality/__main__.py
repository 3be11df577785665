"""`python -m examples.quality`: trains each family on each task, and appends a row for each run to a CSV file.

Runs that the file holds are not made again, so a stopped command goes on where it was. `--quick` is a minute: three families, recall only, 300 steps, and
an error if dense attention learns no recall, or islands do. `--predict` writes what the patterns' figures predict, and trains nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch

from examples.quality import predictions
from examples.quality.families import FAMILIES, MIXED, Layers, keys_per_query
from examples.quality.rows import Rows
from examples.quality.tasks import TASKS
from examples.quality.training import Plan, run

QUICK = ("dense", "islands", "for_length, all residues")


def distinct(families: Sequence[str], plan: Plan) -> list[str]:
    """Those that make a run of their own: not the patterns of an earlier one, nor at equal FLOPs the width of equal parameters."""
    by_patterns: dict[Layers, str] = {}
    for family in families:
        patterns = FAMILIES[family](plan.length, plan.layers, plan.heads)
        width = plan.width_of(keys_per_query(patterns, plan.length, plan.heads))
        if plan.equal == "parameters" or width != plan.width:
            by_patterns.setdefault(patterns, family)
    return list(by_patterns.values())


def main() -> None:
    """Read the options, then run."""
    parser = argparse.ArgumentParser(prog="python -m examples.quality", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute: three families, recall, 300 steps")
    parser.add_argument("--predict", action="store_true", help="write predictions.csv and stop")
    parser.add_argument("--list", action="store_true", help="name the runs that the file lacks, and stop")
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
    rows = Rows(options.out)
    missing = [
        (task, family, seed, rate)
        for task, rate, seed, family in product(options.tasks, options.rates, options.seeds, distinct(families, plan))
        if not rows.finished(
            {"task": task, "family": family, "seed": seed, "rate": rate}
            | {name: getattr(plan, name) for name in ("length", "layers", "heads", "equal")}
        )
    ]
    if options.list:
        print("\n".join(f"{task} | {family} | seed {seed} | rate {rate}" for task, family, seed, rate in missing))
        print(f"{len(missing)} runs are missing in {options.out}")
        return
    for task, family, seed, rate in missing:
        row = run(task, family, seed, rate, plan, print)
        rows.append(asdict(row))
        print(f"{task} | {family}: accuracy {row.accuracy:.3f} after {row.best_step} steps, {row.stopped}", flush=True)


if __name__ == "__main__":
    main()
