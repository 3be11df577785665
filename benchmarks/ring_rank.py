"""One rank of a ring benchmark: `python -m benchmarks.ring_rank WORLD RANK FOLDER TASK SIZE`. Rank 0 prints the answer as JSON.

TASK "sent": bytes that all ranks' transports send in a forward over dilated attention of SIZE tokens. TASK "time": one forward and
backward of causal attention over SIZE tokens, interleaved with its peers, in milliseconds of the slowest rank. TASK "headers": what announcing
a pass costs alone, and how many a step of SIZE tokens has. TASK "memory": peak growth over q + k + v.
"""

import gc
import importlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel

from benchmarks.memory import ResidentPeak
from longattn.attention import Ring, pattern_attention, shard_sequence
from longattn.attention.schedules.callers import calls_over
from longattn.attention.schedules.headers import Fields
from longattn.attention.schedules.layouts import LAYOUTS
from longattn.attention.schedules.place import Place, watch
from longattn.kernels import attend
from longattn.patterncache import Dilated, Full, Pattern

HEADS = 2
"""Few, so that the slowest peer ends within a minute; ratios do not depend on it."""


def sent(segments: list[int], rates: list[int], causal: bool, length: int) -> int:
    """Bytes of one forward, H=8, D=2, float32, by the transport's own count, over all ranks."""
    ring = Ring(dist.group.WORLD, lengths=length)
    x = torch.randn(1, length // dist.get_world_size(), 8, 2)
    with watch() as events, torch.no_grad():
        pattern_attention(x, x, x, Dilated(segments, rates, causal=causal), schedule=ring)
    total = torch.tensor(sum(event.nbytes for event in events))
    dist.all_reduce(total)
    return int(total)


class _Gathered(torch.autograd.Function):
    """torch's own all-gather of a shard along the sequence; backward is its reduce-scatter."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[override]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        # A batch of 1: rank after rank along the first axis.
        stacked = torch.cat(gradient.chunk(dist.get_world_size(), 1), 0)
        mine = torch.empty_like(stacked[:1])
        dist.reduce_scatter_tensor(mine, stacked)
        return mine


def contenders(pattern: Pattern, length: int) -> dict[str, Callable[[], object]]:
    """Forward and backward of one rank's share, by name."""
    ring = Ring(dist.group.WORLD, layout="zigzag", lengths=length)
    whole = [torch.randn(1, length, HEADS, 64, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    mine = [shard_sequence(x, ring)[0].requires_grad_() for x in whole]
    near = [x.chunk(dist.get_world_size(), 1)[dist.get_rank()].contiguous().requires_grad_() for x in whole]
    zigzag = LAYOUTS["zigzag"](length, dist.get_world_size()).rows()
    everywhere = tuple(span for rows in zigzag for span in rows)
    here = [x.clone().requires_grad_() for x in whole[1:]]

    def backward(out: Tensor, leaves: list[Tensor]) -> object:
        return torch.autograd.grad(out.sum(), leaves)

    def local() -> object:
        state = attend(mine[0], here[0], here[1], pattern, q_spans=ring.held(length), out_dtype=torch.float32)
        return backward(state.out, [mine[0], *here])

    def gathered() -> object:
        # Zigzag too, so that its ranks are as even as the ring's.
        k, v = (_Gathered.apply(x) for x in mine[1:])
        options: dict[str, Any] = {"q_spans": ring.held(length), "k_spans": everywhere, "out_dtype": torch.float32}
        return backward(attend(mine[0], k, v, pattern, **options).out, mine)

    calls: dict[str, Callable[[], object]] = {
        "ring": lambda: backward(pattern_attention(mine[0], mine[1], mine[2], pattern, schedule=ring), mine),
        "local computations": local,
        "gloo all-gather": gathered,
    }
    if importlib.util.find_spec("ring_attention_pytorch") is not None:
        ring_flash_attn = importlib.import_module("ring_attention_pytorch.ring_flash_attention").ring_flash_attn
        calls["ring-attention-pytorch"] = lambda: backward(ring_flash_attn(*near, None, True, 1024, True), near)
    return calls


def in_context_parallel(length: int) -> Callable[[], object]:
    """The same dense causal forward and backward by torch's own `context_parallel`, which cuts whole sequences as it begins."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = [torch.randn(1, HEADS, length, 64, generator=torch.Generator().manual_seed(n)) for n in range(3)]

    def call() -> object:
        buffers = [x.clone() for x in whole]
        with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2, 2, 2]):
            q, k, v = (x.detach().requires_grad_() for x in buffers)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return torch.autograd.grad(out.sum(), [q, k, v])

    return call


def times(length: int, turns: int) -> dict[str, Any]:
    """Under "taken" median milliseconds of the slowest rank, each contender in turn; under "refused" what torch says of those that it cannot run here."""
    calls, refused = contenders(Full(causal=True), length), {}
    peer = in_context_parallel(64)
    try:
        peer()
        calls["torch's context_parallel"] = in_context_parallel(length)
    except NotImplementedError as error:
        refused["torch's context_parallel"] = str(error).splitlines()[0]
    return {"taken": {name: 1e3 * x for name, x in interleaved(calls, turns).items()}, "refused": refused}


def interleaved(calls: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Median seconds of the slowest rank, each call in turn."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            gc.collect()
            dist.barrier()
            began = time.perf_counter()
            call()
            slowest = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            # The first turn loads and plans.
            if turn:
                taken[name].append(slowest.item())
    return {name: statistics.median(samples) for name, samples in taken.items()}


def memory(length: int) -> float:
    """Peak growth of one rank's forward and backward over its q + k + v; the largest of all ranks."""
    ring = Ring(dist.group.WORLD, layout="zigzag", lengths=length)
    shape = (1, length // dist.get_world_size(), 8, 64)
    leaves = [torch.randn(*shape, requires_grad=True) for _ in range(3)]
    small = Ring(dist.group.WORLD, layout="zigzag")
    tiny = [x[:, :64].detach().requires_grad_() for x in leaves]
    torch.autograd.grad(pattern_attention(tiny[0], tiny[1], tiny[2], Full(causal=True), schedule=small).sum(), tiny)
    peak = ResidentPeak()
    peak.start()
    out = pattern_attention(leaves[0], leaves[1], leaves[2], Full(causal=True), schedule=ring)
    torch.autograd.grad(out.sum(), leaves)
    growth = torch.tensor(float(peak.growth() or 0) / (3 * leaves[0].numel() * 4))
    dist.all_reduce(growth, dist.ReduceOp.MAX)
    return growth.item()


def headers(length: int) -> dict[str, float]:
    """Of the headers that announce a pass: microseconds of one alone and of as many plain messages of 32 bytes, how many a step has, and milliseconds of that step."""
    group = dist.group.WORLD
    assert group is not None
    calls, fields = calls_over(Place.of(group)), Fields(phase="alone")
    world, rank = dist.get_world_size(), dist.get_rank()
    peers = [(rank + n) % world for n in range(1, world)]
    numbers = torch.zeros(world, 8)

    def announce() -> None:
        with calls.underway():
            calls.announce(fields)

    def raw() -> None:
        works = [dist.irecv(numbers[peer], peer) for peer in peers] + [
            dist.isend(numbers[rank], peer) for peer in peers
        ]
        for work in works:
            assert work is not None
            work.wait()

    taken: dict[str, list[float]] = {"alone": [], "raw": []}
    for _ in range(11):
        for name, exchange in (("alone", announce), ("raw", raw)):
            dist.barrier()
            began = time.perf_counter()
            for _ in range(50):
                exchange()
            taken[name].append((time.perf_counter() - began) / 50)
    ring = Ring(group, layout="zigzag", lengths=length)
    shape = (1, length // dist.get_world_size(), 8, 64)
    leaves = [torch.randn(*shape, requires_grad=True) for _ in range(3)]
    pattern = Dilated([length // 4, length // 2, length], [1, 2, 4], causal=True)
    steps: list[float] = []
    many = 0
    for _ in range(8):
        dist.barrier()
        number, began = calls.number, time.perf_counter()
        out = pattern_attention(leaves[0], leaves[1], leaves[2], pattern, schedule=ring)
        torch.autograd.grad(out.sum(), leaves)
        steps.append(time.perf_counter() - began)
        many = calls.number - number
    alone, raw_messages = (1e6 * statistics.median(taken[name]) for name in taken)
    return {"alone": alone, "raw": raw_messages, "many": many, "step": 1e3 * statistics.median(steps[1:])}


def run_rank(answer: Callable[[str, int], object]) -> None:
    """Meet in FOLDER, answer TASK for SIZE, and print what rank 0 answers, as JSON; all of it from the command line."""
    world, rank, folder, task, size = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5])
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet-{task}-{world}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world, timeout=timedelta(seconds=300))
    answered = answer(task, size)
    if rank == 0:
        print(json.dumps(answered), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def _answer(task: str, size: int) -> object:
    if task == "sent":
        lists = ([2048, 4096, 8192], [1, 2, 4]), ([2048, 8192, 32768], [1, 4, 16])
        return [sent(*pair, causal, size) for pair in lists for causal in (False, True)]
    if task == "time":
        return times(size, 3)
    return headers(size) if task == "headers" else memory(size)


if __name__ == "__main__":
    run_rank(_answer)
