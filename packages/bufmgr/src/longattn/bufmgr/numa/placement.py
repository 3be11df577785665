"""Where the pages of buffers shall be, and, read back from the kernel page by page, where they are.

On a machine with one node that has memory, where there is nothing to place, everything here is inactive and says so.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast, get_args

import torch

from longattn.bufmgr.checks import check_kind, check_whole, describe
from longattn.bufmgr.log import LOGGER
from longattn.bufmgr.memory.allocator import Allocator, Block, block_bytes, check_block, check_upstream
from longattn.bufmgr.numa.system_calls import Policy, SystemCalls, system_calls
from longattn.bufmgr.numa.topology import NumaTopology, numa_topology


@dataclass(frozen=True)
class Placement:
    """Where the pages of a buffer are: pages by node, pages that nobody wrote to yet (they have no place), and pages for
    which the kernel answered with an error, by its name.
    """

    by_node: Mapping[int, int]
    untouched: int = 0
    failed: Mapping[str, int] | None = None

    @property
    def pages(self) -> int:
        """All pages."""
        return sum(self.by_node.values()) + self.untouched + sum((self.failed or {}).values())

    def misplaced(self, nodes: Sequence[int]) -> int:
        """Return how many pages are on other nodes than these, or unknown; untouched ones are not."""
        elsewhere = sum(count for node, count in self.by_node.items() if node not in nodes)
        return elsewhere + sum((self.failed or {}).values())


@dataclass(frozen=True)
class NumaMachine:
    """What placement works on: the nodes, and the kernel's calls. Tests make one of their own."""

    topology: NumaTopology
    calls: SystemCalls | None

    def why_inactive(self) -> str | None:
        """Return why nothing is placed here, or None where it is."""
        if self.calls is None:
            return "no Linux on x86-64 or aarch64: the system has no calls for placement that are known here"
        count = len(self.topology.memory_nodes)
        if count < 2:
            return (
                f"the system lists {count or 'no'} node{'' if count == 1 else 's'} with memory, so there is no choice"
            )
        return None


def this_machine() -> NumaMachine:
    """Return the machine that this process runs on."""
    return NumaMachine(numa_topology(), system_calls())


def read_placement(tensor: torch.Tensor, *, machine: NumaMachine | None = None) -> Placement:
    """Return where the pages of a CPU tensor are, as the kernel answers at this moment.

    A page at its ends may hold other data, too. Works on one node as well. Raises TypeError for no tensor, ValueError for
    one that is not contiguous in host memory, OSError where the kernel refuses the question.
    """
    calls = _calls(machine)
    pages = _pages_of(tensor)
    return _summary(calls.page_nodes(pages))


def migrate(tensor: torch.Tensor, node: int, *, machine: NumaMachine | None = None) -> Placement:
    """Move the pages of a CPU tensor to a node; return where they are afterwards, read back. Untouched pages stay so.

    Raises what `read_placement` raises, and ValueError for a node without memory.
    """
    calls = _calls(machine)
    _check_nodes((node,), this_machine() if machine is None else machine, "node")
    pages = _pages_of(tensor)
    if pages:
        calls.page_nodes(pages, [node] * len(pages))
    return _summary(calls.page_nodes(pages))


@contextlib.contextmanager
def numa_policy(
    policy: Policy, nodes: Sequence[int] | None = None, *, machine: NumaMachine | None = None
) -> Generator[bool]:
    """Place the pages that this thread touches first inside the context, whoever allocates them, torch included.

    nodes: default all that have memory. Yields whether it is active. The thread's policy from before is set again at the end.
    """
    machine = this_machine() if machine is None else machine
    chosen = _check_nodes(machine.topology.memory_nodes if nodes is None else nodes, machine)
    check_policy(policy)
    if machine.calls is None or machine.why_inactive() is not None:
        yield False
        return
    before = machine.calls.thread_policy()
    machine.calls.set_thread_policy(policy, chosen)
    try:
        yield True
    finally:
        machine.calls.set_thread_policy(before)


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
        self.nodes = None if nodes is None else _check_nodes(nodes, self._machine)
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


def check_policy(policy: object, name: str = "policy") -> None:
    """Raise TypeError or ValueError unless `policy` is one."""
    choices = get_args(Policy)
    check_kind(name, policy, str, " or ".join(map(repr, choices)))
    if policy not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {describe(policy)}")


def _check_nodes(nodes: object, machine: NumaMachine, name: str = "nodes") -> tuple[int, ...]:
    memory_nodes = machine.topology.memory_nodes
    if isinstance(nodes, (str, bytes)) or not isinstance(nodes, Sequence):
        raise TypeError(f"{name} must be a sequence of node numbers, got {describe(cast('object', nodes))}")
    checked = tuple(check_whole(name, node) for node in cast("Sequence[object]", nodes))
    missing = [node for node in checked if node not in memory_nodes]
    if missing:
        raise ValueError(f"{name} must be nodes with memory, {memory_nodes} here, got {describe(checked)}")
    return checked


def _calls(machine: NumaMachine | None) -> SystemCalls:
    calls = system_calls() if machine is None else machine.calls
    if calls is None:
        raise OSError(errno.ENOSYS, "the system has no calls for placement that are known here")
    return calls


def _pages_of(tensor: torch.Tensor) -> list[int]:
    check_kind("tensor", tensor, torch.Tensor, "a contiguous tensor in host memory")
    is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)  # subclasses may have no memory, or several pieces
    if not is_plain or tensor.device.type != "cpu" or tensor.layout is not torch.strided or not tensor.is_contiguous():
        raise ValueError(
            f"tensor must be plain, contiguous and in host memory, got {describe(tensor)} on {tensor.device}"
        )
    first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    return list(range(first, tensor.data_ptr() + tensor.nbytes, mmap.PAGESIZE)) if tensor.nbytes else []


def _whole_pages(block: Block) -> range:
    start = block_bytes(block).data_ptr()
    end = (start + block.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    return range(-(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end)


def _spread(calls: SystemCalls, pages: Sequence[int], nodes: Sequence[int]) -> None:
    # mbind leaves a page that is on one of the nodes where it is, so all pages of an earlier use may be on one of them.
    touched = [page for page, node in zip(pages, calls.page_nodes(pages), strict=True) if node >= 0]
    if touched:
        calls.page_nodes(touched, [nodes[page // mmap.PAGESIZE % len(nodes)] for page in touched])


def _summary(statuses: Sequence[int]) -> Placement:
    counts = Counter(statuses)
    # No page, no table of pages, or the page of zeros that all processes share: nobody has written there.
    untouched = counts.pop(-errno.ENOENT, 0) + counts.pop(-errno.EFAULT, 0)
    failed = {errno.errorcode.get(-status, str(status)): n for status, n in counts.items() if status < 0}
    return Placement({node: n for node, n in sorted(counts.items()) if node >= 0}, untouched, failed or None)
