"""The NUMA nodes of this machine, as the kernel lists them under /sys/devices/system/node.

Source: Documentation/admin-guide/mm/numaperf.rst and Documentation/ABI/stable/sysfs-devices-node of Linux.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

_FOLDER = "sys/devices/system/node"


@dataclass(frozen=True)
class NumaNode:
    """A node: its number, processors, bytes of memory (0 for processors without memory), and its distance to each online
    node, in the order of their numbers (10: itself).
    """

    index: int
    cpus: tuple[int, ...]
    memory_bytes: int
    distances: tuple[int, ...]


@dataclass(frozen=True)
class NumaTopology:
    """The online nodes in order; empty where the system lists none."""

    nodes: tuple[NumaNode, ...]

    @property
    def memory_nodes(self) -> tuple[int, ...]:
        """The numbers of the nodes that have memory."""
        return tuple(node.index for node in self.nodes if node.memory_bytes)


def read_topology(root: Path = Path("/")) -> NumaTopology:
    """Return the topology that /sys lists. root: where /sys is found, for tests."""
    folder = root / _FOLDER
    if not folder.is_dir():
        return NumaTopology(())
    indices = parse_list(_text(folder / "online"))
    return NumaTopology(tuple(_read_node(folder / f"node{index}", index) for index in indices))


@functools.cache
def numa_topology() -> NumaTopology:
    """Return the topology of this machine, read once."""
    return read_topology()


def _read_node(folder: Path, index: int) -> NumaNode:
    total = re.search(r"MemTotal:\s+(\d+) kB", _text(folder / "meminfo"))
    distances = tuple(int(word) for word in _text(folder / "distance").split())
    return NumaNode(index, parse_list(_text(folder / "cpulist")), int(total[1]) * 1024 if total else 0, distances)


def parse_list(text: str) -> tuple[int, ...]:
    """Return the numbers of a list as the kernel writes it, such as "0-2,5"."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


def _text(path: Path) -> str:
    return path.read_text(encoding="ascii") if path.is_file() else ""
