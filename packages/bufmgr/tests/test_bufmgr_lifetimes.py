"""Ends that nobody plans: exceptions, dead managers, cycles, threads, forks, interpreter exit."""

import gc
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from longattn.bufmgr import ArenaAllocator, AttentionBufferManager, BufferConfig, BufferType, MemoryPool
from longattn.bufmgr.leasing.lease import Lease
from longattn.bufmgr.memory.arena import ArenaBlock
from longattn.bufmgr.memory.forking import Gate
from longattn.bufmgr.testing import FailingAllocator

TEMP = BufferType.TEMP


def test_an_exception_in_user_code_leaves_nothing_leased():
    manager = AttentionBufferManager()

    def work() -> None:
        scratch = manager.allocate(TEMP, (64,))
        raise RuntimeError(f"in the middle of {scratch.shape}")

    for _ in range(3):
        with pytest.raises(RuntimeError, match="in the middle"):
            work()
    gc.collect()  # the traceback held the frame
    stats = manager.get_stats()
    assert (stats["outstanding"], stats["cached_buffers"]) == (0, stats["cache_misses"])


def test_a_failure_inside_torch_loses_nothing(monkeypatch: pytest.MonkeyPatch):
    """If torch refuses to lay a tensor over a block, its error comes through and the block goes back."""
    upstream = FailingAllocator()
    manager = AttentionBufferManager(upstream=upstream)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no such layout")

    with monkeypatch.context() as patch:
        patch.setattr("torch.frombuffer", refuse)
        with pytest.raises(RuntimeError, match="no such layout"):
            manager.allocate(TEMP, (2**16,))
    assert (manager.get_stats()["outstanding"], upstream.held_bytes) == (0, 0)


def test_buffers_outlive_their_manager():
    """Free memory goes when the manager dies, each buffer's when the buffer dies; then nothing is left of either."""
    upstream = FailingAllocator()
    manager = AttentionBufferManager(upstream=upstream)
    manager.deallocate(manager.allocate(TEMP, (128,), torch.uint8), TEMP)
    tensor = manager.allocate(TEMP, (256,), torch.uint8).fill_(5)
    view = tensor[:10]
    del manager
    gc.collect()
    assert upstream.held_bytes == 256
    del tensor
    assert (upstream.held_bytes, view.tolist()) == (256, [5] * 10)
    before = len(Lease.live)
    del view
    assert (upstream.held_bytes, len(Lease.live)) == (0, before - 1)


def test_a_new_handle_at_the_address_of_a_dead_one():
    """Handles are found by id, and ids come again: leases whose handle died, but not their memory, are not confused."""
    manager = AttentionBufferManager()
    views = [manager.allocate(TEMP, (8,)).fill_(turn).detach() for turn in range(20)]
    tensors = [manager.allocate(TEMP, (8,)) for _ in range(20)]
    manager.check_valid()
    while tensors:
        tensor = tensors.pop()
        manager.deallocate(tensor, TEMP)
        assert tensor.shape == (0,)
    manager.check_valid()
    assert [view[0].item() for view in views] == list(range(20))
    views.clear()
    manager.check_valid()
    assert manager.get_stats()["outstanding"] == 0


def test_buffers_in_reference_cycles_come_back():
    upstream = FailingAllocator()
    manager = AttentionBufferManager(upstream=upstream)
    cycle: dict[str, object] = {"buffer": manager.allocate(TEMP, (256,)), "manager": manager}
    cycle["self"] = cycle
    del cycle, manager
    gc.collect()
    assert upstream.held_bytes == 0


def test_a_finaliser_may_use_the_manager():
    """An object that dies inside a locked region and releases a buffer neither blocks nor breaks anything."""
    manager = AttentionBufferManager()
    tensor = manager.allocate(TEMP, (8,))
    assert manager._book._gate.enter(blocking=True)
    manager.deallocate(tensor, TEMP)
    other = manager.allocate(TEMP, (8,))  # a slot: needs no gate
    large = manager.allocate(TEMP, (100,))  # the cache is out of reach here: new memory
    manager._book._gate.leave()
    assert (other.shape, large.shape) == ((8,), (100,))
    del other, large
    manager.check_valid()
    assert manager.get_stats()["cached_buffers"] == 2


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_owner_in_a_cycle_may_release(device: str):
    """The collector calls __del__ of an object in a cycle when every weak reference into it is gone already."""
    manager = AttentionBufferManager()
    outcomes = []

    class Owner:
        def __init__(self) -> None:
            self.me, self.tensor = self, manager.allocate(TEMP, (8,), device=device)

        def __del__(self) -> None:
            manager.deallocate(self.tensor, TEMP)
            outcomes.append(manager.get_stats()["outstanding"])

    Owner()
    gc.collect()
    assert outcomes == [0]


def test_gate_lets_one_in_and_no_thread_twice():
    gate = Gate()
    assert gate.enter(blocking=True)
    assert not gate.enter(blocking=True)
    with ThreadPoolExecutor(1) as other:
        assert not other.submit(gate.enter, blocking=False).result()
        gate.leave()
        assert other.submit(gate.enter, blocking=False).result()
        other.submit(gate.leave).result()
    assert gate.enter(blocking=False)


class AskedGate(Gate):
    """A gate that notes when a thread other than its maker's wants to enter."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.asked = threading.current_thread(), threading.Event()

    def enter(self, *, blocking: bool) -> bool:
        if threading.current_thread() is not self.maker:
            self.asked.set()
        return super().enter(blocking=blocking)


def result_after_waiting(gate: AskedGate, call: Callable[[], object]) -> object:
    """What a call in another thread returns; it must not do so before this thread, which is inside the gate, has left it."""
    with ThreadPoolExecutor(1) as other:
        future = other.submit(call)
        try:
            assert gate.asked.wait(20)
            with pytest.raises(TimeoutError):
                future.result(0.05)
        finally:
            gate.leave()
        return future.result(60)


CPU = torch.device("cpu")
WAITERS: list[tuple[type[Any], Callable[[Any], object], object]] = [
    (AttentionBufferManager, lambda manager: manager.allocate(TEMP, (4,)).shape, (4,)),
    (AttentionBufferManager, lambda manager: manager.preallocate_buffers(1, 2, 1, 4), 4),
    (AttentionBufferManager, lambda manager: manager.clear_cache(), None),
    (MemoryPool, lambda pool: pool.empty((4,), torch.float32, CPU, "temp").shape, (4,)),
    (MemoryPool, lambda pool: pool.reclaim(10**9), 0),
    (ArenaAllocator, lambda arena: type(arena.allocate(2**20)), ArenaBlock),
    (ArenaAllocator, lambda arena: arena.trim(), 0),
    (ArenaAllocator, lambda arena: arena.snapshot(), []),
]


@pytest.mark.parametrize(("make", "call", "expected"), WAITERS)
def test_calls_wait_for_a_thread_inside(make: type[Any], call: Callable[[Any], object], expected: object):
    """And then are served as ever: by the cache, not past it."""
    owner, gate = make(), AskedGate()
    (owner if make is ArenaAllocator else owner._book)._gate = gate
    assert gate.enter(blocking=True)
    assert result_after_waiting(gate, lambda: call(owner)) == expected
    owner.check_valid()


@pytest.mark.parametrize(
    "make", [lambda: AttentionBufferManager(enable_reuse=False), lambda: MemoryPool(max_cached_buffers=0)]
)
@pytest.mark.parametrize("read", ["get_stats", "memory_summary"])
def test_what_reads_counts_waits_for_a_thread_inside(make: Callable[[], Any], read: str):
    """A buffer that was dropped meanwhile is counted as gone."""
    owner, gate = make(), AskedGate()
    owner._book._gate = gate
    tensor = owner.empty((100,), torch.float32, CPU, "temp")
    assert gate.enter(blocking=True)
    del tensor
    assert owner._book.counts[TEMP].leases == 1
    result_after_waiting(gate, getattr(owner, read))
    assert owner._book.counts[TEMP].leases == 0


@pytest.mark.parametrize("make", [AttentionBufferManager, MemoryPool])
def test_threads_never_share_a_buffer(make: type[AttentionBufferManager] | type[MemoryPool]):
    """Eight threads lease, fill, check, view, release and drop at once: no alias, no loss, all comes home."""
    allocator = make()
    start = threading.Barrier(8)
    cpu = torch.device("cpu")

    def work(seed: int) -> None:
        rng = random.Random(seed)
        start.wait()
        for turn in range(200):
            mark = float(seed * 1000 + turn)
            tensor = allocator.empty((rng.choice([16, 64, 20000]),), torch.float32, cpu, "temp").fill_(mark)
            view = tensor[3:] if rng.random() < 0.3 else None
            assert bool((tensor == mark).all())
            if rng.random() < 0.8:
                allocator.release(tensor, "temp")
            if view is not None:
                assert bool((view == mark).all())

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, seed) for seed in range(8)]:
            future.result()
    allocator.check_valid()
    stats = allocator.get_stats()
    assert stats.get("outstanding", 0) == 0
    if isinstance(allocator, AttentionBufferManager):
        assert stats["cache_hits"] + stats["cache_misses"] == 1600


def test_two_threads_releasing_one_buffer():
    """One wins, the other gets a ValueError; the memory comes back once."""
    manager = AttentionBufferManager()

    def release(tensor: torch.Tensor, start: threading.Barrier) -> str:
        start.wait()
        try:
            manager.deallocate(tensor, TEMP)
        except ValueError:
            return "refused"
        return "released"

    with ThreadPoolExecutor(2) as pool:
        for _ in range(30):
            tensor, start = manager.allocate(TEMP, (64,)), threading.Barrier(2)
            futures = [pool.submit(release, tensor, start) for _ in range(2)]
            assert sorted(future.result() for future in futures) == ["refused", "released"]
            del tensor, futures
    manager.check_valid()
    assert manager.get_stats()["outstanding"] == 0


def test_blocks_of_dropped_buffers_stay_bounded():
    """Memory of buffers that are only dropped is bounded without any further call to the manager."""
    upstream = FailingAllocator()
    manager = AttentionBufferManager({TEMP: BufferConfig(max_cached_buffers=3)}, upstream=upstream)
    tensors = [manager.allocate(TEMP, (64,), torch.uint8) for _ in range(20)]
    tensors.clear()
    assert upstream.held_bytes == 3 * 64


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("numel", [64, 20_000], ids=["small", "mapped"])  # torch's own threads do not survive a fork
def test_fork(numel: int):
    """A child starts with an empty cache, works, and its writes never show in the parent."""
    manager = AttentionBufferManager()
    live = manager.allocate(TEMP, (numel,)).fill_(1.0)
    manager.deallocate(manager.allocate(TEMP, (numel,)).fill_(2.0), TEMP)
    assert manager._book._gate.enter(blocking=True)  # as if another thread were inside at the fork
    manager._book._gate._lock.release()
    child = os.fork()
    if child == 0:
        ok = False
        signal.alarm(30)  # rather dead than hanging
        try:
            ok = manager.get_stats()["cached_buffers"] == 0
            live.fill_(9.0)
            mine = manager.allocate(TEMP, (numel,)).fill_(8.0)
            manager.deallocate(mine, TEMP)
            again = manager.allocate(TEMP, (numel,))
            ok = ok and manager.get_stats()["cache_hits"] == 1 and again.eq(8.0).all().item()
            manager.check_valid()
        finally:
            os._exit(0 if ok else 1)
    manager._book._gate._inside = False
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bool((live == 1.0).all())
    reused = manager.allocate(TEMP, (numel,))
    assert (manager.get_stats()["cache_hits"], reused.unique().tolist()) == (1, [2.0])


def test_interpreter_exit_is_silent():
    """Buffers, views, graphs, caches, cycles and a finaliser that live at exit cause no message and no failure."""
    code = """
import torch
from longattn.bufmgr import AttentionBufferManager, get_global_memory_pool
manager = AttentionBufferManager()
kept = manager.allocate("temp", (100000,))
small = manager.allocate("temp", (10,))[2:]
meta = manager.allocate("output", (10,), device="meta")
manager.deallocate(manager.allocate("query", (10,)), "query")
graph = (torch.ones(10, requires_grad=True) * manager.allocate("key", (10,))).sum()
cycle = [manager.allocate("temp", (100000,)), AttentionBufferManager()]
cycle.append(cycle)
pooled = get_global_memory_pool().empty((70000,), torch.float32, torch.device("cpu"), "temp")
orphan = AttentionBufferManager().allocate("temp", (100000,))
class Last:
    def __init__(self):
        self.manager, self.tensor = manager, manager.allocate("temp", (100000,))
    def __del__(self):
        self.manager.deallocate(self.tensor, "temp")
last = Last()
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
