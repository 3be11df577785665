"""Allocators that place their blocks on NUMA nodes."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from longattn.bufmgr.log import LOGGER
from longattn.bufmgr.memory.allocator import Allocator, Block, block_bytes, check_block, check_upstream
from longattn.bufmgr.numa.placement import NumaMachine, check_nodes, check_policy, this_machine
from longattn.bufmgr.numa.system_calls import Policy, SystemCalls


class Placer:
    """Gives blocks a policy while they are out, and takes it from them before they go back to the upstream.

    policy, nodes: see NumaAllocator. placed: how often a block was placed. not_reset: how often the kernel refused to
    take a policy from a block. inactive: why nothing is placed here, None where it is.
    """

    def __init__(
        self,
        upstream: Allocator,
        policy: Policy,
        nodes: Sequence[int] | None = None,
        *,
        machine: NumaMachine | None = None,
    ) -> None:
        check_upstream(upstream)
        check_policy(policy)
        self._machine = this_machine() if machine is None else machine
        self.upstream = upstream
        self.policy: Policy = policy
        self.nodes = None if nodes is None else check_nodes(nodes, self._machine)
        self.placed = self.not_reset = 0
        self.inactive = self._machine.why_inactive()

    @property
    def choices(self) -> int:
        """How many nodes there are to choose from: 1 where nothing is placed."""
        return 1 if self.inactive is not None else len(self._machine.topology.memory_nodes)

    def place(self, block: Block) -> None:
        """Set the block's policy, and move pages that are elsewhere. Raises MemoryError where the kernel refuses."""
        calls, pages = self._machine.calls, _whole_pages(block)
        if self.inactive is not None or calls is None or not pages:
            return
        nodes = self.nodes
        if nodes is None:
            nodes = self._machine.topology.memory_nodes if self.policy == "interleave" else (calls.current_node(),)
        if block.nodes == nodes:  # from its last loan; its policy was not taken from it since
            return
        try:
            calls.bind_range(pages.start, len(pages), self.policy, nodes)
            if self.policy == "interleave":
                _spread(calls, range(pages.start, pages.stop, mmap.PAGESIZE), nodes)
        except OSError as error:
            raise MemoryError(
                f"the system refused the policy {self.policy!r} on nodes {nodes} for {len(pages)} bytes: {error}"
            ) from error
        block.nodes = nodes
        self.placed += 1

    def allocate(self, nbytes: int) -> Block:
        """Return the upstream's block, not placed."""
        return self.upstream.allocate(nbytes)

    def as_dict(self) -> dict[str, object]:
        """Return what statistics say: nodes with memory, policy, whether it is active and why not, and the counters."""
        return {
            "nodes": len(self._machine.topology.memory_nodes),
            "policy": self.policy,
            "active": self.inactive is None,
            "inactive": self.inactive,
            "placed": self.placed,
            "not_reset": self.not_reset,
        }

    def deallocate(self, block: Block) -> None:
        """Set the default policy on what was placed, and give the block to the upstream."""
        check_block(block)
        if block.nodes is not None and self._machine.calls is not None:
            pages = _whole_pages(block)
            try:
                self._machine.calls.bind_range(pages.start, len(pages), None, ())
            except OSError as error:  # this may run in a finaliser, and the block must go back in any case
                self.not_reset += 1
                LOGGER.debug("numa: %d bytes keep the policy %s: %s", len(pages), self.policy, error)
            block.nodes = None
        self.upstream.deallocate(block)


class NumaAllocator(Placer):
    """Places every block of a page or more on nodes.

    policy: "bind" (only there), "prefer" (there while there is room) or "interleave" (page by page). nodes: default the node of
    the thread that allocates, for "interleave" all nodes with memory. On a machine with one node it is inactive, and
    `inactive` says why. `read_placement` tells where pages came to be: what is asked for is not always what one gets.
    """

    def __reduce__(self) -> tuple[type[NumaAllocator], tuple[Allocator, Policy, tuple[int, ...] | None]]:
        return type(self), (self.upstream, self.policy, self.nodes)

    def allocate(self, nbytes: int) -> Block:
        """Return the upstream's block, placed. Raises MemoryError; then no block stays out."""
        block = self.upstream.allocate(nbytes)
        try:
            self.place(block)
        except MemoryError:
            self.upstream.deallocate(block)
            raise
        return block


def _whole_pages(block: Block) -> range:
    start = block_bytes(block).data_ptr()
    end = (start + block.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    return range(-(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end)


def _spread(calls: SystemCalls, pages: Sequence[int], nodes: Sequence[int]) -> None:
    # mbind leaves a page that is on one of the nodes where it is, so all pages of an earlier use may be on one of them.
    touched = [page for page, node in zip(pages, calls.page_nodes(pages), strict=True) if node >= 0]
    if touched:
        calls.page_nodes(touched, [nodes[page // mmap.PAGESIZE % len(nodes)] for page in touched])
