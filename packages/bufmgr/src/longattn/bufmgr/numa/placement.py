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
    check_nodes((node,), this_machine() if machine is None else machine, "node")
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
    chosen = check_nodes(machine.topology.memory_nodes if nodes is None else nodes, machine)
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


def check_policy(policy: object, name: str = "policy") -> None:
    """Raise TypeError or ValueError unless `policy` is one."""
    choices = get_args(Policy)
    check_kind(name, policy, str, " or ".join(map(repr, choices)))
    if policy not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {describe(policy)}")


def check_nodes(nodes: object, machine: NumaMachine, name: str = "nodes") -> tuple[int, ...]:
    """Return the nodes. Raises TypeError or ValueError unless they are numbers of nodes with memory."""
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


def _summary(statuses: Sequence[int]) -> Placement:
    counts = Counter(statuses)
    # No page, no table of pages, or the page of zeros that all processes share: nobody has written there.
    untouched = counts.pop(-errno.ENOENT, 0) + counts.pop(-errno.EFAULT, 0)
    failed = {errno.errorcode.get(-status, str(status)): n for status, n in counts.items() if status < 0}
    return Placement({node: n for node, n in sorted(counts.items()) if node >= 0}, untouched, failed or None)
