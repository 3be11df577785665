"""One rank on one of `tools.hosts`, started by torchrun: `hosts_checks.py SCENARIO FOLDER`."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from longattn.attention import AllGather, GroupError, Ring, Schedule, Ulysses, pattern_attention, shard_sequence
from longattn.patterncache import Dilated

LENGTH, HEADS, CALLS = 96, 4, 3
PATTERN = Dilated((12, 48, 96), (1, 2, 4), causal=True)


def call(schedule: Schedule) -> bool:
    """Whether output and gradients of this rank are those of the whole sequence."""
    whole = [
        torch.randn(1, LENGTH, HEADS, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        for n in range(3)
    ]
    leaves = [x.clone().requires_grad_() for x in whole]
    out = pattern_attention(leaves[0], leaves[1], leaves[2], PATTERN)
    expected = [out, *torch.autograd.grad(out.sin().sum(), leaves)]
    own = [shard_sequence(x, schedule)[0].requires_grad_() for x in whole]
    out = pattern_attention(own[0], own[1], own[2], PATTERN, schedule=schedule)
    computed = [out, *torch.autograd.grad(out.sin().sum(), own)]
    return all(torch.allclose(a, shard_sequence(b, schedule)[0]) for a, b in zip(computed, expected, strict=True))


def cut(folder: Path, group: dist.ProcessGroup) -> None:
    """Calls until the link is cut: every rank raises GroupError within the schedule's timeout; when the link is back, all are right after a reset."""
    ring = Ring(group, layout="zigzag", lengths=LENGTH, timeout=4.0)
    rank = dist.get_rank()
    (folder / f"calling{rank}").touch()
    failure: GroupError | None = None
    while failure is None:
        try:
            assert call(ring)
        except GroupError as error:
            failure = error
    assert failure.rank not in (None, rank), failure
    (folder / f"failed{rank}").touch()
    ring.reset(60.0)
    assert call(ring)


def main() -> None:
    """Meet, check."""
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=90))
    group = dist.group.WORLD
    assert group is not None
    for schedule in (Ring(group, layout="zigzag"), AllGather(group), Ulysses(group)):
        for _ in range(CALLS):
            assert call(schedule), schedule
    if scenario == "cut":
        cut(folder, group)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
