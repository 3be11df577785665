"""Cases for every rank: traffic, overlap, buffers and data loading."""

import itertools
import time
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from ring_process_setup import LONGNET, RANK, WORLD, engines, randn
from torch.distributed.device_mesh import init_device_mesh

from longattn.attention import (
    Local,
    PatternAttention,
    Ring,
    Wiring,
    balanced_lengths,
    pattern_attention,
)
from longattn.attention.schedules import driver as scheduled
from longattn.attention.schedules.all_gather import AllGather
from longattn.attention.schedules.base import Schedule
from longattn.attention.schedules.place import TransportEvent, note, watch
from longattn.attention.schedules.sharding import shard_sequence, unshard_sequence
from longattn.attention.schedules.traffic import (
    ScheduledCall,
    choose,
    full_ring_bytes,
    gather_traffic,
    ring_traffic,
    ulysses_traffic,
)
from longattn.attention.schedules.ulysses import Ulysses
from longattn.kernels.dispatch.environment import Environment, TorchAllocator
from longattn.kernels.interface import find_plan
from longattn.patterncache import BlockSparse, Dilated, Documents, Full, Pattern, PatternCache, Window


def sent(schedule: Schedule, pattern: Pattern, length: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that all ranks together really send in a forward and in a backward."""
    whole = [randn(2, length, *shape, dtype=dtype) for shape in ((8, 4), (4, 4), (4, 6))]
    leaves = [shard_sequence(x, schedule)[0].requires_grad_() for x in whole]
    with watch() as events:
        out = pattern_attention(*leaves, pattern, schedule=schedule)
        middle = len(events)
        out.sum().backward()
    halves = torch.tensor(
        [sum(e.nbytes for e in half if e.what == "send") for half in (events[:middle], events[middle:])]
    )
    dist.all_reduce(halves)
    return int(halves[0]), int(halves[1])


def case_bytes_are_those_of_the_plans() -> None:
    """What `traffic` counts is what the transport sends, forward and backward, and a ring never sends more than a full one."""
    for pattern in (LONGNET, Full(), Full(causal=True), Window(5), Dilated((37,), (9,))):
        for dtype in (torch.float32, torch.bfloat16):
            call = ScheduledCall(pattern, 37, WORLD, 8, 4, 4, 2, dtype, value_head_dim=6)
            for engine in engines():
                if isinstance(engine, Ring):
                    counted = ring_traffic(call, engine.layout)
                    assert counted.forward <= full_ring_bytes(call)
                else:
                    counted = gather_traffic(call) if isinstance(engine, AllGather) else ulysses_traffic(call)
                assert counted is not None
                assert sent(engine, pattern, 37, dtype) == (counted.forward, counted.backward), (engine, pattern)


def case_nothing_is_sent_where_nobody_sees() -> None:
    """Segments that end where shards end: not a byte."""
    ring = Ring(dist.group.WORLD)
    assert sent(ring, Dilated((8,), (1,)), 8 * WORLD, torch.float32) == (0, 0)
    exchanged = WORLD * (WORLD - 1) // 2 * 2 * 8 * 4 * (4 + 6) * 4
    assert sent(ring, Full(causal=True), 8 * WORLD, torch.float32)[0] == exchanged


def counting(pairs: list[int]):
    """`attend_step`, which appends the pairs of its rectangle."""
    launched = scheduled.attend_step

    def computed(tensors, asked, environment, **options):
        branches = find_plan(asked, environment).branches
        pairs.append(sum(branch.pairs * branch.heads.length for branch in branches))
        return launched(tensors, asked, environment, **options)

    return computed


def case_balanced_shards_compute_what_is_counted() -> None:
    """Each rank computes the pairs that the plans say, hardly more than the mean, and gives what one process gives."""
    length, heads = 240, 4
    blocks = torch.rand(30, 30, generator=torch.Generator().manual_seed(0)) < 0.3
    for pattern in (
        Full(causal=True),
        Dilated((60, 120, 240), (1, 2, 4), causal=True),
        Window(40, causal=True),
        Documents((0, 7, 100, 130, 240), Full(causal=True)),
        BlockSparse(8, blocks.tril().numpy()),
    ):
        lengths = balanced_lengths(pattern, length, WORLD, heads)
        ring = Ring(dist.group.WORLD, lengths=lengths)
        x = randn(1, length, heads, 4)
        part, _ = shard_sequence(x, ring)
        pairs: list[int] = []
        with patch.object(scheduled, "attend_step", counting(pairs)):
            out = pattern_attention(part, part, part, pattern, schedule=ring)
        torch.testing.assert_close(out, shard_sequence(pattern_attention(x, x, x, pattern), ring)[0])
        counted = ring_traffic(ScheduledCall(pattern, length, WORLD, heads, heads), lengths=lengths)
        assert sum(pairs) == counted.work[RANK]
        assert counted.imbalance < 1.05, counted


def case_choose_explains() -> None:
    """The choice is built for the group, and serves."""
    choice = choose(dist.group.WORLD, LONGNET, 37, 8, kv_heads=4, dtype=torch.float64)
    assert choice.schedule is not None and "chosen" in str(choice)
    x = randn(1, 37, 8, 4)
    part, _ = shard_sequence(x, choice.schedule)
    found = unshard_sequence(pattern_attention(part, part, part, LONGNET, schedule=choice.schedule), choice.schedule)
    torch.testing.assert_close(found, pattern_attention(x, x, x, LONGNET))


def case_computing_goes_on_while_keys_travel() -> None:
    """Rank 0's neighbours are late: it has computed on its own keys before theirs come, and posted the turn after before it waits."""
    ring = Ring(dist.group.WORLD, lengths=16 * WORLD)
    part, _ = shard_sequence(randn(1, 16 * WORLD, 4, 4), ring)
    launched = scheduled.attend_step

    def computed(*given, **options):
        state = launched(*given, **options)
        note(TransportEvent("compute", f"from {given[1].k_spans[0] // 16}"))
        return state

    dist.barrier()
    if RANK != 0:
        time.sleep(0.5)
    with patch.object(scheduled, "attend_step", computed), watch() as events:
        started = time.perf_counter()
        pattern_attention(part, part, part, Full(), schedule=ring)
        seconds = time.perf_counter() - started
    if RANK != 0:
        return
    order = [(e.what, e.label) for e in events if e.what in ("post", "arrive", "compute")]
    expected = [("post", "keys 1")] if WORLD > 1 else []
    expected.append(("compute", "from 0"))
    for turn in range(1, WORLD):
        expected.append(("arrive", f"keys {turn}"))
        expected += [("post", f"keys {turn + 1}")] if turn + 1 < WORLD else []
        expected.append(("compute", f"from {-turn % WORLD}"))
    assert order == expected, order
    assert WORLD == 1 or seconds > 0.3, "the delay did not reach rank 0"


def case_buffers_come_from_the_allocator() -> None:
    """COMM leases of an environment: keys of two turns and gradients of one, whatever the number of ranks."""

    class Counting(TorchAllocator):
        def __init__(self) -> None:
            self.leased: list[str] = []

        def empty(self, shape, dtype, device, role):
            self.leased.append(role)
            return super().empty(shape, dtype, device, role)

    environment = Environment(PatternCache(), allocator := Counting())
    part, _ = shard_sequence(randn(1, 37, 4, 4), ring := Ring(dist.group.WORLD))
    pattern_attention(part, part, part, LONGNET, schedule=ring, environment=environment)
    assert ("comm" in allocator.leased) == (WORLD > 1)
    allocator.leased.clear()
    even = [randn(1, 12, 2, 4).requires_grad_() for _ in range(3)]
    pattern_attention(*even, Full(), schedule=ring, environment=environment).sum().backward()
    turns = min(2, WORLD - 1)
    assert allocator.leased.count("comm") == 2 * turns + (2 * turns + 2) * (WORLD > 1)
    managed = PatternAttention(LONGNET, schedule=ring, wiring=Wiring(enable_buffer_manager=True))
    part.requires_grad_()
    for _ in range(2):
        torch.testing.assert_close(
            managed(part, part, part), pattern_attention(part, part, part, LONGNET, schedule=ring)
        )
        managed(part, part, part).sum().backward()
    leased = managed.get_buffer_stats()["types"]["comm"]
    assert (leased["cache_hits"] + leased["cache_misses"] > 0) == (WORLD > 1)


def peak_bytes(call) -> int:
    """The most that torch's allocator holds at a time of what is allocated in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    del kept
    return max(itertools.accumulate(live))


def case_memory_of_a_rank() -> None:
    """A rank holds at most 1.25 times its q, k, v, out and their gradients, and two shards on their way: keys, values, and their float32 gradients."""
    length, heads, dim = 2048, 4, 64
    dilated = Dilated((length, 2 * length), (1, 2), causal=True)
    for dtype, pattern in ((torch.bfloat16, Full(causal=True)), (torch.float32, dilated)):
        ring = Ring(dist.group.WORLD, layout="zigzag", lengths=length * WORLD)
        leaves = [randn(1, length, heads, dim, dtype=dtype).requires_grad_() for _ in range(3)]
        weights = randn(1, length, heads, dim, dtype=dtype)
        outs = []

        def forward(leaves=leaves, pattern=pattern, ring=ring, outs=outs):
            outs[:] = [pattern_attention(*leaves, pattern, schedule=ring)]
            return outs

        def backward(leaves=leaves, weights=weights, outs=outs):
            return torch.autograd.grad(outs[0], leaves, weights)

        forward(), backward()  # what a first call makes stays
        dist.barrier()
        size, numbers = dtype.itemsize, length * heads * dim
        given = numbers * 3 * size
        peak = max(given + peak_bytes(forward), given + numbers * 2 * size + peak_bytes(backward))
        needed = numbers * (5 * size + 3 * 4 + (2 * (2 * size + 2 * 4) if WORLD > 1 else 0))
        share = torch.tensor(peak / needed)
        dist.all_reduce(share, dist.ReduceOp.MAX)  # so that all ranks go on, or none
        assert WORLD == 1 or share <= 1.25, (dtype, pattern, peak / needed)


def case_sequences_come_back_whole() -> None:
    """`unshard_sequence` undoes `shard_sequence`; positions say where rows stood; gradients pass through the cut."""
    for schedule in (*engines(), Local(), Ring(size=3)):
        for length in (37, 2):
            x = randn(2, length, 3).requires_grad_()
            part, positions = shard_sequence(x, schedule)
            torch.testing.assert_close(part, x[:, positions])
            assert torch.equal(unshard_sequence(part, schedule), x.detach())
            assert torch.autograd.grad(part.sum(), x)[0].sum() == part.numel()
    if WORLD == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "heads"))
        both = Ulysses(mesh["heads"], inner=Ring(mesh["ring"], layout="zigzag"))
        x = randn(2, 37, 3)
        assert torch.equal(unshard_sequence(shard_sequence(x, both)[0], both, dist.group.WORLD), x)
        with pytest.raises(ValueError, match="group must be that of all ranks"):
            unshard_sequence(x, both)
