"""What each engine sends and computes, counted from the plans; and `choose`, which picks by it and explains.

Nothing is measured here: bytes are exactly what `transport` sends (tests hold one against the other), work is (query, key) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from longattn.attention.schedules.all_gather import AllGather
from longattn.attention.schedules.base import Schedule
from longattn.attention.schedules.layouts import LAYOUTS, MOST_LENGTH, MOST_RANKS, flat, neighbours, rows_by_rank
from longattn.attention.schedules.packing import packing_of
from longattn.attention.schedules.place import Place
from longattn.attention.schedules.ring import Ring
from longattn.attention.schedules.ulysses import Ulysses
from longattn.attention.validate import check_pattern_argument, check_size, check_type
from longattn.kernels.interface import state_dtype
from longattn.patterncache import Pattern, Rectangle, get_global_pattern_cache

MOST_IMBALANCE = 1.25
"""An engine whose slowest rank works more than that over the mean is chosen only where all do."""


@dataclass(frozen=True)
class ScheduledCall:
    """A forward and backward over a whole sequence of `length` on `ranks` processes.

    Attributes:
        pattern, length, ranks, heads, kv_heads, head_dim, batch: as their names say. dtype: of q, k and v.
        value_head_dim: of v; None: head_dim.
    """

    pattern: Pattern
    length: int
    ranks: int
    heads: int
    kv_heads: int
    head_dim: int = 64
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    value_head_dim: int | None = None

    @property
    def width(self) -> int:
        """Numbers of a row of k and one of v together; as many as of q and out."""
        return self.head_dim + (self.value_head_dim or self.head_dim)


@dataclass(frozen=True)
class Traffic:
    """What one engine does for a call.

    Attributes:
        engine: its name; for rings "ring" and the layout.
        forward, backward: bytes sent by all ranks together.
        work: (query, key) pairs that each rank computes, over all heads of one batch element.
    """

    engine: str
    forward: int
    backward: int
    work: tuple[int, ...]

    @property
    def sent(self) -> int:
        """Bytes of forward and backward."""
        return self.forward + self.backward

    @property
    def imbalance(self) -> float:
        """The slowest rank's work over the mean; 1 is even."""
        return max(self.work) * len(self.work) / sum(self.work) if sum(self.work) else 1.0


def ring_traffic(call: ScheduledCall, layout: str = "contiguous", lengths: Sequence[int] | None = None) -> Traffic:
    """Of a `Ring`: of each shard, what each other rank sees of it; in a backward that again, and dk and dv in float32 (float64).

    lengths: of contiguous shards, as in `Ring`. Default: those of the layout.
    """
    rows = (LAYOUTS[layout](call.length, call.ranks) if lengths is None else neighbours(lengths)).rows()
    elements, work, cache = 0, [0] * call.ranks, get_global_pattern_cache()
    for reader, queries in enumerate(rows):
        for owner, keys in enumerate(rows):
            rectangle = Rectangle(call.heads, queries, keys)
            key = (call.pattern.canonical(), tuple(flat(queries)), tuple(flat(keys)), (call.heads, 0, call.heads))
            plan = cache.get_or_build(key, lambda r=rectangle: call.pattern.plan(r))
            work[reader] += sum(branch.pairs * branch.heads.length for branch in plan.branches)
            if owner != reader and not plan.empty:
                elements += call.batch * call.width * packing_of(plan, call.kv_heads).count
    wide = state_dtype(call.dtype).itemsize
    forward = elements * call.dtype.itemsize
    return Traffic(f"ring {layout}", forward, forward + elements * wide, tuple(work))


def full_ring_bytes(call: ScheduledCall) -> int:
    """Bytes that a ring which sends every shard to every rank sends in a forward; an all-gather of k and v sends as many."""
    return (call.ranks - 1) * call.batch * call.length * call.kv_heads * call.width * call.dtype.itemsize


def gather_traffic(call: ScheduledCall) -> Traffic:
    """Of `AllGather`, contiguous: every shard to every rank, and all its gradients back in float32 (float64)."""
    forward = full_ring_bytes(call)
    wide = state_dtype(call.dtype).itemsize
    work = ring_traffic(call).work
    return Traffic("all_gather", forward, forward + forward // call.dtype.itemsize * wide, work)


class UlyssesShare(NamedTuple):
    """What one rank of `Ulysses` does: (query, key) pairs of one batch element, and bytes that it sends in a forward and in a backward."""

    work: int
    forward: int
    backward: int


def ulysses_shares(call: ScheduledCall) -> list[UlyssesShare] | None:
    """Of `Ulysses`, contiguous, each rank's; None where there are fewer kv heads than ranks."""
    if call.kv_heads < call.ranks:
        return None
    group, size, wide = call.heads // call.kv_heads, call.dtype.itemsize, state_dtype(call.dtype).itemsize
    kv_heads, lengths = (rows_by_rank(LAYOUTS["contiguous"](n, call.ranks)) for n in (call.kv_heads, call.length))
    whole = LAYOUTS["contiguous"](call.length, 1).rows()[0]
    per_head = [0] * call.heads
    for branch in call.pattern.plan(Rectangle(call.heads, whole, whole)).branches:
        for head in branch.heads.positions():
            per_head[head] += branch.pairs
    shares: list[UlyssesShare] = []
    first_head = 0
    for mine, length in zip(kv_heads, lengths, strict=True):
        work = sum(per_head[first_head : first_head + mine * group])
        first_head += mine * group
        # (rows, kv heads) that change places, on the way there; over all ranks, as many on the way back.
        exchanged = call.batch * length * (call.kv_heads - mine)
        # q and out, k and v; in a backward their gradients too.
        moved, lse = exchanged * (group + 1) * call.width * size, exchanged * group * wide
        shares.append(UlyssesShare(work, moved + lse, 2 * moved + lse))
    return shares


def ulysses_traffic(call: ScheduledCall) -> Traffic | None:
    """Of `Ulysses`, contiguous; None where there are fewer kv heads than ranks."""
    shares = ulysses_shares(call)
    if shares is None:
        return None
    work, forward, backward = zip(*shares, strict=True)
    return Traffic("ulysses", sum(forward), sum(backward), work)


@dataclass(frozen=True)
class Choice:
    """What `choose` chose.

    Attributes:
        engine: its name, as in `Traffic`. schedule: ready to use where a group was given, else None.
        traffic: of every engine that could serve, in order of preference. reasons: why not the others.
    """

    engine: str
    schedule: Schedule | None
    traffic: tuple[Traffic, ...]
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.engine}: fewest bytes of the engines in balance"]
        for offer in self.traffic:
            verdict = self.reasons.get(offer.engine, "chosen")
            lines.append(
                f"  {offer.engine}: {offer.sent:,} bytes, slowest rank {offer.imbalance:.2f} x the mean: {verdict}"
            )
        lines += [f"  {name}: {why}" for name, why in self.reasons.items() if name == "ulysses" and "kv heads" in why]
        return "\n".join(lines)


def choose(
    group: ProcessGroup | DeviceMesh | int,
    pattern: Pattern,
    length: int,
    num_heads: int,
    *,
    kv_heads: int | None = None,
    head_dim: int = 64,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    value_head_dim: int | None = None,
) -> Choice:
    """The engine that sends least for a forward and backward, of those whose slowest rank works at most 1.25 times the mean.

    Args:
        group: a ProcessGroup, a DeviceMesh of one dimension, or a number of ranks; at most 1024.
        pattern: who sees whom. length: of the whole sequence. num_heads: query heads.
        kv_heads: default num_heads. head_dim, batch, dtype: of q, k and v. Defaults 64, 1, torch.bfloat16. value_head_dim: of v, where it
            has its own.

    Returns:
        The choice; `str()` of it says what each engine would send, and why it was not chosen.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """
    ranks = check_size("group", group) if isinstance(group, int) else Place.of(group).size
    if ranks > MOST_RANKS:
        raise ValueError(f"group must have at most {MOST_RANKS} ranks, each of whose steps is looked at, got {ranks}")
    check_type("dtype", dtype, torch.dtype, "a torch.dtype")
    if check_size("length", length) > MOST_LENGTH:
        raise ValueError(f"length must be at most {MOST_LENGTH}, whose rows are looked at, got {length}")
    heads = check_size("num_heads", num_heads)
    kv_heads = heads if kv_heads is None else check_size("kv_heads", kv_heads)
    if heads % kv_heads:
        raise ValueError(f"kv_heads must divide num_heads={heads}, got {kv_heads}")
    call = ScheduledCall(check_pattern_argument(pattern), length, ranks, heads, kv_heads, check_size("head_dim", head_dim), check_size("batch", batch), dtype, None if value_head_dim is None else check_size("value_head_dim", value_head_dim))  # fmt: skip
    offers = [ring_traffic(call, layout) for layout in LAYOUTS]
    ulysses = ulysses_traffic(call)
    offers += [gather_traffic(call)] if ulysses is None else [ulysses, gather_traffic(call)]
    balanced = [offer for offer in offers if offer.imbalance <= MOST_IMBALANCE] or offers
    best = min(balanced, key=lambda offer: offer.sent)
    reasons = {
        offer.engine: f"slowest rank over {MOST_IMBALANCE} x the mean"
        if offer not in balanced
        else _sends_more(offer, best)
        for offer in offers
        if offer is not best
    }
    if ulysses is None:
        reasons["ulysses"] = f"{kv_heads} kv heads are fewer than {ranks} ranks"
    schedule = None if isinstance(group, int) else _build(best.engine, group, call.length)
    return Choice(best.engine, schedule, tuple(sorted(offers, key=lambda offer: offer.sent)), reasons)


def _sends_more(offer: Traffic, best: Traffic) -> str:
    return "sends more" if offer.sent > best.sent else "sends as much, and stands later in order"


def _build(engine: str, group: ProcessGroup | DeviceMesh, length: int) -> Schedule:
    name, _, layout = engine.partition(" ")
    if name == "ring":
        return Ring(group, layout=layout, lengths=length)  # type: ignore[arg-type]
    return Ulysses(group, lengths=length) if name == "ulysses" else AllGather(group, lengths=length)
