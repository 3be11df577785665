"""One rank of a measured step: `python -m benchmarks.simulation_rank WORLD RANK FOLDER TASK SIZE`. Rank 0 prints the answer as JSON.

TASK "device", alone: FLOP a second of a forward and backward of dense attention over SIZE tokens, and bytes a second of a copy. TASK "link": bytes
a second that each of two ranks receives, seconds of a small message, and seconds of a step of a ring whose tensors are tiny. TASK "steps":
milliseconds of a forward and backward of each of `CALLS` over SIZE tokens, of the slowest rank. TASK "memory": bytes of each of them, on the rank that
holds most: q, k, v and the growth of resident memory.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from benchmarks.memory import ResidentPeak
from benchmarks.ring_rank import run_rank
from longattn.attention import Ring, Ulysses, pattern_attention, shard_sequence
from longattn.attention.schedules.all_gather import AllGather
from longattn.attention.schedules.base import Schedule
from longattn.kernels import attend
from longattn.patterncache import Dilated, Full, Pattern, Window

HEADS, HEAD_DIM = 8, 64
CALLS: tuple[tuple[str, str, Callable[[int], Pattern]], ...] = (
    ("full", "ring zigzag", lambda length: Full(causal=True)),
    ("full", "ring contiguous", lambda length: Full(causal=True)),
    ("full", "all_gather", lambda length: Full(causal=True)),
    ("full", "ulysses", lambda length: Full(causal=True)),
    ("window", "ring contiguous", lambda length: Window(length // 4)),
    (
        "dilated",
        "ring zigzag",
        lambda length: Dilated((length // 4, length // 2, length), (1, 2, 4), causal=True),
    ),
)
"""Names of pattern and engine, and the pattern of a length."""


def engine_of(name: str, length: int) -> Schedule:
    """The schedule of `simulation.ENGINES` over all ranks."""
    kind, _, layout = name.partition(" ")
    group = dist.group.WORLD
    assert group is not None
    if kind == "ring":
        return Ring(group, layout=layout, lengths=length)  # type: ignore[arg-type]
    return Ulysses(group, lengths=length) if kind == "ulysses" else AllGather(group, lengths=length)


def median(run: Callable[[], object], turns: int) -> float:
    """Seconds of the slowest rank, after a first turn that loads and plans."""
    taken: list[float] = []
    for _ in range(turns + 1):
        dist.barrier()
        began = time.perf_counter()
        run()
        slowest = torch.tensor(time.perf_counter() - began)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        taken.append(slowest.item())
    return statistics.median(taken[1:])


def device(length: int) -> dict[str, float]:
    """FLOP a second and bytes a second, as `Hardware` has them."""
    leaves = [torch.randn(1, length, HEADS, HEAD_DIM, requires_grad=True) for _ in range(3)]

    def step() -> None:
        out = attend(leaves[0], leaves[1], leaves[2], Full(causal=True)).out
        torch.autograd.grad(out.sum(), leaves)

    pairs = HEADS * length * (length + 1) // 2
    x, y = torch.randn(1 << 25), torch.empty(1 << 25)
    copied = median(lambda: y.copy_(x), 5)
    return {"flops": 3.5 * 4 * HEAD_DIM * pairs / median(step, 5), "bandwidth": 2 * x.nbytes / copied}


def link() -> dict[str, float]:
    """Bytes a second, seconds of a small message, seconds of a step with next to no products."""
    peer = dist.get_world_size() - 1 - dist.get_rank()

    def exchange(x: torch.Tensor, y: torch.Tensor) -> None:
        for request in (dist.isend(x, peer), dist.irecv(y, peer)):
            assert request is not None
            request.wait()

    small, large = torch.zeros(1), torch.zeros(1 << 22)
    latency = median(lambda: exchange(small, torch.empty_like(small)), 20)
    seconds = median(lambda: exchange(large, torch.empty_like(large)), 10)
    tiny = calls_of(64, "ring contiguous", Full())
    return {"latency": latency, "link": large.nbytes / (seconds - latency), "launch": median(tiny, 20) / 4}


def calls_of(length: int, engine: str, pattern: Pattern) -> Callable[[], object]:
    """A forward and backward of this rank's share."""
    schedule = engine_of(engine, length)
    whole = [torch.randn(1, length, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    mine = [shard_sequence(x, schedule)[0].requires_grad_() for x in whole]

    def run() -> object:
        return torch.autograd.grad(pattern_attention(mine[0], mine[1], mine[2], pattern, schedule=schedule).sum(), mine)

    return run


def held(length: int, engine: str, pattern: Pattern) -> float:
    """Bytes of a rank in a forward and backward; of the rank with most."""
    run, peak = calls_of(length, engine, pattern), ResidentPeak()
    run()  # loads and plans
    dist.barrier()
    peak.start()
    run()
    given = 3 * 4 * HEADS * HEAD_DIM * -(-length // dist.get_world_size())
    most = torch.tensor(float(given + (peak.growth() or 0)))
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()


def _answer(task: str, size: int) -> object:
    if task == "memory":
        return [held(size, engine, make(size)) for _, engine, make in CALLS]
    if task == "device":
        return device(size)
    if task == "link":
        return link()
    return [1e3 * median(calls_of(size, engine, make(size)), 3) for _, engine, make in CALLS]


if __name__ == "__main__":
    run_rank(_answer)
