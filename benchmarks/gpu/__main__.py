"""`python -m benchmarks.gpu`: the gate first, then every row in a process of its own. `--dry` shows it all without a GPU.

Each experiment states its work as FLOPs of visible pairs (4, 10 or 14 times pairs * head_dim for forward, backward, both) and its target; a
missed one is a row like any other. A row whose process dies, hangs or raises costs itself alone: its verdict is the error, its output
goes to a file in the folder `--failures`. `--dry` runs the same path on CPU tensors in triton's interpreter, on tiny sizes.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu import ROOT
from benchmarks.gpu.experiments import Experiment, experiments
from benchmarks.gpu.gate import checks, dense_checks
from benchmarks.gpu.measuring import Row, ceilings, run, use_kernel


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dry", action="store_true", help="tiny, interpreted on CPU; rows only where --results says")
    parser.add_argument("--only", default="", help="experiments whose name holds this")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--results", type=Path, help="the CSV file; default: benchmarks/results/gpu.csv")
    parser.add_argument(
        "--failures", type=Path, help="folder for the output of rows that fail; default: a temporary one"
    )
    parser.add_argument("--row-seconds", type=float, default=90.0, help="a row's process is stopped after this")
    parser.add_argument("--seconds", type=float, default=600.0, help="no row begins after this")
    parser.add_argument("--one-kernel", action="store_true", help="leave the warp-specialised kernel out")
    parser.add_argument(
        "--second-ptxas",
        type=Path,
        default=second_assembler(),
        help="compiles a few rows once more; default: triton's own for Blackwell",
    )
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--reached", type=json.loads, default={}, help=argparse.SUPPRESS)
    return parser.parse_args()


def child(options: argparse.Namespace) -> int:
    """What a process of its own does: the gate, the ceilings, or one experiment; its answer is JSON in a file."""
    device = "cpu" if options.dry else "cuda"
    if options.child in ("gate", "dense gate"):
        dense, wrong = options.child == "dense gate", {}
        use_kernel(dense)
        for name, check in (dense_checks if dense else checks)(options.dry, device):
            try:
                check()
            except AssertionError as failure:
                wrong[name] = str(failure)
            print(f"gate: {name}: {'wrong' if name in wrong else 'agrees'}", flush=True)
        answer: object = wrong
    elif options.child == "ceilings":
        answer = ceilings(device)
    else:
        experiment = next(e for e in experiments(options.dry) if e.name == options.child)
        if options.one_kernel and experiment.dense:
            raise RuntimeError("the warp-specialised kernel is left out")
        if options.one_kernel:
            use_kernel(False)
        answer = asdict(run(experiment, device, 1 if options.dry else options.repeats, options.reached))
    options.answer.write_text(json.dumps(answer))
    return 0


def second_assembler() -> Path | None:
    """A ptxas beside the one that triton takes on Hopper and Ampere: it comes with one for Blackwell, which knows them too."""
    there = find_spec("triton")
    path = Path(str(there.origin)).parent / "backends" / "nvidia" / "bin" / "ptxas-blackwell" if there else None
    return path if path is not None and path.exists() else None


def ask(
    options: argparse.Namespace, what: str, seconds: float, reached: object = None, ptxas: Path | None = None
) -> tuple[object, str]:
    """(answer, "") of a child, or (None, the last line that it said). reached: ceilings. ptxas: in place of triton's."""
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer.json", options.failures / (what.replace(" ", "-") + ".txt")
        command = [sys.executable, "-m", "benchmarks.gpu", "--child", what, "--answer", str(answer)]
        command += ["--repeats", str(options.repeats), "--reached", json.dumps(reached or {})]
        command += [*(["--dry"] if options.dry else []), *(["--one-kernel"] if options.one_kernel else [])]
        tools = {} if ptxas is None else dict.fromkeys(("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"), str(ptxas))
        with log.open("w", encoding="utf-8") as file:
            try:
                code = subprocess.run(
                    command,
                    cwd=ROOT,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=seconds,
                    check=False,
                    env=os.environ | tools,
                ).returncode
                ended = f"exit status {code}"
            except subprocess.TimeoutExpired:
                ended = f"stopped after {seconds:g} s"
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if answer.exists():
            log.unlink()
            return json.loads(answer.read_text()), ""
        return None, f"{ended}: {said[-1] if said else 'no output'}"


def refused(options: argparse.Namespace) -> str:
    """Why nothing is timed that the second ptxas compiled: there is none, or the gate found its kernels wrong; else ""."""
    if options.second_ptxas is None:
        return "no second ptxas is here"
    wrong, why = ({}, "") if options.dry else ask(options, "gate", 120.0, ptxas=options.second_ptxas)
    return why or (f"kernels are wrong: {json.dumps(wrong)}" if wrong else "")


def failed(experiment: Experiment, why: str) -> Row:
    """The row of an experiment whose process gave no answer."""
    target = "" if experiment.target is None else f"{experiment.target[1]:g} {experiment.target[0]}"
    return Row(
        experiment.key,
        experiment.head_dim,
        experiment.direction,
        "x".join(map(str, experiment.tile)),
        peer=experiment.peer,
        target=target,
        verdict=f"failed: {why}",
    )


def main() -> int:
    """The gate, the ceilings, then every experiment; rows go to the file as they come."""
    options = arguments()
    options.failures = options.failures or Path(tempfile.mkdtemp(prefix="longattn-gpu-"))
    options.failures.mkdir(parents=True, exist_ok=True)
    if options.child:
        return child(options)
    if not options.dry and not _has_gpu():
        print("no GPU here: nothing was timed. --dry runs the same path in triton's interpreter.")
        return 2
    results = options.results or (None if options.dry else ROOT / "benchmarks" / "results" / "gpu.csv")
    begin = time.monotonic()
    wrong, why = ask(options, "gate", 300.0)
    if wrong or why:
        print(f"gate: nothing is timed, for kernels are wrong on this device: {why or json.dumps(wrong, indent=1)}")
        return 1
    print("gate: outputs, lse and gradients agree with the oracle")
    if not options.one_kernel:
        wrong, why = ask(options, "dense gate", 90.0)
        options.one_kernel = bool(wrong or why)
        said = f"is left out: {why or json.dumps(wrong, indent=1)}" if options.one_kernel else "agrees too"
        print(f"gate: the warp-specialised kernel {said}", flush=True)
    reached, why = ask(options, "ceilings", 120.0)
    print(f"ceilings: {reached or why}", flush=True)
    count = broken = 0
    second: str | None = None
    for experiment in experiments(options.dry):
        if options.only not in experiment.name:
            continue
        if time.monotonic() - begin > options.seconds:
            print(f"stopped: {options.seconds:g} s are over; rows from {experiment.name} on were not measured")
            break
        if experiment.second_ptxas and second is None:
            second = refused(options)
        ptxas = options.second_ptxas if experiment.second_ptxas else None
        if experiment.second_ptxas and second:
            answer, why = None, second
        else:
            answer, why = ask(options, experiment.name, options.row_seconds, reached, ptxas)
        row = Row(**answer) if isinstance(answer, dict) else failed(experiment, why)
        count, broken = count + 1, broken + (answer is None)
        print(
            ", ".join(f"{name}={value}" for name, value in asdict(row).items() if value not in ("", None)), flush=True
        )
        if results is not None:
            append(row, results)
    print(f"{count} rows, {broken} failed; what failed ones said: {options.failures}")
    return 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def append(row: Row, results: Path) -> None:
    """Add a row to the CSV, with its header where there is none yet."""
    fresh = not results.exists()
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(asdict(row))


if __name__ == "__main__":
    sys.exit(main())
