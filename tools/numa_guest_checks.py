"""The checks that `tools.numa_guest` runs in a machine with two NUMA nodes: where every single page is, by the kernel's own answer."""

from __future__ import annotations

import os
import sys

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
from longattn.bufmgr.numa.system_calls import Policy

PAGES = 2048
NBYTES = PAGES * 4096
BOTH = {0: PAGES // 2, 1: PAGES // 2}


def check(what: str, got: object, expected: object) -> None:
    """Print one result; raise AssertionError where it is not what is expected."""
    sys.stdout.write(f"{'ok' if got == expected else 'WRONG'}: {what}: {got}\n")
    assert got == expected, f"expected {expected}"


def run_on(cpu: int) -> None:
    """Let this thread run on one processor; each node of the guest has one."""
    os.sched_setaffinity(0, {cpu})


def main() -> None:
    """Check topology, policies, memory used before, migration, a thread's policy and a manager."""
    topology = numa_topology()
    check("nodes with memory", topology.memory_nodes, (0, 1))
    check("processors", [node.cpus for node in topology.nodes], [(0,), (1,)])
    check("distances", [node.distances for node in topology.nodes], [(10, 20), (20, 10)])
    # Without huge pages, which the kernel interleaves as a whole.
    below = ArenaAllocator(floor_bytes=64 << 20, huge_pages=False)
    placements: tuple[tuple[Policy, tuple[int, ...] | None, dict[int, int]], ...] = (
        ("bind", (0,), {0: PAGES}),
        ("bind", (1,), {1: PAGES}),
        ("prefer", (1,), {1: PAGES}),
        ("prefer", None, {1: PAGES}),
        ("interleave", None, BOTH),
        ("bind", None, {1: PAGES}),
        ("interleave", None, BOTH),  # over pages that all are on node 1
    )
    for policy, nodes, expected in placements:
        for fresh in (True, False):
            run_on(1)
            allocator = NumaAllocator(ArenaAllocator(huge_pages=False) if fresh else below, policy, nodes)
            block = allocator.allocate(NBYTES)
            tensor = torch.frombuffer(memoryview(block.memory), dtype=torch.uint8)
            run_on(0 if nodes else 1)  # whoever touches it first does not matter where nodes are named
            tensor.fill_(7)
            kind = "fresh memory" if fresh else "memory used before"
            check(f"{policy} {nodes} in {kind}", dict(read_placement(tensor).by_node), expected)
            assert bool((tensor == 7).all())
            del tensor
            allocator.deallocate(block)
    run_on(0)
    tensor = torch.frombuffer(memoryview(ArenaAllocator(huge_pages=False).allocate(NBYTES).memory), dtype=torch.uint8)
    tensor[: NBYTES // 2].fill_(3)
    report = read_placement(tensor)
    check("first touch", (dict(report.by_node), report.untouched), ({0: PAGES // 2}, PAGES // 2))
    check("migrated", dict(migrate(tensor, 1).by_node), {1: PAGES // 2})
    check("content after it", bool((tensor[: NBYTES // 2] == 3).all()), True)
    with numa_policy("bind", (1,)) as active:
        mapped = torch.frombuffer(memoryview(SystemAllocator().allocate(NBYTES).memory), dtype=torch.uint8)
        mapped.fill_(1)
    check("a thread's policy", (active, dict(read_placement(mapped).by_node)), (True, {1: PAGES}))
    manager = AttentionBufferManager(lightweight=False, numa="interleave", upstream=ArenaAllocator(huge_pages=False))
    shape = (5, 1024, 1024)
    check("strategy", manager.strategy("scores", shape), Strategy.NUMA_AWARE)
    scores = manager.allocate("scores", shape).normal_()
    pages = scores.nbytes // 4096
    check("a manager's buffer", dict(read_placement(scores).by_node), {0: pages // 2, 1: pages // 2})
    check("its statistics", (manager.get_stats()["numa"]["active"], manager.get_stats()["numa"]["placed"]), (True, 1))


if __name__ == "__main__":
    main()
