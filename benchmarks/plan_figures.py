"""`python -m benchmarks.plan_figures`: the memory of a training step, planned and not, as rows of `results/plan-figures.csv`.

The step is forward, cross entropy and backward of `LongNet` with four layers of width 256, batch 1, float32. `planned` counts lifetimes and computes
nothing. `resident` runs the step twice in a fresh process for each way, and reads the growth of resident memory in the second step and its CPU time:
plain torch, inside the plan, and both under the settings that glibc's malloc has for keeping less or more.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import torch
from torch.nn.functional import cross_entropy

from benchmarks import record
from benchmarks.figures import Figure, append
from benchmarks.memory import ResidentPeak
from longattn.attention import LongNet
from longattn.bufmgr import MemoryPlan, plan_memory
from longattn.bufmgr.planning.lifetimes import lay_out

MOST_OF_PLAIN = 0.85
TOKENS = 32768
_VOCABULARY = 256
_MIB = 1 << 20

# glibc's malloc: how large an allocation must be to be mapped by itself, and how much free heap it keeps (mallopt(3)).
_WAYS: dict[str, dict[str, str]] = {
    "plain": {},
    "planned": {},
    "plain, MALLOC_MMAP_THRESHOLD_=65536": {"MALLOC_MMAP_THRESHOLD_": "65536"},
    "planned, MALLOC_MMAP_THRESHOLD_=65536": {"MALLOC_MMAP_THRESHOLD_": "65536"},
    "plain, MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=17179869184": {
        "MALLOC_MMAP_THRESHOLD_": "1073741824",
        "MALLOC_TRIM_THRESHOLD_": "17179869184",
    },
}


def _model() -> LongNet:
    torch.manual_seed(0)
    return LongNet(_VOCABULARY, d_model=256, nhead=8, num_layers=4)


def _loss(logits: torch.Tensor) -> torch.Tensor:
    targets = torch.zeros(logits.shape[0] * logits.shape[1], dtype=torch.long, device=logits.device)
    return cross_entropy(logits.flatten(0, 1), targets)


def _plan(tokens: int) -> MemoryPlan:
    return plan_memory(_model(), [torch.empty(1, tokens, dtype=torch.long, device="meta")], loss=_loss)


def planned(tokens: int = TOKENS) -> Iterator[Figure]:
    """Live peaks before and after, and what one block would take."""
    plan = _plan(tokens)
    setting = f"LongNet, 4 layers of 256, {tokens} tokens"
    beside = f"{plan.peak_after / _MIB:.0f} of {plan.peak_before / _MIB:.0f} MiB; {plan.recomputed} tensors made again"
    ratio = plan.peak_after / plan.peak_before
    yield Figure("live peak of a step, planned over plain", setting, "ratio", ratio, beside, most=MOST_OF_PLAIN)
    for name, lifetimes, peak in (("plain", plan.before, plan.peak_before), ("planned", plan.after, plan.peak_after)):
        block = lay_out(lifetimes).block_bytes
        yield Figure(
            "one block over the live peak", f"{setting}, {name}", "ratio", block / peak, f"{len(lifetimes)} tensors"
        )


def resident(tokens: int = TOKENS) -> Iterator[Figure]:
    """Growth of resident memory and CPU time of the second step of a fresh process, each way beside plain torch."""
    setting = f"LongNet, 4 layers of 256, {tokens} tokens, 2 threads"
    plan, plain = _plan(tokens), None
    for way, variables in _WAYS.items():
        command = [sys.executable, "-m", "benchmarks.plan_figures", "--step", way, str(tokens)]
        result = subprocess.run(command, env={**os.environ, **variables}, check=True, capture_output=True, text=True)
        growth, seconds = json.loads(result.stdout.splitlines()[-1])
        if growth is None:
            return
        plain = plain or (growth, seconds)
        beside = f"{growth / _MIB:.0f} MiB; plain {plain[0] / _MIB:.0f} MiB"
        is_planned = way.startswith("planned")
        most = MOST_OF_PLAIN if is_planned else None
        yield Figure(
            "resident peak of a step over plain torch",
            f"{setting}, {way}",
            "ratio",
            growth / plain[0],
            beside,
            most=most,
        )
        # What is above 1 is all that a block for the whole step, laid out beforehand, could save.
        live = plan.peak_after if is_planned else plan.peak_before
        yield Figure(
            "resident peak of a step over its live peak",
            f"{setting}, {way}",
            "ratio",
            growth / live,
            f"{live / _MIB:.0f} MiB alive at once; one block cannot be smaller",
        )
        yield Figure(
            "CPU time of a step over plain torch", f"{setting}, {way}", "ratio", seconds / plain[1], f"{seconds:.1f} s"
        )


def _step(way: str, tokens: int) -> tuple[int | None, float]:
    """Run two steps in this process; return what the second one adds to resident memory, and its CPU seconds."""
    torch.set_num_threads(2)
    model, inputs = _model(), torch.randint(_VOCABULARY, (1, tokens))
    context = contextlib.nullcontext
    if way.startswith("planned"):
        context = plan_memory(model, [inputs], loss=_loss).apply
    peak, seconds = ResidentPeak(), 0.0
    for _ in range(2):  # the first loads code, and makes plans of patterns
        peak.start()
        began = time.process_time()
        with context():
            logits = model(inputs)
        _loss(logits).backward()
        seconds = time.process_time() - began
        del logits
        model.zero_grad()
    return peak.growth(), seconds


GROUPS = {"planned": planned, "resident": resident}


def main() -> int:
    """Measure the groups that the command line names, or all; print them, and append them to the results."""
    if sys.argv[1:2] == ["--step"]:
        sys.stdout.write(json.dumps(_step(sys.argv[2], int(sys.argv[3]))) + "\n")
        return 0
    for group in sys.argv[1:] or GROUPS:
        append("plan-figures", GROUPS[group](), record.surroundings())
    return 0


if __name__ == "__main__":
    sys.exit(main())
