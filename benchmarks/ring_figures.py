"""`python -m benchmarks.ring_figures [bytes | time | memory | headers]`: rings across processes, as rows of `benchmarks/results/ring.csv`.

Bytes and balance are counted from the plans, and the bytes of a forward held against what the transport of 4 gloo processes really sent.
Times are wall clock of the slowest of 2 processes with a thread each, side by side in one run. A peer that is not installed has no row;
ring-attention-pytorch (lucidrains) is found where PYTHONPATH leads to it.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from benchmarks import record
from benchmarks.figures import Figure, append
from longattn.attention.schedules.layouts import LAYOUTS
from longattn.attention.schedules.traffic import ScheduledCall, full_ring_bytes, ring_traffic
from longattn.patterncache import Dilated, Full

LENGTH, RANKS = 65536, 4
FIXED_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "262144"}
"""glibc then maps every block of that many bytes or more by itself, and gives it back when it is freed."""
LISTS = (((2048, 4096, 8192), (1, 2, 4)), ((2048, 8192, 32768), (1, 4, 16)))


def ask(
    world: int, task: str, size: int, module: str = "benchmarks.ring_rank", environment: Mapping[str, str] | None = None
) -> object:
    """The answer of rank 0 of a world of processes that run `module`; environment: more variables of theirs.

    Raises:
        RuntimeError: a rank failed; the message ends with what it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", module, str(world)]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), folder, task, str(size)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            )
            for rank in range(world)
        ]
        answers = [rank.communicate(timeout=600) for rank in ranks]
    for process, (_, errors) in zip(ranks, answers, strict=True):
        if process.returncode:
            raise RuntimeError(f"{task} on {world} ranks: {errors[-1000:]}")
    return json.loads(answers[0][0].strip().splitlines()[-1])


def bytes_sent() -> Iterator[Figure]:
    """Of a forward at 64K tokens on 4 ranks, bfloat16, H=8, D=64; and the slowest rank's work."""
    really = ask(RANKS, "sent", LENGTH)
    assert isinstance(really, list)
    for segments, rates in LISTS:
        for causal in (False, True):
            pattern = Dilated(segments, rates, causal=causal)
            call = ScheduledCall(pattern, LENGTH, RANKS, 8, 8)
            forward, full = ring_traffic(call).forward, full_ring_bytes(call)
            counted = ring_traffic(ScheduledCall(pattern, LENGTH, RANKS, 8, 8, 2, dtype=torch.float32)).forward
            setting = f"{RANKS} ranks, {LENGTH} tokens, {'/'.join(map(str, segments))} x {'/'.join(map(str, rates))}"
            setting += ", causal" if causal else ""
            most = 0.0 if rates[-1] == 4 else 0.05
            beside = f"{forward} of {full} bytes, bfloat16, H=8, D=64"
            yield Figure("bytes sent, share of a full ring's", setting, "ratio", forward / full, beside, most=most)
            sent = really.pop(0)
            yield Figure("bytes the transport sent, less those counted", setting + ", D=2", "bytes", sent - counted, f"{sent} sent", 0, 0)  # fmt: skip
    for name, pattern in (("full", Full(causal=True)), ("dilated", Dilated(*LISTS[1], causal=True))):
        imbalance = {
            layout: ring_traffic(ScheduledCall(pattern, LENGTH, RANKS, 8, 8), layout).imbalance for layout in LAYOUTS
        }
        beside = f"contiguous {imbalance['contiguous']:.3f}; striped {imbalance['striped']:.3f}"
        yield Figure("work of the slowest rank over the mean, zigzag", f"{RANKS} ranks, {LENGTH} tokens, {name}, causal", "ratio", imbalance["zigzag"], beside, most=1.05)  # fmt: skip


def timed() -> Iterator[Figure]:
    """Forward and backward at 16K tokens on 2 processes, dense causal, float32, zigzag."""
    answer = ask(2, "time", 16384)
    assert isinstance(answer, dict)
    times = answer["taken"]
    ring, setting = times.pop("ring"), "2 ranks, 16384 tokens, full causal, forward+backward, H=2, D=64"
    local = times.pop("local computations")
    beside = f"ring {ring:.0f} ms; local {local:.0f} ms"
    yield Figure("ring, over its local computations", setting, "ratio", ring / local, beside, most=1.15)
    for peer, taken in times.items():
        yield Figure(f"{peer}, over the ring", setting, "ratio", taken / ring, f"{taken:.0f} ms", least=1.0)
    for peer, reason in answer["refused"].items():
        yield Figure(f"{peer}, calls that it ran", setting, "calls", 0, f"torch {torch.__version__}: {reason}")


def remembered() -> Iterator[Figure]:
    """Peak memory of a rank beside its own q + k + v, by resident memory.

    glibc's malloc raises the size from which it maps blocks of their own with every such block that is freed: shards then come from its heap, and
    holes between them stay resident. So what a rank needs is measured where that size stays, and what malloc keeps beside it is a row without
    a promise.
    """
    for world in (1, 2, 4):
        setting = f"{world} ranks, 16384 tokens, full causal, forward+backward, H=8, D=64"
        growth, fixed = (ask(world, "memory", 16384, environment=variables) for variables in ({}, FIXED_MALLOC))
        assert isinstance(growth, float) and isinstance(fixed, float)
        yield Figure("peak memory of a rank over its q+k+v", setting, "ratio", growth)
        if world > 1:
            # In units of q: q, k, v and out; dq, dk and dv; two shards in flight, each of k, v, dk and dv.
            share, share_fixed = ((3 + 3 * grown) / (4 + 3 + 2 * 4) for grown in (growth, fixed))
            beside = "needed: q, k, v, out, gradients and two shards in flight with theirs"
            name = "peak memory of a rank over what it needs"
            yield Figure(name, f"{setting}; malloc by itself", "ratio", share, f"{beside}; freed blocks that malloc keeps are in it")  # fmt: skip
            yield Figure(name, f"{setting}; {' '.join('='.join(pair) for pair in FIXED_MALLOC.items())}", "ratio", share_fixed, beside, most=1.25)  # fmt: skip


def announced() -> Iterator[Figure]:
    """The headers of 4 ranks: alone, and beside a step of LongNet's pattern at 4096 tokens."""
    found = ask(RANKS, "headers", 4096)
    assert isinstance(found, dict)
    alone, many, step = found["alone"], found["many"], found["step"]
    raw = found["raw"]
    yield Figure("headers of one pass, alone", f"{RANKS} ranks", "us", alone, f"messages of 32 bytes by torch alone: {raw:.0f} us", most=60)  # fmt: skip
    yield Figure("headers of one pass, over as many of torch's messages of 32 bytes", f"{RANKS} ranks", "ratio", alone / raw)  # fmt: skip
    setting = f"{RANKS} ranks, 4096 tokens, dilated causal, zigzag, forward+backward, H=8, D=64"
    beside = f"{many:.0f} passes; step {step:.1f} ms"
    yield Figure("headers, share of a step", setting, "ratio", many * alone / (1e3 * step), beside, most=0.03)


GROUPS = {"bytes": bytes_sent, "time": timed, "memory": remembered, "headers": announced}


def main() -> int:
    """Measure what is asked for, print it, and append it to the results."""
    groups = sys.argv[1:] or GROUPS
    append("ring", (figure for name in groups for figure in GROUPS[name]()), replace(record.surroundings(), threads=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
