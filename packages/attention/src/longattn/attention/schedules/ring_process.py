"""One rank's pass round a ring of processes.

In step t, rank r receives the keys of rank r - t and sends its own to rank r + t: a shard goes directly to the ranks whose queries see it,
and to no other. Life of a step, for each rank: 1. its exchange is posted before the rank computes on the keys of the step before; 2. the
rank waits for the exchange after that computation; 3. the rank computes, while the next step's exchange goes on; 4. in a backward, dk and
dv are sent to the rank that owns the keys, in float32. Before all steps, headers announce the bytes of every one of them. Keys of two steps and gradients of one are in memory at a time, in buffers that
are leased once and used in every step; where a part of a shard travels, it is packed and unpacked besides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longattn.attention.schedules.group import Members, WholeSequence, check_masks
from longattn.attention.schedules.group_calls import GRADIENTS, KEYS, Announced, Exchange
from longattn.attention.schedules.layouts import flat
from longattn.attention.schedules.packing import Lease, Packing, packing_of
from longattn.attention.schedules.passes import GradientSum, KeyStep, QueryShard, ScheduleRun, ScheduleWork
from longattn.attention.schedules.place import Parcel
from longattn.kernels.interface import find_plan, state_dtype


@dataclass
class RingStep:
    """One step: the ranks it exchanges with, which keys travel, and what is in flight. A packing of None: no pair is visible, nothing is sent.

    Attributes:
        number: from 1. source, target: the ranks that keys come from and go to.
        incoming, outgoing: which keys of the source, and which of ours, travel.
        received: keys, values and perhaps padding that arrive. exchange: what carries them.
        gradients: dk and dv of the received keys, in a backward.
    """

    number: int
    source: int
    target: int
    incoming: Packing | None
    outgoing: Packing | None
    received: tuple[Tensor, ...] = ()
    exchange: Exchange | None = None
    gradients: tuple[Tensor, Tensor] | None = None


class GroupRun(ScheduleRun):
    """This rank's queries as one shard; keys arrive step by step."""

    def __init__(self, members: Members, work: ScheduleWork) -> None:
        self.members, self.work = members, work
        self.whole = WholeSequence(members, work)
        check_masks(work, self.whole.nq, self.whole.nk)
        self.seed, self.mask, self.bias = self.whole.seed, work.tensors.mask, work.tensors.bias
        self.by_distance = work.tensors.by_distance
        self.size = members.place.size
        self.in_parts = self.size > 1
        self.k_rows = self.whole.keys.rows()
        self.backward = len(work.queries) > 1
        self.sums = (GradientSum(work.k), GradientSum(work.v))
        self.buffers: dict[tuple[str, int, torch.dtype], Tensor] = {}
        self.ring_steps = [self._ring_step(number) for number in range(1, self.size)]
        self.whole.calls.announce(self.whole.fields(work), self.whole.call, follow=self._announced())

    def shards(self) -> Iterator[QueryShard]:
        """One: what this rank holds."""
        total, first, count = self.work.arguments.heads
        yield QueryShard(self.work.queries, self.whole.spans[self.whole.me], self._steps(), None, (total, first, count))

    def join(self, parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """As it is."""
        return parts[0]

    def key_gradients(self) -> tuple[Tensor, Tensor]:
        """Of this rank's keys, from all ranks."""
        return self.sums[0].total(), self.sums[1].total()

    def _steps(self) -> Iterator[KeyStep]:
        work, me = self.work, self.whole.me
        upcoming = iter(self.ring_steps)
        posted = self._post(next(upcoming, None))
        yield KeyStep(work.k, work.v, work.padding, self.k_rows[me], self._add_gradients, self.k_rows[me])
        in_flight: tuple[RingStep, Exchange, tuple[Tensor, ...]] | None = None
        # Every rank posts every step in this order, also an empty one: two exchanges of a pair never overtake one another.
        while posted is not None:
            ring_step = posted
            if ring_step.exchange is not None:
                ring_step.exchange.wait()
            posted = self._post(next(upcoming, None))
            if ring_step.incoming is not None:
                yield self._key_step(ring_step, ring_step.incoming)
            if self.backward:
                # The gradients sent in the last step had this whole computation to arrive; one such exchange is in memory at a time.
                self._receive_gradients(in_flight)
                in_flight = None
                in_flight = self._send_gradients(ring_step)
        self._receive_gradients(in_flight)

    def _ring_step(self, number: int) -> RingStep:
        me, size = self.whole.me, self.size
        source, target = (me - number) % size, (me + number) % size
        return RingStep(number, source, target, self._visible_keys(me, source), self._visible_keys(target, me))

    def _visible_keys(self, queries: int, keys: int) -> Packing | None:
        """What the queries of one rank see of another's keys."""
        work = self.work
        arguments = work.arguments._replace(q_spans=flat(self.whole.spans[queries]), k_spans=flat(self.k_rows[keys]))
        plan = find_plan(arguments, work.environment)
        return None if plan.empty else packing_of(plan, work.k.shape[2])

    def _announced(self) -> Announced:
        """Bytes of what each rank is sent: keys, values and perhaps padding in one step, dk and dv in another."""
        work = self.work
        keys: dict[int, list[int]] = {rank: [] for rank in range(self.size)}
        gradients: dict[int, list[int]] = {rank: [] for rank in range(self.size)}
        wide = state_dtype(work.k.dtype).itemsize
        for ring_step in self.ring_steps:
            if ring_step.outgoing is not None:
                sizes = _numbers(ring_step.outgoing, (work.k, work.v))
                keys[ring_step.target] = [n * work.k.dtype.itemsize for n in sizes]
                keys[ring_step.target] += [] if work.padding is None else [work.padding.numel()]
            if ring_step.incoming is not None and self.backward:
                gradients[ring_step.source] = [n * wide for n in _numbers(ring_step.incoming, (work.k, work.v))]
        return {rank: (keys[rank], gradients[rank]) for rank in keys}

    def _post(self, ring_step: RingStep | None) -> RingStep | None:
        """Begin to send and receive the keys of a step."""
        if ring_step is None:
            return None
        work = self.work
        sends: list[Parcel] = []
        if ring_step.outgoing is not None:
            outgoing = ring_step.outgoing
            # Sent before the next step's are posted.
            sends = [
                (ring_step.target, outgoing.pack(x, self._lease("sent keys", n)))
                for n, x in enumerate((work.k, work.v))
            ]
            sends += [] if work.padding is None else [(ring_step.target, work.padding.contiguous())]
        if ring_step.incoming is not None:
            # Double buffered: the rank still computes on the keys of the step before while these arrive.
            slot = f"received keys {ring_step.number % 2}"
            ring_step.received = self._leased(slot, ring_step.incoming)
            if work.padding is not None:
                ring_step.received += (work.padding.new_empty(work.padding.shape[0], ring_step.incoming.rows),)
        receives = [(ring_step.source, x) for x in ring_step.received]
        ring_step.exchange = Exchange(self.whole.calls, f"keys {ring_step.number}", sends, receives, KEYS)
        return ring_step

    def _key_step(self, ring_step: RingStep, incoming: Packing) -> KeyStep:
        k, v, *padding = ring_step.received
        k, v = (incoming.unpack(x, self._lease("unpacked keys", n)) for n, x in enumerate((k, v)))
        rows = self.k_rows[ring_step.source]

        def keep(dk: Tensor, dv: Tensor) -> None:
            ring_step.gradients = (dk, dv)

        ring_step.received = ()
        return KeyStep(k, v, padding[0] if padding else None, rows, keep, rows)

    def _send_gradients(self, ring_step: RingStep) -> tuple[RingStep, Exchange, tuple[Tensor, ...]]:
        """Begin to send the gradients of a step to the rank that owns its keys, and to receive those of ours."""
        wide = state_dtype(self.work.k.dtype)
        sends: list[Parcel] = []
        if ring_step.incoming is not None:
            # Each is let go when it is packed: no two copies of both stand side by side.
            gradients, ring_step.gradients = list(ring_step.gradients or ()), None
            while gradients:
                lease = self._lease("sent gradients", len(gradients), wide)
                packed = ring_step.incoming.pack(gradients.pop(0).to(wide), lease)
                sends.append((ring_step.source, packed))
        received: tuple[Tensor, ...] = ()
        if ring_step.outgoing is not None:
            received = self._leased("received gradients", ring_step.outgoing, wide)
        label = f"gradients {ring_step.number}"
        receives = [(ring_step.target, x) for x in received]
        return ring_step, Exchange(self.whole.calls, label, sends, receives, GRADIENTS), received

    def _receive_gradients(self, in_flight: tuple[RingStep, Exchange, tuple[Tensor, ...]] | None) -> None:
        if in_flight is None:
            return
        ring_step, exchange, received = in_flight
        exchange.wait()
        for total, part in zip(self.sums, received, strict=False):
            assert ring_step.outgoing is not None
            ring_step.outgoing.add(total.wide(), part)

    def _add_gradients(self, dk: Tensor, dv: Tensor) -> None:
        self.sums[0].add(dk)
        self.sums[1].add(dv)

    def _leased(self, purpose: str, packing: Packing, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Buffers for what of keys and of values travels, or of their gradients."""
        shapes = (packing.shape(len(x), x.shape[-1]) for x in (self.work.k, self.work.v))
        return tuple(self._lease(purpose, n, dtype)(shape) for n, shape in enumerate(shapes))

    def _lease(self, purpose: str, number: int, dtype: torch.dtype | None = None) -> Lease:
        """The COMM buffer for a purpose. What arrives has one for all steps: a later one reuses an earlier one's memory, if that is large enough.

        What is packed or unpacked goes with its last reference: it stands only in steps in which a part of a shard travels.
        """
        work, key = self.work, (purpose, number, dtype or self.work.k.dtype)

        def lease(shape: tuple[int, ...]) -> Tensor:
            flat, count = self.buffers.get(key), math.prod(shape)
            if not purpose.startswith("received"):
                return work.environment.allocator.empty(shape, key[2], work.k.device, "comm")
            if flat is None or flat.numel() < count:
                # The smaller one goes before the larger one comes.
                flat = None
                self.buffers.pop(key, None)
                flat = work.environment.allocator.empty((count,), key[2], work.k.device, "comm")
                self.buffers[key] = flat
            return flat[:count].view(shape)

        return lease


def _numbers(packing: Packing, tensors: Sequence[Tensor]) -> list[int]:
    """How many numbers of each tensor travel."""
    return [math.prod(packing.shape(len(x), x.shape[-1])) for x in tensors]
