"""What a step of attention over many devices would take: seconds and bytes of each rank, from the plans of its steps. Nothing runs.

A rank works through the shards that its queries see, one a step: its own first, then from the nearest before it round the ring. A step
takes what its products take at the device's speed, or what its rows take to be read, whichever is longer, and what its results take to be added to those
before; meanwhile the next shard travels. So a ring's pass lasts the sum over steps of the longer of the two, after nothing; where an engine does not overlap, the sum of both.
With many ranks some of them are looked at, evenly spaced, and always the first and the last. Keys that a shard sends are counted exactly where it is
small, else as the sum over branches, which is at least as much.

Out of the model: contention of links, other ranks' delays, the kernels' tails. `benchmarks/results/simulation.csv` holds it beside measured runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from longattn.attention.schedules.layouts import LAYOUTS, MOST_RANKS, Spans, count_rows
from longattn.attention.schedules.packing import packing_of
from longattn.attention.schedules.traffic import ScheduledCall, ulysses_shares
from longattn.kernels.interface import state_dtype
from longattn.patterncache import Plan, Rectangle
from longattn.patterncache.spans import shortened

ENGINES = (*(f"ring {layout}" for layout in LAYOUTS), "all_gather", "ulysses")
_MOST_PLANS = 1024
"""(rank, shard) pairs whose plans are looked at; two ranks are looked at in any case."""
_MOST_EXACT = 1 << 20
"""(key row, kv head) pairs of a shard up to which the ones that are seen are marked one by one."""
_BACKWARD_WORK = 2.5
"""Products of a backward over those of a forward: five for two."""


@dataclass(frozen=True)
class Hardware:
    """One device and its link.

    Attributes:
        flops: FLOP a second that its attention reaches. bandwidth: bytes a second of its memory.
        link: bytes a second that it receives, while it sends as many. latency: seconds of a message.
        launch: seconds that a step takes beside its products.
        load: processes for each core or device that they share; 1: each has its own. Cores are then never idle: a pass takes as long as all
            ranks' work on them, at least as long as the slowest rank alone.
    """

    flops: float
    bandwidth: float
    link: float
    latency: float = 1e-5
    launch: float = 1e-5
    load: float = 1.0


@dataclass(frozen=True)
class Prediction:
    """A forward, and with `backward` its backward, on the slowest rank that was looked at.

    Attributes:
        engine: as in `ENGINES`. seconds: of the pass. compute, transfer: seconds of each without the other.
        memory: bytes on the device: q, k, v, out, lse, what travels, and in training their gradients.
        in_flight: of those, what travels and what it is put into. received: bytes that the rank receives. readers: how many ranks were looked at.
    """

    engine: str
    seconds: float
    compute: float
    transfer: float
    memory: int
    in_flight: int
    received: int
    readers: int


@dataclass(frozen=True)
class _Step:
    pairs: int
    rows: int
    """(key row, kv head) pairs that are read."""
    sent: int
    """And of those, the ones that another rank sends."""
    unpacked: int
    """(key row, kv head) pairs of the shard that they are put into; 0 where a whole shard travels, or none."""


def simulate(call: ScheduledCall, engine: str, hardware: Hardware, *, backward: bool) -> Prediction:
    """Predict a pass.

    Args:
        call: pattern, length, ranks and shapes. engine: one of `ENGINES`. hardware: of each rank. backward: predict training.

    Raises:
        ValueError: no such engine, more ranks than 1024 or than tokens, or Ulysses with fewer kv heads than ranks.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {ENGINES}, got {shortened(engine)}")
    if not 0 < call.ranks <= min(MOST_RANKS, call.length):
        raise ValueError(f"ranks must be 1 .. {min(MOST_RANKS, call.length)}, got {call.ranks}")
    if engine == "ulysses":
        return _ulysses(call, hardware, backward)
    rows = LAYOUTS[engine.partition(" ")[2] or "contiguous"](call.length, call.ranks).rows()
    most = max(2, min(8, _MOST_PLANS // call.ranks))
    step = max(1, -(-(call.ranks - 1) // (most - 1)))
    readers = sorted({*range(0, call.ranks, step), call.ranks - 1})
    passes = [_reader(call, engine, rows[reader], reader, hardware, backward) for reader in readers]
    slowest = max(passes, key=lambda each: each.seconds)
    mean = sum(each.seconds for each in passes) / len(passes)
    return replace(slowest, seconds=max(slowest.seconds, hardware.load * mean), readers=len(readers))


def _reader(call: ScheduledCall, engine: str, rows: Spans, reader: int, at: Hardware, backward: bool) -> Prediction:
    """The pass of one rank, of a ring or an all-gather."""
    ring, _, layout = engine.partition(" ")
    steps = _steps(call, layout or "contiguous", reader)
    queries = count_rows(rows)
    size, wide = call.dtype.itemsize, state_dtype(call.dtype).itemsize
    others = call.batch * (call.length - queries) * call.kv_heads * call.width  # elements of keys and values elsewhere
    seconds = compute = transfer = 0.0
    received = most = 0
    # A backward has keys and values come again, and their gradients go home.
    for factor, width in ((1.0, size), (_BACKWARD_WORK, size + wide)) if backward else ((1.0, size),):
        times = [_compute(call, step, queries, factor, at) for step in steps]
        if ring == "ring":
            moved = [call.batch * step.sent * call.width * width for step in steps]
            sends = [_transfer(nbytes, at) for nbytes in moved]
            # While a step computes, what the next one needs travels; a backward's last gradients travel alone.
            seconds += sum(map(max, times, [*sends[1:], 0.0]))
            seconds += sends[-1] * (wide / width) if factor > 1 else 0.0
        else:
            moved = [others * width]
            sends = [_transfer(moved[0], at, call.ranks - 1)]
            seconds += sum(times) + sends[0]
        compute, transfer = compute + sum(times), transfer + sum(sends)
        received, most = received + sum(moved), max(most, *moved)
    if ring == "ring":
        in_flight = _ring_bytes(call, steps, backward)
    else:
        # What arrived is joined with this rank's own rows: in a backward whole keys and their gradients stand, in a forward parts and the whole.
        own = queries * (size + wide) if backward else call.length * size
        in_flight = most + call.batch * call.kv_heads * call.width * own
    memory = _held(call, rows, backward) + in_flight
    return Prediction(engine, seconds, compute, transfer, memory, in_flight, received, 1)


def _ring_bytes(call: ScheduledCall, steps: tuple[_Step, ...], backward: bool) -> int:
    """Of shards that travel, and of what they are put into: keys of two steps; gradients that are computed, that are sent, and that arrive."""
    size, wide = call.dtype.itemsize, state_dtype(call.dtype).itemsize
    sent, unpacked = max(step.sent for step in steps), max(step.unpacked for step in steps)
    slots = min(2, sum(step.sent > 0 for step in steps))
    pairs = (slots * sent + unpacked) * size
    if backward:
        # Where one step sends, the computed ones are those that are sent.
        pairs += ((unpacked or sent) + slots * sent) * wide
    return call.batch * call.width * pairs


@lru_cache(maxsize=256)
def _steps(call: ScheduledCall, layout: str, reader: int) -> tuple[_Step, ...]:
    """Of each shard that the reader's queries see something of, its own first. Kept for other hardware."""
    rows = LAYOUTS[layout](call.length, call.ranks).rows()
    steps: list[_Step] = []
    for distance in range(call.ranks):
        owner = (reader - distance) % call.ranks
        if call.pattern.causal and rows[owner][0].start > rows[reader][-1].last:
            continue
        plan = call.pattern.plan(Rectangle(call.heads, rows[reader], rows[owner]))
        pairs = sum(branch.pairs * branch.heads.length for branch in plan.branches)
        if distance == 0 or pairs:
            shard = count_rows(rows[owner])
            read, all_keys = _key_rows(plan, call.kv_heads, shard), shard * call.kv_heads
            sent = read if distance else 0
            steps.append(_Step(pairs, read, sent, all_keys if 0 < sent < all_keys else 0))
    return tuple(steps)


def _key_rows(plan: Plan, kv_heads: int, shard: int) -> int:
    if shard * kv_heads <= _MOST_EXACT:
        return packing_of(plan, kv_heads).count
    heads = plan.rectangle.shape[0]
    served = [-(-branch.heads.length * kv_heads // heads) for branch in plan.branches]
    return min(shard * kv_heads, sum(branch.k.tiles * branch.k.count * n for branch, n in zip(plan.branches, served, strict=True)))  # fmt: skip


def _compute(call: ScheduledCall, step: _Step, queries: int, factor: float, at: Hardware) -> float:
    """Seconds of a step; one on another rank's keys also adds its outputs, or gradients of queries, to those before it: read, read, written."""
    value_dim = call.value_head_dim or call.head_dim
    products = 2 * call.batch * step.pairs * call.width * factor / at.flops
    read = call.batch * call.dtype.itemsize * call.width * (queries * call.heads + step.rows) * factor / at.bandwidth
    numbers = call.batch * queries * call.heads * (value_dim if factor == 1.0 else call.head_dim)
    merged = 3 * numbers * state_dtype(call.dtype).itemsize / at.bandwidth if step.sent else 0.0
    return at.launch + max(products, read) + merged


def _transfer(nbytes: int, at: Hardware, messages: int = 1) -> float:
    return messages * at.latency + nbytes / at.link if nbytes else 0.0


def _held(call: ScheduledCall, rows: Spans, backward: bool) -> int:
    """Bytes of q, k, v, out and lse of a rank, and in training of their gradients: those of keys in float32 until they are home."""
    size, wide = call.dtype.itemsize, state_dtype(call.dtype).itemsize
    tokens = call.batch * count_rows(rows)
    queries, keys = tokens * call.heads * call.width, tokens * call.kv_heads * call.width
    held = size * (queries + keys) + wide * tokens * call.heads
    return held + (size * queries + wide * keys if backward else 0)


def _ulysses(call: ScheduledCall, at: Hardware, backward: bool) -> Prediction:
    """Heads change places with rows before and after; between them a rank has whole sequences of its heads. Nothing overlaps."""
    shares = ulysses_shares(call)
    if shares is None:
        raise ValueError(f"ulysses must have a kv head a rank, got {call.kv_heads} kv heads for {call.ranks} ranks")
    slowest = max(shares)
    kv_heads = -(-call.kv_heads // call.ranks)
    step = _Step(slowest.work, call.length * kv_heads, 0, 0)
    mine = LAYOUTS["contiguous"](call.length, call.ranks).rows()[0]
    compute = transfer = 0.0
    received = 0
    passes = ((1.0, slowest.forward), (_BACKWARD_WORK, slowest.backward))
    for factor, nbytes in passes if backward else passes[:1]:
        compute += _compute(call, step, call.length * kv_heads // call.kv_heads, factor, at)
        transfer += _transfer(nbytes, at, 2 * (call.ranks - 1))
        received += nbytes
    held = _held(call, mine, backward)
    seconds = at.load * (compute + transfer)
    return Prediction("ulysses", seconds, compute, transfer, 2 * held, held, received, 1)
