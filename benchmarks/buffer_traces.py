"""Seeded traces of what a model takes and drops, and what different ways of keeping memory retain over them.

A trace is a list of ("take", name, bytes) and ("drop", name, 0); equal seeds give equal traces on every machine. All
sizes are of float32 tensors.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from longattn.bufmgr import AttentionBufferManager, BufferType, MemoryPool

Event = tuple[str, int, int]
MIB = 1 << 20
_TOKEN = 8 * 64 * 4
_KINDS = (BufferType.TEMP, BufferType.SCORES, BufferType.OUTPUT, BufferType.KEY)


def dilated_steps(rounds: int = 12, seed: int = 0) -> list[Event]:
    """Dilated attention op for op at lengths from 2K to 32K: q, k, v, scores and weights of each branch, and its part."""
    rng, names = random.Random(seed), iter(range(10**9))
    events: list[Event] = []
    for _ in range(rounds):
        length = rng.randrange(2048, 32769, 256)
        out = next(names)
        events.append(("take", out, length * _TOKEN))
        for segment, rate in ((2048, 1), (4096, 2), (8192, 4)):
            rows = min(segment, length) // rate
            sizes = [rows * _TOKEN] * 3 + [rows * rows * 4] * 2 + [rows * _TOKEN]
            held = [(next(names), size) for size in sizes]
            events += [("take", name, size) for name, size in held] + [("drop", name, 0) for name, _ in held]
        events.append(("drop", out, 0))
    return events


def mixed(steps: int = 600, seed: int = 1) -> list[Event]:
    """Sizes from 64 KiB to 64 MiB, none twice, each dropped in random order; at most 256 MiB at once."""
    rng = random.Random(seed)
    events: list[Event] = []
    live: dict[int, int] = {}
    for name in range(steps):
        nbytes = int(2 ** rng.uniform(16, 26)) // 64 * 64
        while live and (sum(live.values()) + nbytes > 256 * MIB or rng.random() < 0.45):
            gone = rng.choice(list(live))
            del live[gone]
            events.append(("drop", gone, 0))
        live[name] = nbytes
        events.append(("take", name, nbytes))
    return events + [("drop", name, 0) for name in live]


def new_shapes(count: int = 200, seed: int = 2) -> list[Event]:
    """Shapes that never come again, two at a time: what made the seeds' manager retain 137 times the live peak."""
    rng = random.Random(seed)
    events: list[Event] = []
    for name in range(count):
        events.append(("take", name, rng.randrange(256, 16384) * _TOKEN))
        if name:
            events.append(("drop", name - 1, 0))
    return [*events, ("drop", count - 1, 0)]


TRACES: Mapping[str, Callable[[], list[Event]]] = {
    "dilated steps, 2K to 32K": dilated_steps,
    "mixed sizes, 64 KiB to 64 MiB": mixed,
    "200 shapes, none twice": new_shapes,
}


def live_peak(trace: Sequence[Event]) -> int:
    """The most bytes that were taken and not dropped at once."""
    live: dict[int, int] = {}
    peak = 0
    for what, name, nbytes in trace:
        if what == "take":
            live[name] = nbytes
            peak = max(peak, sum(live.values()))
        else:
            del live[name]
    return peak


def exact_key_pool(trace: Sequence[Event]) -> int:
    """The most bytes that a pool retains which keeps every size for itself, and never gives anything back."""
    sizes: dict[int, int] = {}
    free: Counter[int] = Counter()
    retained = 0
    for what, name, nbytes in trace:
        if what == "drop":
            free[sizes.pop(name)] += 1
            continue
        sizes[name] = nbytes
        if free[nbytes]:
            free[nbytes] -= 1
        else:
            retained += nbytes
    return retained


def replay(trace: Sequence[Event], manager: AttentionBufferManager, touch: bool = False) -> Iterator[None]:
    """Go through a trace with a manager; yields after each event, while what it took is held. touch: write every page."""
    held: dict[int, Tensor] = {}
    for what, name, nbytes in trace:
        if what == "take":
            held[name] = manager.allocate(_KINDS[name % len(_KINDS)], (nbytes // 4,), torch.float32, zero_init=False)
            if touch:
                held[name].fill_(1.0)
        else:
            del held[name]
        yield


def retained(trace: Sequence[Event], passes: int) -> list[int]:
    """The most bytes that a pool and a manager over it held in each pass: in use, kept by caches, or dirty in the arena."""
    pool = MemoryPool()
    manager = AttentionBufferManager(upstream=pool)
    peaks = []
    for _ in range(passes):
        peak = 0
        for _ in replay(trace, manager):
            stats = pool.get_stats()
            small = max(0, stats["total_allocated"] - stats["arena"]["in_use"])
            peak = max(peak, stats["arena"]["in_use"] + stats["arena"]["dirty"] + small)
        peaks.append(peak)
    return peaks
