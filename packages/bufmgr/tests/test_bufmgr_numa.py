"""Placement on NUMA nodes: on a machine that is made up, page by page, and on the machine that runs the tests."""

import ctypes
import errno
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from longattn.bufmgr import (
    ArenaAllocator,
    AttentionBufferManager,
    NumaAllocator,
    Strategy,
    SystemAllocator,
    migrate,
    numa_policy,
    numa_topology,
    read_placement,
)
from longattn.bufmgr.memory.allocator import Block
from longattn.bufmgr.numa import placer
from longattn.bufmgr.numa.placement import NumaMachine
from longattn.bufmgr.numa.system_calls import SystemCalls, system_calls
from longattn.bufmgr.numa.topology import parse_list, read_topology
from longattn.bufmgr.testing import FailingAllocator

PAGE = mmap.PAGESIZE
NODES = (0, 2)  # numbers need not be dense
DEFAULT, PREFER, BIND, INTERLEAVE = 0, 1, 2, 3


def nodes_in(mask: Any) -> tuple[int, ...]:
    return (
        ()
        if mask is None
        else tuple(64 * i + bit for i, word in enumerate(mask) for bit in range(64) if word >> bit & 1)
    )


class FakeLibc:
    """`syscall` of x86-64 over a made-up page table; `touch` is what the hardware does: it puts missing pages somewhere."""

    def __init__(self) -> None:
        self.pages: dict[int, int] = {}
        self.policies: dict[int, tuple[int, tuple[int, ...]]] = {}  # page -> mode, nodes
        self.thread: tuple[int, tuple[int, ...]] = (DEFAULT, ())
        self.here = 2
        self.full: set[int] = set()
        self.refuses: dict[int, int] = {}
        self.stuck: set[int] = set()

    def syscall(self, number: ctypes.c_long, *arguments: Any) -> int:
        error = self.refuses.get(number.value, 0)
        if not error:
            calls = {
                237: self.mbind,
                238: self.set_policy,
                239: self.get_policy,
                279: self.move_pages,
                309: self.getcpu,
            }
            error = calls[number.value](*arguments)
        ctypes.set_errno(error)
        return -1 if error else 0

    def mbind(self, address: Any, length: Any, mode: Any, mask: Any, bits: Any, flags: Any) -> int:
        if address.value % PAGE or (mode.value != DEFAULT and not set(nodes_in(mask)) <= set(NODES)):
            return errno.EINVAL
        assert (mask is None) == (mode.value == DEFAULT) and bits.value in (0, 1024)
        for page in range(address.value, address.value + length.value, PAGE):
            self.policies[page] = (mode.value, nodes_in(mask))
            if flags.value & 2 and page in self.pages and self.pages[page] not in nodes_in(mask):
                self.put(page)
        return 0

    def set_policy(self, mode: Any, mask: Any, bits: Any) -> int:
        self.thread = (mode.value, nodes_in(mask))
        return 0

    def get_policy(self, mode: Any, mask: Any, bits: Any, address: Any, flags: Any) -> int:
        mode._obj.value = self.thread[0]
        for node in self.thread[1]:
            mask[node // 64] |= 1 << node % 64
        return 0

    def move_pages(self, pid: Any, count: Any, addresses: Any, goals: Any, status: Any, flags: Any) -> int:
        assert pid.value == 0 and (flags.value == 2) == (goals is not None)
        for i in range(count.value):
            page = addresses[i] // PAGE * PAGE
            if goals is not None and page in self.pages and page not in self.stuck:
                self.pages[page] = goals[i]
            # The kernel has one answer for a missing page, and another for a missing table of pages.
            status[i] = self.pages.get(page, -errno.ENOENT if page // PAGE % 2 else -errno.EFAULT)
            if goals is not None and page in self.stuck:
                status[i] = -errno.EBUSY
        return 0

    def getcpu(self, cpu: Any, node: Any, unused: Any) -> int:
        node._obj.value = self.here
        return 0

    def put(self, page: int) -> None:
        mode, nodes = self.policies.get(page, (DEFAULT, ()))
        if mode == DEFAULT:
            mode, nodes = self.thread
        choices = {
            DEFAULT: (self.here,),
            PREFER: nodes,
            BIND: nodes,
            INTERLEAVE: (nodes[page // PAGE % len(nodes)],) if nodes else (),
        }[mode]
        room = [node for node in choices if node not in self.full]
        if not room and mode != BIND:
            room = [node for node in NODES if node not in self.full]
        self.pages[page] = room[0]

    def touch(self, tensor: torch.Tensor) -> None:
        for page in range(tensor.data_ptr() // PAGE * PAGE, tensor.data_ptr() + tensor.nbytes, PAGE):
            if page not in self.pages:
                self.put(page)


def make_sys(root: Path, memory: dict[int, int], online: str) -> Path:
    folder = root / "sys/devices/system/node"
    folder.mkdir(parents=True)
    (folder / "online").write_text(online + "\n")
    for node, kib in memory.items():
        (folder / f"node{node}").mkdir()
        (folder / f"node{node}/meminfo").write_text(f"Node {node} MemTotal: {kib:>15} kB\nNode {node} MemFree: 1 kB\n")
        (folder / f"node{node}/cpulist").write_text(f"{4 * node}-{4 * node + 1},{4 * node + 3}\n")
        (folder / f"node{node}/distance").write_text("10 21 31\n")
    return root


@pytest.fixture
def libc() -> FakeLibc:
    return FakeLibc()


@pytest.fixture
def machine(tmp_path: Path, libc: FakeLibc) -> NumaMachine:
    """Nodes 0 and 2 have memory, node 1 has processors only."""
    topology = read_topology(make_sys(tmp_path, {0: 1000, 1: 0, 2: 2000}, "0-2"))
    return NumaMachine(topology, SystemCalls(libc, "x86_64"))


def tensor_over(block: Block) -> torch.Tensor:
    return torch.frombuffer(memoryview(block.memory), dtype=torch.uint8)


def test_topology_is_read_from_sys(machine: NumaMachine, tmp_path: Path):
    topology = machine.topology
    assert [node.index for node in topology.nodes] == [0, 1, 2]
    assert topology.memory_nodes == NODES
    assert (topology.nodes[2].cpus, topology.nodes[2].memory_bytes) == ((8, 9, 11), 2000 * 1024)
    assert topology.nodes[0].distances == (10, 21, 31)
    assert parse_list("") == () and parse_list("7\n") == (7,)
    nowhere = NumaMachine(read_topology(tmp_path / "nowhere"), machine.calls)
    assert nowhere.topology.nodes == () and "no nodes with memory" in str(nowhere.why_inactive())
    assert "no Linux" in str(NumaMachine(topology, None).why_inactive())
    assert machine.why_inactive() is None


@pytest.mark.parametrize(
    ("policy", "nodes", "expected"),
    [
        ("bind", (0,), {0: 16}),
        ("bind", None, {2: 16}),
        ("prefer", (0,), {0: 16}),
        ("prefer", None, {2: 16}),
        ("interleave", None, {0: 8, 2: 8}),
        ("interleave", (2,), {2: 16}),
    ],
)
@pytest.mark.parametrize("touched_before", [False, True])
def test_blocks_are_placed_and_read_back(
    policy: Any, nodes: tuple[int, ...] | None, expected: dict[int, int], touched_before: bool,
    machine: NumaMachine, libc: FakeLibc,
):  # fmt: skip
    """Also where the pages are on another node already, from an earlier user of the same memory."""
    below = SystemAllocator()
    block = below.allocate(16 * PAGE)
    if touched_before:
        libc.here = 0 if expected == {2: 16} else 2
        libc.touch(tensor_over(block))
        libc.here = 2

    class Same(FailingAllocator):
        def allocate(self, nbytes: int) -> Block:
            return block

        def deallocate(self, block: Block) -> None:
            pass

    allocator = NumaAllocator(Same(), policy, nodes, machine=machine)
    assert allocator.inactive is None
    tensor = tensor_over(allocator.allocate(16 * PAGE))
    libc.touch(tensor)
    assert read_placement(tensor, machine=machine).by_node == expected
    allocator.deallocate(block)
    assert set(libc.policies.values()) == {(DEFAULT, ())}


def test_what_is_reported_is_where_pages_are(machine: NumaMachine, libc: FakeLibc):
    """A full node, untouched pages and pages that do not move: asked for is not got, and the report says so."""
    allocator = NumaAllocator(SystemAllocator(), "prefer", (0,), machine=machine)
    tensor = tensor_over(allocator.allocate(32 * PAGE))
    first = tensor[: 8 * PAGE]
    libc.touch(first)
    libc.full.add(0)
    libc.touch(tensor[8 * PAGE : 24 * PAGE])
    report = read_placement(tensor, machine=machine)
    assert (report.by_node, report.untouched, report.pages) == ({0: 8, 2: 16}, 8, 32)
    assert (report.misplaced((0,)), report.misplaced((0, 2))) == (16, 0)
    libc.stuck = {first.data_ptr(), first.data_ptr() + PAGE}
    moved = migrate(tensor, 2, machine=machine)
    assert (moved.by_node, moved.untouched) == ({0: 2, 2: 22}, 8)
    assert moved.misplaced((2,)) == 2


def test_a_refusal_is_an_error_and_no_block_stays_out(machine: NumaMachine, libc: FakeLibc):
    failing = FailingAllocator(ArenaAllocator())
    allocator = NumaAllocator(failing, "bind", (2,), machine=machine)
    libc.refuses[237] = errno.ENOMEM
    with pytest.raises(MemoryError, match="refused the policy 'bind' on nodes .2,. for 65536 bytes: .*Cannot allocate"):
        allocator.allocate(65536)
    assert (failing.blocks, allocator.placed) == ({}, 0)
    libc.refuses.clear()
    block = allocator.allocate(65536)
    libc.refuses[237] = errno.ENOMEM
    allocator.deallocate(block)  # the block goes back in any case; what was not taken back is counted
    assert (failing.blocks, allocator.not_reset) == ({}, 1)
    libc.refuses = {279: errno.EPERM}
    with pytest.raises(OSError, match="not permitted"):
        read_placement(torch.ones(3), machine=machine)


def test_nodes_without_memory_are_refused(machine: NumaMachine):
    for nodes in ((1,), (0, 3)):
        with pytest.raises(ValueError, match=r"nodes must be nodes with memory, \(0, 2\) here, got"):
            NumaAllocator(SystemAllocator(), "bind", nodes, machine=machine)
    with pytest.raises(ValueError, match=r"node must be nodes with memory"):
        migrate(torch.ones(3), 1, machine=machine)
    with pytest.raises(ValueError, match="must be plain, contiguous and in host memory"):
        read_placement(torch.ones(4, 4).T)


def test_a_policy_of_the_thread_is_undone(machine: NumaMachine, libc: FakeLibc):
    def fail_inside() -> None:
        with numa_policy("interleave", machine=machine) as active:
            assert active and libc.thread == (INTERLEAVE, NODES)
            tensor = tensor_over(SystemAllocator().allocate(16 * PAGE))
            libc.touch(tensor)
            assert read_placement(tensor, machine=machine).by_node == {0: 8, 2: 8}
            raise KeyError

    libc.thread = (PREFER, (2,))
    with pytest.raises(KeyError):
        fail_inside()
    assert libc.thread == (PREFER, (2,))


@pytest.fixture
def everywhere(machine: NumaMachine, monkeypatch: pytest.MonkeyPatch) -> Iterator[NumaMachine]:
    monkeypatch.setattr(placer, "this_machine", lambda: machine)
    return machine


def test_a_manager_places_large_buffers(everywhere: NumaMachine, libc: FakeLibc):
    """NUMA_AWARE is chosen for buffers over 16 MiB of types that prefer it; a block that comes back has its policy taken."""
    manager = AttentionBufferManager(lightweight=False, numa="interleave", upstream=ArenaAllocator())
    large, small = (5000, 1024), (1000, 1024)
    assert manager.strategy("scores", large) is Strategy.NUMA_AWARE
    assert manager.strategy("scores", small) is Strategy.DIRECT
    tensor = manager.allocate("scores", large)
    libc.touch(tensor)
    report = read_placement(tensor, machine=everywhere)
    assert set(report.by_node) == set(NODES) and report.by_node[0] == report.by_node[2]
    manager.allocate("scores", small)
    manager.allocate("query", large)
    stats = manager.get_stats()
    assert (stats["numa"]["active"], stats["numa"]["placed"], stats["strategies"]["numa_aware"]) == (True, 1, 1)
    manager.deallocate(tensor, "scores")
    again = manager.allocate("scores", large)  # the same block, placed already
    assert (manager.get_stats()["numa"]["placed"], again.shape) == (1, large)
    del again
    manager.clear_cache()
    assert (DEFAULT, ()) in libc.policies.values()
    assert (INTERLEAVE, NODES) not in libc.policies.values()
    manager.check_valid()


def test_a_refused_placement_leases_nothing(everywhere: NumaMachine, libc: FakeLibc):
    manager = AttentionBufferManager(lightweight=False, upstream=ArenaAllocator())
    libc.refuses[237] = errno.ENOMEM
    with pytest.raises(MemoryError, match="refused the policy 'prefer'") as caught:
        manager.allocate("scores", (5000, 1024))
    assert "what to do" in caught.value.__notes__[0]
    del caught
    assert manager.get_stats()["outstanding"] == 0
    libc.refuses.clear()
    assert manager.allocate("scores", (5000, 1024)).shape == (5000, 1024)


def test_lightweight_managers_place_nothing(everywhere: NumaMachine, libc: FakeLibc):
    manager = AttentionBufferManager(upstream=ArenaAllocator())
    manager.allocate("scores", (5000, 1024))
    assert libc.policies == {} and manager.get_stats()["strategies"]["numa_aware"] == 0


# The machine that runs the tests.
here = pytest.mark.skipif(system_calls() is None, reason="no Linux on x86-64 or aarch64")


@here
def test_this_machines_pages_are_on_its_nodes():
    topology = numa_topology()
    tensor = torch.frombuffer(SystemAllocator().allocate(64 * PAGE).memory, dtype=torch.uint8)
    tensor[: 60 * PAGE].fill_(1)
    report = read_placement(tensor)
    assert report.pages == 64
    assert set(report.by_node) <= set(topology.memory_nodes)
    if not report.failed:
        assert (sum(report.by_node.values()), report.untouched) == (60, 4)
    node = topology.memory_nodes[0]
    assert migrate(tensor, node).misplaced((node,)) == 0


@here
def test_one_node_is_inactive_and_says_so():
    if len(numa_topology().memory_nodes) > 1:
        pytest.skip("this machine has more than one node: `nox -s numa` checks those")
    manager = AttentionBufferManager(lightweight=False)
    numa = manager.get_stats()["numa"]
    assert (numa["active"], numa["nodes"]) == (False, 1)
    assert numa["inactive"] == "the system lists 1 node with memory, so there is no choice"
    assert manager.strategy("scores", (5000, 1024)) is not Strategy.NUMA_AWARE
    allocator = NumaAllocator(SystemAllocator(), "interleave")
    assert allocator.inactive == numa["inactive"]
    assert allocator.allocate(70_000).nodes is None
    with numa_policy("bind") as active:
        assert not active
