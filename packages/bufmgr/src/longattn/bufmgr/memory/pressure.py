"""How full memory is, as the system reports it, and how much free memory is given back for it.

Host: the nearest limit of (a) the machine, /proc/meminfo's MemAvailable; (b) a control group, version 2 (memory.max,
memory.current) or 1 (memory.limit_in_bytes, memory.usage_in_bytes), where inactive file pages do not count as used.
CUDA: torch.cuda.mem_get_info. A limit that cannot be read does not count.

    policy      half of the free memory goes from this share in use    all of it from this share
    adaptive    0.85                                                 0.95
    aggressive  -                                                    0.70
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch

from longattn.bufmgr.checks import check_kind, describe

Cleanup = Literal["adaptive", "aggressive"]

_READ_AGAIN_AFTER_S = 0.05


class _Thresholds(NamedTuple):
    half: float
    all: float


_POLICIES: Mapping[str, _Thresholds] = {
    "adaptive": _Thresholds(0.85, 0.95),
    "aggressive": _Thresholds(0.70, 0.70),
}


@dataclass(frozen=True)
class MemoryReading:
    """Bytes that may be used in all, bytes still available, and the source of the reading ("machine", "cgroup", "cuda")."""

    total: int
    available: int
    source: str

    @property
    def used_share(self) -> float:
        """The share in use, 0 to 1."""
        return 1.0 - min(max(self.available, 0), self.total) / self.total if self.total else 0.0


def read_host_memory(root: Path = Path("/")) -> MemoryReading | None:
    """Return the reading of the fullest limit on host memory, or None where there is none to read.

    root: where /proc and /sys are found, for tests.
    """
    readings = [_machine(root), _cgroup2(root), _cgroup1(root)]
    return max((reading for reading in readings if reading is not None), key=lambda r: r.used_share, default=None)


def read_device_memory(device: torch.device) -> MemoryReading | None:
    """Return the reading for a device: host memory for the CPU, the device's own for CUDA, None for others."""
    check_kind("device", device, torch.device, "a torch.device")
    if device.type == "cpu":
        return read_host_memory()
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(device)
    # Memory that torch's caching allocator holds and does not use is available, too.
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return MemoryReading(total, free + idle, "cuda")


def check_cleanup(cleanup: object) -> Cleanup:
    """Return the policy's name. Raises TypeError or ValueError that names the parameter."""
    choices = get_args(Cleanup)
    expected = " or ".join(map(repr, choices))
    if not isinstance(cleanup, str):
        raise TypeError(f"cleanup must be {expected}, got {describe(cleanup)}")
    for choice in choices:
        if cleanup == choice:
            return choice
    raise ValueError(f"cleanup must be {expected}, got {describe(cleanup)}")


class PressureGauge:
    """Turns readings into the share of free memory to give back. Reads at most every 50 ms."""

    def __init__(self, cleanup: Cleanup) -> None:
        self.cleanup: Cleanup = cleanup
        self._next_reading = 0.0

    def share_to_give_back(self) -> float:
        """Return 0.0, 0.5 or 1.0. Between two readings the answer is 0.0, because the last reading was acted on."""
        now = time.monotonic()
        if now < self._next_reading:
            return 0.0
        self._next_reading = now + _READ_AGAIN_AFTER_S
        return share_to_give_back(self.cleanup, read_host_memory())


def share_to_give_back(cleanup: Cleanup, reading: MemoryReading | None) -> float:
    """Return which share of the free memory a policy gives back at a reading: 0.0, 0.5 or 1.0."""
    if reading is None:
        return 0.0
    thresholds = _POLICIES[cleanup]
    if reading.used_share >= thresholds.all:
        return 1.0
    return 0.5 if reading.used_share >= thresholds.half else 0.0


def _machine(root: Path) -> MemoryReading | None:
    fields = _fields(root / "proc/meminfo")
    total, available = fields.get("MemTotal"), fields.get("MemAvailable")
    if not total or available is None:
        return None
    return MemoryReading(total * 1024, available * 1024, "machine")


def _cgroup2(root: Path) -> MemoryReading | None:
    for group in _groups(root, controller=""):
        folder = root / "sys/fs/cgroup" / group
        limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
        if limit is not None and used is not None:
            idle = _fields(folder / "memory.stat").get("inactive_file", 0)
            return MemoryReading(limit, limit - used + idle, "cgroup")
    return None


def _cgroup1(root: Path) -> MemoryReading | None:
    for group in _groups(root, controller="memory"):
        folder = root / "sys/fs/cgroup/memory" / group
        limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
        # "No limit" is written as the largest multiple of a page.
        if limit is not None and used is not None and limit < 2**60:
            idle = _fields(folder / "memory.stat").get("total_inactive_file", 0)
            return MemoryReading(limit, limit - used + idle, "cgroup")
    return None


def _groups(root: Path, controller: str) -> list[str]:
    """Return this process's group and its parents, innermost first; "" is the root of what is mounted here."""
    groups: list[str] = []
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            parts = [part for part in path.split("/") if part not in ("", "..")]
            groups += ["/".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
    return [*groups, ""]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdecimal() else None


def _fields(path: Path) -> dict[str, int]:
    fields: dict[str, int] = {}
    for line in _lines(path):
        words = line.replace(":", " ").split()
        if len(words) >= 2 and words[1].isdecimal():
            fields[words[0]] = int(words[1])
    return fields
