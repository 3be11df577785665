"""One sequence over several processes, which torchrun starts.

    ./run python -m torch.distributed.run --standalone --nproc-per-node 2 examples/ring_torchrun.py

Each rank holds its rows of the sequence and attends to all of it. Rank 0 compares output and gradients with one process that has the whole sequence.
"""

import argparse
from datetime import timedelta

import torch
import torch.distributed as dist

from longattn.attention import Ring, choose, pattern_attention, shard_sequence, unshard_sequence
from longattn.patterncache import Dilated


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--layout", default="zigzag", choices=("contiguous", "zigzag", "striped"))
    given = parser.parse_args(argv)

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))  # on GPUs: "nccl", which was never run so far
    rank, ranks = dist.get_rank(), dist.get_world_size()
    pattern = Dilated((128, 512), (1, 4), causal=True)
    if rank == 0:
        print(choose(ranks, pattern, given.length, 4))

    torch.manual_seed(0)  # the same whole sequence on each rank; a data loader would bring this rank's rows only
    whole = torch.randn(3, 1, given.length, 4, 32)
    ring = Ring(dist.group.WORLD, layout=given.layout)
    q, k, v = (shard_sequence(x, ring)[0].requires_grad_() for x in whole)
    out = pattern_attention(q, k, v, pattern, schedule=ring)
    out.square().sum().backward()
    print(f"rank {rank} of {ranks}: {q.shape[1]} rows of {given.length}")

    parts = [unshard_sequence(x, ring) for x in (out.detach(), q.grad, k.grad, v.grad)]
    if rank == 0:
        q, k, v = (x.clone().requires_grad_() for x in whole)
        alone = pattern_attention(q, k, v, pattern)
        alone.square().sum().backward()
        for name, ours, exact in zip(
            ("output", "dq", "dk", "dv"), parts, (alone.detach(), q.grad, k.grad, v.grad), strict=True
        ):
            torch.testing.assert_close(ours, exact, atol=2e-5, rtol=2e-5)
            print(f"{name} is that of the whole sequence")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
