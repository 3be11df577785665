"""`python -m tools.mutants [TARGET ...]`: put a seeded sample of faults into each target and say which its tests notice.

Ends with 0 where at least 90 % of each target's faults are noticed and every other one is listed, with a reason, in `survivors.csv`.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tools.mutants import cpp_source, python_source
from tools.mutants.mutant import Mutant, sample
from tools.mutants.targets import TARGETS, Target
from tools.mutants.trial import HANGS, INVALID, KILLED, ROOT, SURVIVED, Tree, preload

LISTED = Path(__file__).with_name("survivors.csv")
LEAST_SHARE = 0.9
HEAVY = ("numpy", "torch", "torch._dynamo", "torch.distributed", "hypothesis", "hypothesis.strategies", "pytest")


def main(
    arguments: Sequence[str] | None = None,
    targets: Mapping[str, Target] = TARGETS,
    root: Path = ROOT,
    listed: Path = LISTED,
    heavy: Sequence[str] = HEAVY,
) -> int:
    """Parse the command line and try the targets that it names, all by default."""
    parser = argparse.ArgumentParser(prog="tools.mutants", description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(targets)}; all by default")
    parser.add_argument(
        "--seed", type=int, default=1, help="chooses the sample (default 1, which survivors.csv is for)"
    )
    parser.add_argument("--count", type=int, default=30, help="mutants a target (default 30)")
    parser.add_argument(
        "--skip", type=int, default=0, help="leave out the first of them, to go on with a run that was stopped"
    )
    parser.add_argument("--jobs", type=int, default=1, help="how many are tried at once (default 1)")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.targets if name not in targets]
    if unknown:
        parser.error(f"TARGET must be one of {', '.join(targets)}, got {unknown[0]!r}")
    preload(heavy)
    known = read_listed(listed)
    good = True
    for name in given.targets or targets:
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            good &= try_target(name, targets[name], given, root, known, Path(folder))
    return 0 if good else 1


def read_listed(path: Path) -> dict[tuple[str, ...], str]:
    """{(target, *name of a mutant): reason} of the committed table."""
    with path.open(encoding="utf-8", newline="") as file:
        return {tuple(row[:6]): row[6] for row in list(csv.reader(file))[1:]}


def try_target(
    name: str, target: Target, given: argparse.Namespace, root: Path, known: dict[tuple[str, ...], str], folder: Path
) -> bool:
    """Whether enough of a target's sample is noticed and the rest is listed; prints what became of each mutant."""
    trees = [Tree(target, folder / str(job), root) for job in range(given.jobs)]
    mutants_of = cpp_source.mutants_of if target.native else python_source.mutants_of
    every = [one for file in trees[0].files() for one in mutants_of((root / file).read_text(encoding="utf-8"), file)]
    chosen = sample(every, given.count, given.seed)[given.skip :]
    limit = 0.0
    for tree in trees:
        # First what each test calls is recorded, then the order of tests is the one that mutants meet.
        begun = 0.0
        for _ in range(2):
            begun = time.monotonic()
            if tree.run(900.0) != SURVIVED:
                print(f"{name}: the tests fail without a fault:\n{tree.printed[-3000:]}")
                return False
        limit = max(limit, 20.0 + 3.0 * (time.monotonic() - begun))
    print(f"{name}: {len(chosen)} of {len(every)} mutants, at most {limit:.0f} s each", flush=True)
    counted: dict[str, int] = dict.fromkeys((KILLED, HANGS, INVALID, SURVIVED), 0)
    unlisted = 0
    for mutant, verdict, failed in tried(trees, chosen, limit):
        counted[verdict] += 1
        reason = known.get((name, *mutant.name)) if verdict == SURVIVED else None
        unlisted += verdict == SURVIVED and reason is None
        by = f" by {failed}" if verdict == KILLED else ""
        print(f"  {verdict}{by}: {mutant.file} {mutant.where}: {mutant.before}  ->  {mutant.after}", flush=True)
        if verdict == SURVIVED:
            print(f"    {reason or 'not listed: ' + row_of(name, mutant)}", flush=True)
    killed = counted[KILLED] + counted[HANGS]
    valid = killed + counted[SURVIVED]
    share = killed / valid if valid else 1.0
    print(
        f"{name}: {killed} of {valid} killed ({share:.0%}), {unlisted} survivors not listed, {counted[INVALID]} did not compile"
    )
    return share >= LEAST_SHARE and not unlisted


def tried(trees: Sequence[Tree], mutants: Sequence[Mutant], limit: float) -> Iterator[tuple[Mutant, str, str]]:
    """Every mutant with what became of it and the test that failed, as they end; each tree tries one at a time."""
    waiting, busy = list(reversed(mutants)), list[Tree]()
    while waiting or busy:
        for tree in trees:
            if waiting and tree not in busy:
                tree.begin(limit, waiting.pop())
                busy.append(tree)
        for tree in list(busy):
            verdict, mutant = tree.poll(), tree.mutant
            if verdict is not None and mutant is not None:
                busy.remove(tree)
                yield mutant, verdict, tree.failed
        time.sleep(0.02)


def row_of(target: str, mutant: Mutant) -> str:
    """The row of a mutant in the table, its reason left open."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow([target, *mutant.name, ""])
    return line.getvalue()


if __name__ == "__main__":
    sys.exit(main())
