"""Thousands of calls over gloo processes, one in fifty with a fault: `python ring_soak.py [--steps 2000] [--ranks 3] [--seed 0]
[--one-in 50]`.

Every step draws a length, a pattern, an engine and its layout, the same on every rank. Sampled rows of each result, and gradients every
tenth step, are held against the float64 oracle. A fault is a rank that raises in the middle, has another dtype, or leaves the call out; all
ranks reset after it. In the end, neither threads nor descriptors nor memory have grown. Exit status 1 where anything did not hold.
"""

import argparse
import gc
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from longattn.attention import AllGather, GroupError, Ring, Schedule, Ulysses, pattern_attention, shard_sequence
from longattn.attention.schedules import driver
from longattn.kernels import reference_attention
from longattn.patterncache import Dilated, Documents, Full, Pattern, Rectangle, Span, Window

FAULTS = ("raise", "dtype", "left out")
ROWS = 5
GROWTH = 64 << 20
"""Bytes that a rank's peak may grow after the first tenth of the steps: what the plans of new lengths take."""


def draw_pattern(draw: random.Random, length: int) -> Pattern:
    """Any that a rank may be asked for."""
    causal = draw.random() < 0.5
    cut = sorted(draw.sample(range(1, length), min(2, length - 1)))
    return draw.choice(
        [
            Full(causal=causal),
            Window(draw.randint(1, length), causal=causal),
            Dilated((4, 8, 16), (1, 2, 4), causal=causal),
            Dilated((5, draw.randint(6, 40)), (2, 3), "split", causal=causal),
            Documents((0, *cut, length), Full(causal=causal)),
        ]
    )


def draw_schedule(draw: random.Random, length: int) -> tuple[Schedule, Schedule]:
    """Any engine and layout; once more with a timeout of a second."""
    kind: Any = draw.choice([Ring, Ring, AllGather, Ulysses])
    layout = draw.choice(["contiguous", "zigzag", "striped"])
    lengths = draw.choice([None, length])
    group: Any = dist.group.WORLD
    return kind(group, layout=layout, lengths=lengths), kind(group, layout=layout, lengths=lengths, timeout=1.0)


class OnPurpose(Exception):
    """Raised in the middle of a call."""


def attempt(draw: random.Random, own: list[torch.Tensor], pattern: Pattern, schedule: Schedule) -> None:
    """A call with a fault on one rank; no rank may end with a result where another dtype or no call came."""
    kind, guilty = draw.choice(FAULTS), draw.randrange(dist.get_world_size()) == dist.get_rank()

    def raising(*given: Any, **options: Any) -> Any:
        raise OnPurpose

    ended = False
    try:
        if guilty and kind == "dtype":
            own = [x.float() for x in own]
        with patch.object(driver, "attend_step", raising) if guilty and kind == "raise" else patch.dict({}):
            if not (guilty and kind == "left out"):
                pattern_attention(*own, pattern, schedule=schedule)
                ended = True
    except (GroupError, OnPurpose):
        pass
    assert kind == "raise" or not ended, f"a call with the fault {kind!r} ended well"
    schedule.reset(60.0)  # type: ignore[attr-defined]


def check(
    draw: random.Random, whole: list[torch.Tensor], pattern: Pattern, schedule: Schedule, backward: bool
) -> float:
    """The largest difference from the oracle, over sampled rows, or over all where gradients are compared too."""
    own = [shard_sequence(x, schedule)[0].requires_grad_(backward) for x in whole]
    positions = shard_sequence(whole[0], schedule)[1]
    out = pattern_attention(*own, pattern, schedule=schedule)
    length, heads = whole[0].shape[1:3]
    counts = pattern.counts(Rectangle(heads, (Span(0, length),), (Span(0, length),)))
    if backward:
        leaves = [x.clone().requires_grad_() for x in whole]
        expected = reference_attention(*leaves, counts).out
        grads = torch.autograd.grad(expected.sin().sum(), leaves)
        found = torch.autograd.grad(out.sin().sum(), own)
        pairs = [(out, expected[:, positions]), *((a, b[:, positions]) for a, b in zip(found, grads, strict=True))]
    else:
        rows = sorted(draw.sample(range(length), min(ROWS, length)))
        here = [n for n, position in enumerate(positions.tolist()) if position in rows]
        at = positions[here]
        expected = reference_attention(whole[0][:, at], whole[1], whole[2], np.asarray(counts)[:, at.numpy()]).out
        pairs = [(out[:, here], expected)]
    return max((float((a - b).detach().abs().max()) for a, b in pairs if a.numel()), default=0.0)


def run_rank(rank: int, world: int, steps: int, seed: int, one_in: int, folder: str) -> None:
    """One rank."""
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    draw, worst, faults = random.Random(seed), 0.0, 0
    before: tuple[int, int, int] | None = None
    for step in range(steps):
        length = draw.randint(2, 90)
        pattern, (schedule, impatient) = draw_pattern(draw, length), draw_schedule(draw, length)
        generator = torch.Generator().manual_seed(step)
        whole = [
            torch.randn(1, length, h, 4, dtype=torch.float64, generator=generator) for h in (2 * world, world, world)
        ]
        if draw.random() < 1 / one_in:
            attempt(draw, [shard_sequence(x, schedule)[0] for x in whole], pattern, impatient)
            faults += 1
        worst = max(worst, check(draw, whole, pattern, schedule, step % 10 == 0))
        assert worst < 1e-12, f"step {step}: {worst} under {schedule}, {pattern}, {length} tokens"
        if step == steps // 10:
            gc.collect()
            before = threading.active_count(), len(os.listdir("/proc/self/fd")), peak_bytes()
    gc.collect()
    assert before is not None
    assert threading.active_count() <= before[0] and len(os.listdir("/proc/self/fd")) <= before[1], (
        "threads or descriptors grew"
    )
    assert peak_bytes() - before[2] < GROWTH, f"memory grew by {peak_bytes() - before[2]} bytes"
    dist.barrier()
    if rank == 0:
        grown = (peak_bytes() - before[2]) >> 10
        print(
            f"{steps} steps on {world} ranks, {faults} faults: worst difference {worst:.1e}, peak grew by {grown} KiB"
        )
    dist.destroy_process_group()


def peak_bytes() -> int:
    """Of resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main() -> int:
    """Start the ranks, wait for them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one-in", type=int, default=50, help="calls of which one has a fault")
    parser.add_argument("--rank", nargs=2, help="of one rank: its number, and where to meet")
    asked = parser.parse_args()
    if asked.rank:
        run_rank(int(asked.rank[0]), asked.ranks, asked.steps, asked.seed, asked.one_in, asked.rank[1])
        return 0
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    options = [
        "--steps",
        str(asked.steps),
        "--ranks",
        str(asked.ranks),
        "--seed",
        str(asked.seed),
        "--one-in",
        str(asked.one_in),
    ]
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen([sys.executable, __file__, *options, "--rank", str(n), folder], env=environment)
            for n in range(asked.ranks)
        ]
        try:
            statuses = [rank.wait(timeout=60 + 3 * asked.steps) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main())
