"""Traces of what a model takes and drops, seeded and recorded, and what different ways of keeping memory retain over them.

A trace is a list of ("take", name, bytes) and ("drop", name, 0). TRACES are drawn: equal seeds give equal traces on every machine. RECORDED
are of real models, every tensor that torch makes, in steps: training on tensors without data (`plan_memory`), decoding as it runs.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from longattn.attention import LongNet
from longattn.bufmgr import AttentionBufferManager, BufferType, Lifetime, MemoryPool, StepLearner, plan_memory
from longattn.bufmgr.planning.recording import LifetimeRecorder

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


_NAMES_A_STEP = 1 << 20  # a multiple of the types: what has the same place in each step has the same type


def _events(lifetimes: Sequence[Lifetime], ends: Sequence[int]) -> list[list[Event]]:
    """Cut lifetimes into steps, each of which ends with the operation of that number."""
    steps: list[list[Event]] = []
    names: dict[int, int] = {}
    began = 0
    for number, end in enumerate(ends):
        fresh = [index for index, lifetime in enumerate(lifetimes) if began < lifetime.first <= end]
        names |= {index: number * _NAMES_A_STEP + place for place, index in enumerate(fresh)}
        moments = [(lifetimes[index].first, 0, index) for index in fresh]
        moments += [(lifetimes[index].last, 1, index) for index in names if began < lifetimes[index].last <= end]
        steps.append(
            [
                ("drop", names[index], 0) if dropped else ("take", names[index], max(4, lifetimes[index].nbytes))
                for _, dropped, index in sorted(moments)
            ]
        )
        began = end
    return steps


def _training(lengths: Sequence[int]) -> list[list[Event]]:
    """Steps of training, forward and backward, of `LongNet` with two layers of width 256."""
    model = LongNet(256, d_model=256, nhead=8, num_layers=2)
    lifetimes: list[Lifetime] = []
    ends: list[int] = []
    plans: dict[int, tuple[Lifetime, ...]] = {}
    for length in lengths:
        if length not in plans:
            tokens = torch.empty(1, length, dtype=torch.long, device="meta")
            plans[length] = plan_memory(model, [tokens], loss=_loss).before
        began = ends[-1] if ends else 0
        lifetimes += [replace(life, first=began + life.first, last=began + life.last) for life in plans[length]]
        ends.append(max(lifetime.last for lifetime in lifetimes))
    return _events(lifetimes, ends)


def _loss(logits: Tensor) -> Tensor:
    return cross_entropy(logits[0], torch.zeros(logits.shape[1], dtype=torch.long, device=logits.device))


def training(steps: int = 8) -> list[list[Event]]:
    """All of 4096 tokens."""
    return _training([4096] * steps)


def training_lengths(steps: int = 8, seed: int = 3) -> list[list[Event]]:
    """Of 1024 to 8192 tokens."""
    rng = random.Random(seed)
    return _training([rng.randrange(1024, 8193, 256) for _ in range(steps)])


def _decoding(step: Callable[[], object], steps: int) -> list[list[Event]]:
    ends: list[int] = []
    with torch.no_grad(), LifetimeRecorder() as recorder:
        for _ in range(steps):
            step()
            ends.append(recorder.operations)
    return _events(recorder.lifetimes(), ends)


def decoding(steps: int = 48) -> list[list[Event]]:
    """Tokens of `LongNet` with two layers of width 256, after a prompt of 1024."""
    torch.manual_seed(0)
    model = LongNet(256, d_model=256, nhead=8, num_layers=2).eval()
    stream = model.stream()
    stream(torch.randint(256, (1, 1024)))
    return _decoding(lambda: stream(torch.randint(256, (1, 1))), steps)


def decoding_by_cat(steps: int = 48) -> list[list[Event]]:
    """Tokens of one layer of attention whose keys and values grow by `torch.cat`, after a prompt of 1024."""
    layer, cache = nn.Linear(256, 3 * 256), torch.zeros(2, 1, 8, 1024, 32)

    def step() -> None:
        nonlocal cache
        q, k, v = layer(torch.zeros(1, 1, 256)).view(1, 1, 3, 8, 32).permute(2, 0, 3, 1, 4)
        cache = torch.cat([cache, torch.stack([k, v])], dim=3)
        scaled_dot_product_attention(q, cache[0], cache[1])

    return _decoding(step, steps)


RECORDED: Mapping[str, Callable[[], list[list[Event]]]] = {
    "training, 4096 tokens": training,
    "training, 1024 to 8192 tokens": training_lengths,
    "decoding": decoding,
    "decoding, torch.cat": decoding_by_cat,
}


def every_trace(recorded: bool = True) -> Iterator[tuple[str, list[Event]]]:
    """Yield the name and events of each trace: those drawn, and unless declined those recorded, which take half a minute to record."""
    for name, trace_of in TRACES.items():
        yield name, trace_of()
    for name, steps_of in RECORDED.items() if recorded else ():
        yield name, list(chain.from_iterable(steps_of()))


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
    for event in trace:
        _do(event, manager, held, touch)
        yield


def _do(event: Event, manager: AttentionBufferManager, held: dict[int, Tensor], touch: bool) -> None:
    what, name, nbytes = event
    if what == "take":
        held[name] = manager.allocate(_KINDS[name % len(_KINDS)], (nbytes // 4,), torch.float32, zero_init=False)
        if touch:
            held[name].fill_(1.0)
    else:
        del held[name]


def replay_steps(
    steps: Sequence[Sequence[Event]], manager: AttentionBufferManager, learner: StepLearner | None
) -> Iterator[None]:
    """Go through a recorded trace and write every page, each step inside the learner's; yields after each step."""
    held: dict[int, Tensor] = {}
    for step in steps:
        with nullcontext() if learner is None else learner.step():
            for event in step:
                _do(event, manager, held, touch=True)
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
