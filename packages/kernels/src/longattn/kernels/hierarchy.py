"""Machines' memory hierarchies, and what a plan moves through them: bytes into each level, counted from the plan.

A level holds a block of owned rows while the others stream past it (flash attention's scheme: Dao et al. 2022, section 3.2). So what has
to come into a level of C bytes is: every owned row once, and for each block of owned rows that half of C holds, the rows that it meets;
where the other half holds all rows that a tile meets, those come once. Forward: queries own, keys stream. Backward: keys own (k, v, dk,
dv), queries stream (q, dO, dq). A level that is shared is counted as one. Figures of machines are those of docs/memory-hierarchy.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longattn.patterncache import Plan
from longattn.patterncache.plan import Branch

FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5


@dataclass(frozen=True, slots=True)
class Level:
    """One level: how many bytes it holds, None: all; bytes a second that it gives, of the whole chip, None: not known."""

    name: str
    capacity: int | None
    bandwidth: float | None


@dataclass(frozen=True, slots=True)
class Machine:
    """Levels from the innermost on, and FLOP a second of the whole chip by dtype's bits of its products."""

    name: str
    levels: tuple[Level, ...]
    peak: dict[int, float]


KB, MB = 1024, 1024 * 1024
TERA = 1e12

MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        Machine(
            "A100",
            (Level("shared memory", 166_912, 19 * TERA), Level("L2", 40 * MB, None), Level("HBM", None, 2.0 * TERA)),
            {16: 312 * TERA},
        ),
        Machine(
            "H100",
            (Level("shared memory", 232_448, None), Level("L2", 50 * MB, None), Level("HBM", None, 3.35 * TERA)),
            {16: 989 * TERA},
        ),
        Machine(
            "H200",
            (Level("shared memory", 232_448, None), Level("L2", 50 * MB, None), Level("HBM", None, 4.8 * TERA)),
            {16: 989 * TERA},
        ),
        Machine(
            "B200",
            (Level("shared memory", 232_448, None), Level("L2", 126 * MB, None), Level("HBM", None, 8.0 * TERA)),
            {16: 2250 * TERA},
        ),
        Machine(
            "MI300X",
            (
                Level("LDS", 64 * KB, None),
                Level("L2", 4 * MB, None),
                Level("Infinity Cache", 256 * MB, None),
                Level("HBM", None, 5.3 * TERA),
            ),
            {16: 1307 * TERA},
        ),
        Machine(
            "Zen 4",
            (Level("L1", 32 * KB, None), Level("L2", MB, None), Level("L3", 32 * MB, None), Level("DRAM", None, None)),
            {32: 2 * 117e9, 16: 2 * 234e9},
        ),
        Machine(
            "Zen 5",
            (Level("L1", 48 * KB, None), Level("L2", MB, None), Level("L3", 32 * MB, None), Level("DRAM", None, None)),
            {},
        ),
        Machine(
            "Sapphire Rapids",
            (
                Level("L1", 48 * KB, 2 * 250e9),
                Level("L2", 2 * MB, 2 * 165e9),
                Level("L3", 32 * MB, 2 * 19e9),
                Level("DRAM", None, 2 * 13.5e9),
            ),
            {32: 2 * 230e9, 16: 2 * 2950e9},
        ),
    )
}
"""By name. Those of CPUs are two cores, as they were measured: FLOP and bytes a second of torch's and our own loops, not their makers'."""

_KNOWN_BY = {
    "AuthenticAMD-25": "Zen 4",
    "AuthenticAMD-26": "Zen 5",
    "GenuineIntel-6-143": "Sapphire Rapids",
    "sm_80": "A100",
    "sm_90": "H100",
    "sm_100": "B200",
    "gfx942": "MI300X",
}


def machine_of(name: str | None, known_by: str) -> Machine:
    """The named machine, or that of a processor's or architecture's name.

    Raises:
        ValueError: there is none of that name.
    """
    machine = (
        name if name is not None else next((of for start, of in _KNOWN_BY.items() if known_by.startswith(start)), None)
    )
    if machine is None or machine not in MACHINES:
        given = repr(name) if name is not None else f"None, on {known_by or 'a device without a name'}"
        raise ValueError(f"machine must be one of {', '.join(MACHINES)}, got {given}")
    return MACHINES[machine]


@dataclass(frozen=True, slots=True)
class MemoryTraffic:
    """What a call does on a machine.

    Attributes:
        operations: FLOP of visible pairs, each as often as the plan says.
        into: (level, bytes that come into it, or leave it as results), from the innermost on; the last holds everything already.
        seconds: (what, least time) for the products and each level, where the machine's figure is known; the largest is the limit.
    """

    machine: Machine
    operations: int
    into: tuple[tuple[str, int], ...]
    seconds: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        moved = ", ".join(f"{name} {count / MB:.1f} MiB" for name, count in self.into)
        text = f"{self.machine.name}: {self.operations / 1e9:.3g} GFLOP; into {moved}"
        if self.seconds:
            limit, least = max(self.seconds, key=lambda pair: pair[1])
            text += f"; at least {least * 1e3:.3g} ms, for {limit}"
        return text


def traffic_of(plan: Plan, batch: int, head_dim: int, element: int, backward: bool, machine: Machine) -> MemoryTraffic:
    """What a call moves and multiplies; `element` is the size of a number of q, k and v in bytes."""
    pairs = sum(branch.pairs * branch.heads.length for branch in plan.branches) * batch
    products = FORWARD_PRODUCTS + (BACKWARD_PRODUCTS if backward else 0)
    operations = 2 * products * pairs * head_dim
    into: list[tuple[str, int]] = []
    row = head_dim * element
    for level in machine.levels[:-1]:
        moved = sum(_into(b, level.capacity, 2 * row, 2 * row, keys_own=False) for b in plan.branches)
        if backward:
            moved += sum(_into(b, level.capacity, 4 * row, 3 * row, keys_own=True) for b in plan.branches)
        into.append((level.name, moved * batch))
    peak = machine.peak.get(8 * element)
    seconds = [] if peak is None else [("products", operations / peak)]
    # What comes into a level is what the next one gives.
    for (_, moved), giver in zip(into, machine.levels[1:], strict=True):
        if giver.bandwidth is not None:
            seconds.append((giver.name, moved / giver.bandwidth))
    return MemoryTraffic(machine, operations, tuple(into), tuple(seconds))


def _into(branch: Branch, capacity: int | None, owned_bytes: int, met_bytes: int, *, keys_own: bool) -> int:
    """Bytes that come into a level for all heads of a branch; `owned_bytes` and `met_bytes` are of one row."""
    owned, met = (branch.k, branch.q) if keys_own else (branch.q, branch.k)
    times = branch.q.tiles * branch.heads.length
    if capacity is None or met.count * met_bytes <= capacity // 2:
        return times * (owned.count * owned_bytes + met.count * met_bytes)
    block = max(1, capacity // 2 // owned_bytes)
    first = np.arange(0, owned.count, block)
    last = np.minimum(first + block, owned.count) - 1
    return times * (owned.count * owned_bytes + int(_met(branch, first, last, keys_own).sum()) * met_bytes)


def _met(branch: Branch, first: np.ndarray, last: np.ndarray, keys_own: bool) -> np.ndarray:
    """Rows that each block first .. last of owned rows meets in one tile."""
    if branch.band is None or not branch.uniform:
        return np.full(len(first), (branch.q if keys_own else branch.k).count)
    begin, end = branch.key_range()  # neither ever moves back
    if keys_own:
        return np.maximum(np.searchsorted(begin, last, "right") - np.searchsorted(end, first, "left"), 0)
    return np.maximum(np.minimum(end[last], branch.k.count - 1) - np.maximum(begin[first], 0) + 1, 0)
