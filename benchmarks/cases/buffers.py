"""What a buffer costs: the manager beside torch.empty, in one process and under the malloc that this process has.

A buffer is (seq_len, 8, 64) in float32: 2 tokens are 4 KB, 512 are 1 MB, 32768 are 64 MB.

    touch        take a buffer with `allocate`, write every element, drop it; beside the same with torch.empty
    touch-slot   the same through a prepared slot, where that shows
    keyed        `allocate` by type, shape, dtype and device, and drop of the last reference
    slot         `acquire` of a prepared slot, and drop
    deallocate   `allocate` and `deallocate`, which empties the handle
    orders       the same, with up to four buffers of two shapes in use at once, given back in random order
    evict        `allocate` and drop of a shape that is not kept: each call evicts the oldest of ten
    step-*       see buffer_steps.py

`touch` writes 1 GB a call. The others do not touch memory; `keyed`, `slot`, `deallocate` and `orders` are a million calls, so that
milliseconds read as nanoseconds a call, `evict` a thousand (microseconds). The seeds' manager took 5454 ns for what
`keyed` does (25695 for scores), on the machine of their anchor. Record them with one thread.

The same case under a tuned malloc, in a process of its own, has rows of its own:

    MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 python -m benchmarks.run buffers --only touch
"""

import functools
import itertools
import os
import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.calls import Calls
from benchmarks.cases.buffer_steps import steps
from benchmarks.comparison import Comparison
from benchmarks.experiment import Labels, Targets
from longattn.bufmgr import AttentionBufferManager, BufferType

_MILLION = 1_000_000
_TOUCHED_BYTES = 1 << 30
_CPU = torch.device("cpu")
_TEMP = BufferType.TEMP
_NEVER_KEPT = 64  # more shapes than any type keeps
_HELD, _TURNS = 4, 200

# (row, tokens, at least this ratio under the stock malloc): 4 KB; 1, 4 and 16 MB; 64 and 256 MB.
_TOUCH = (
    ("touch", 2, 1.5),
    ("touch-slot", 2, 1.5),
    ("touch", 512, 1.1),
    ("touch", 2048, 1.1),
    ("touch", 8192, 1.1),
    ("touch", 32768, 8.0),
    ("touch", 131072, 8.0),
)
_TUNED_RATIO = 0.97
"""Under a tuned malloc: never more than 3 % slower."""
# (row, tokens, at most so many nanoseconds, at least this ratio): 1 MB, and what is below.
_CALLS = (
    ("keyed", 512, 600.0, None),
    ("slot", 512, 400.0, 4.0),
    ("deallocate", 512, 2500.0, None),
    ("deallocate", 2, None, 0.5),
    ("deallocate", 256, None, 0.5),
    ("orders", 2, None, 0.5),
    ("orders", 256, None, 0.5),
)

Step = Callable[[], object]


def malloc_is_tuned() -> bool:
    """Whether this process was started with a malloc that keeps what it has."""
    return {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} <= os.environ.keys()


def _our_step(way: str, shape: tuple[int, ...]) -> Step:
    manager = AttentionBufferManager()
    slot = manager.prepare(_TEMP, shape, torch.float32, _CPU)
    if way == "slot":
        return slot.acquire
    if way == "keyed":
        return functools.partial(manager.allocate, _TEMP, shape, torch.float32, _CPU)
    if way == "touch":
        return lambda: manager.allocate(_TEMP, shape, torch.float32, _CPU).fill_(1.0)
    if way == "touch-slot":
        return lambda: slot.acquire().fill_(1.0)
    if way == "evict":
        lengths = itertools.cycle(range(shape[0], shape[0] + _NEVER_KEPT))
        return lambda: manager.allocate(_TEMP, (next(lengths), *shape[1:]), torch.float32, _CPU)

    if way == "orders":
        take = functools.partial(manager.allocate, _TEMP, dtype=torch.float32, device=_CPU)
        return _in_random_order(take, lambda tensor: manager.deallocate(tensor, _TEMP), shape)

    def and_deallocate() -> None:
        tensor = manager.allocate(_TEMP, shape, torch.float32, _CPU)
        manager.deallocate(tensor, _TEMP)

    return and_deallocate


def _in_random_order(
    take: Callable[[tuple[int, ...]], Tensor], give: Callable[[Tensor], object], shape: tuple[int, ...]
) -> Step:
    rng = random.Random(0)
    shapes = [shape, (shape[0] + 1, *shape[1:])]
    turns = itertools.cycle([(rng.randrange(_HELD), rng.choice(shapes)) for _ in range(_TURNS)])
    held = dict(enumerate(take(shape) for _ in range(_HELD)))

    def step() -> None:
        place, following = next(turns)
        give(held[place])
        del held[place]
        held[place] = take(following)

    return step


def _torch_step(way: str, shape: tuple[int, ...]) -> Step:
    if way == "evict":
        lengths = itertools.cycle(range(shape[0], shape[0] + _NEVER_KEPT))
        return lambda: torch.empty((next(lengths), *shape[1:]), dtype=torch.float32)
    if way.startswith("touch"):
        return lambda: torch.empty(shape, dtype=torch.float32).fill_(1.0)
    if way == "orders":
        return _in_random_order(functools.partial(torch.empty, dtype=torch.float32), lambda tensor: None, shape)
    return functools.partial(torch.empty, shape, dtype=torch.float32)


def _often(step: Step, many: int) -> Step:
    def call() -> None:
        for _ in itertools.repeat(None, many):
            step()

    return call


def _wrong(shape: tuple[int, ...]) -> list[str]:
    """Two buffers in use at once are apart, and what came back is used again."""
    manager = AttentionBufferManager()
    first, second = (manager.allocate(_TEMP, shape, torch.float32).fill_(n) for n in (1.0, 2.0))
    failures = [] if bool((first == 1.0).all()) and bool((second == 2.0).all()) else ["buffers overlap"]
    del first
    manager.deallocate(second, _TEMP)
    manager.allocate(_TEMP, shape, torch.float32)
    if manager.get_stats()["cache_hits"] != 1:
        failures.append("a buffer that came back was not reused")
    return failures


def _calls(way: str, seq_len: int, many: int, targets: Targets) -> Calls:
    shape = (seq_len, 8, 64)
    malloc = ", tuned malloc" if malloc_is_tuned() else ""
    return Calls(
        name=way,
        labels=Labels("buffers", f"{way} h8 d64{malloc}", "torch.empty", "float32", seq_len, False, "forward"),
        targets=targets,
        ours=lambda: _often(_our_step(way, shape), many),
        peer=lambda: _often(_torch_step(way, shape), many),
        gate=lambda: _wrong(shape),
    )


def experiments(quick: bool) -> Iterator[Calls | Comparison]:
    """Every row of the case."""
    for way, tokens, ratio in _TOUCH:
        seq_len = max(2, tokens // 1024) if quick else tokens
        many = 1 if quick else min(_MILLION, _TOUCHED_BYTES // (tokens * 2048))
        goal = None if quick else _TUNED_RATIO if malloc_is_tuned() else ratio
        if not quick or tokens in (2, 32768):
            yield _calls(way, seq_len, many, Targets(ratio=goal))
    for way, tokens, nanoseconds, ratio in _CALLS:
        targets = Targets() if quick else Targets(ratio=ratio, most_ms=nanoseconds)
        yield _calls(way, tokens, 10 if quick else _MILLION, targets)
    for tokens in (2, 512):
        yield _calls("evict", tokens, 100 if quick else 1000, Targets())
    yield from steps(quick)
