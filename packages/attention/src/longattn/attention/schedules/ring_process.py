"""One rank's pass round a ring of processes.

At turn t, rank r takes the keys of rank r - t, and its own go to rank r + t: a shard goes straight to those who see it, and to nobody
else. Life of a turn, for each rank: 1. its exchange is posted, before the rank computes on what came last; 2. after that computation it
is waited for; 3. the step is computed, while the next turn's exchange goes on; 4. in a backward, its dk and dv go home in float32.
Keys of two turns and gradients of one are in memory at a time, in buffers that are leased once and used turn after turn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longattn.attention.schedules.group import Members, Whole, check_masks
from longattn.attention.schedules.layouts import Spans
from longattn.attention.schedules.packing import Lease, Packing, packing_of
from longattn.attention.schedules.passes import GradientSum, Run, Shard, Step, Work
from longattn.attention.schedules.transport import Exchange, Parcel
from longattn.kernels.interface import find_plan, state_dtype


@dataclass
class _Turn:
    """One turn: with whom, what of it, and what is in flight. A packing of None: nobody sees anything, nothing moves."""

    number: int
    source: int
    target: int
    takes: Packing | None
    gives: Packing | None
    received: tuple[Tensor, ...] = ()
    exchange: Exchange | None = None
    gradients: tuple[Tensor, Tensor] | None = None


class GroupRun(Run):
    """This rank's queries as one shard; keys arrive turn by turn."""

    def __init__(self, members: Members, work: Work) -> None:
        self.members, self.work = members, work
        self.whole = Whole(members, work)
        check_masks(work, self.whole.nq, self.whole.nk)
        self.seed, self.mask, self.bias = self.whole.seed, work.mask, work.bias
        self.size = members.place.size
        self.k_rows = self.whole.keys.rows()
        self.backward = len(work.queries) > 1
        self.sums = (GradientSum(work.k), GradientSum(work.v))
        self.buffers: dict[tuple[str, int, torch.dtype], Tensor] = {}

    def shards(self) -> Iterator[Shard]:
        """One: what this rank holds."""
        total, first, count = self.work.asked.heads
        yield Shard(self.work.queries, self.whole.spans[self.whole.me], self._steps(), None, (total, first, count))

    def join(self, parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """As it is."""
        return parts[0]

    def key_gradients(self) -> tuple[Tensor, Tensor]:
        """Of this rank's keys, from all ranks."""
        return self.sums[0].total(), self.sums[1].total()

    def _steps(self) -> Iterator[Step]:
        work, me = self.work, self.whole.me
        turns = [self._turn(number) for number in range(1, self.size)]
        upcoming = iter(turns)
        posted = self._post(next(upcoming, None))
        yield Step(work.k, work.v, work.padding, self.k_rows[me], self._add_own, self.k_rows[me])
        home: tuple[_Turn, Exchange, tuple[Tensor, ...]] | None = None
        # Every rank posts every turn in this order, also an empty one: two exchanges of a pair never overtake one another.
        while posted is not None:
            turn = posted
            if turn.exchange is not None:
                turn.exchange.wait()
            posted = self._post(next(upcoming, None))
            if turn.takes is not None:
                yield self._arrived(turn, turn.takes)
            if self.backward:
                # What left last time had this whole computation to arrive; one such exchange is in memory at a time.
                self._come_home(home)
                home = self._send_home(turn)
        self._come_home(home)

    def _turn(self, number: int) -> _Turn:
        me, size = self.whole.me, self.size
        source, target = (me - number) % size, (me + number) % size
        return _Turn(number, source, target, self._seen(me, source), self._seen(target, me))

    def _seen(self, queries: int, keys: int) -> Packing | None:
        """What the queries of one rank see of another's keys."""
        work = self.work
        asked = work.asked._replace(q_spans=_flat(self.whole.spans[queries]), k_spans=_flat(self.k_rows[keys]))
        plan = find_plan(asked, work.environment)
        return None if plan.empty else packing_of(plan, work.k.shape[2])

    def _post(self, turn: _Turn | None) -> _Turn | None:
        """Begin to send and receive the keys of a turn."""
        if turn is None:
            return None
        work = self.work
        sends: list[Parcel] = []
        if turn.gives is not None:
            gives = turn.gives
            # Sent before the next turn's are posted.
            sends = [(turn.target, gives.pack(x, self._lease("giving", n))) for n, x in enumerate((work.k, work.v))]
            sends += [] if work.padding is None else [(turn.target, work.padding.contiguous())]
        if turn.takes is not None:
            # Double buffered: the turn before is still computed on while these fill.
            slot = f"arriving {turn.number % 2}"
            turn.received = tuple(self._lease(slot, n)(self._packed(turn.takes)) for n in range(2))
            if work.padding is not None:
                turn.received += (work.padding.new_empty(work.padding.shape[0], turn.takes.rows),)
        receives = [(turn.source, x) for x in turn.received]
        turn.exchange = Exchange(self.members.place, f"keys {turn.number}", sends, receives)
        return turn

    def _arrived(self, turn: _Turn, takes: Packing) -> Step:
        k, v, *padding = turn.received
        k, v = (takes.unpack(x, self._lease("unpacked", n)) for n, x in enumerate((k, v)))
        rows = self.k_rows[turn.source]

        def keep(dk: Tensor, dv: Tensor) -> None:
            turn.gradients = (dk, dv)

        turn.received = ()
        return Step(k, v, padding[0] if padding else None, rows, keep, rows)

    def _send_home(self, turn: _Turn) -> tuple[_Turn, Exchange, tuple[Tensor, ...]]:
        """Begin to send the gradients of a turn to whom its keys belong, and to receive those of ours."""
        wide = state_dtype(self.work.k.dtype)
        sends: list[Parcel] = []
        if turn.takes is not None:
            takes, gave = turn.takes, turn.gradients
            assert gave is not None
            leases = (self._lease("leaving", n, wide) for n in range(2))
            sends = [(turn.source, takes.pack(x.to(wide), lease)) for x, lease in zip(gave, leases, strict=True)]
        turn.gradients = None
        coming: tuple[Tensor, ...] = ()
        if turn.gives is not None:
            coming = tuple(self._lease("coming", n, wide)(self._packed(turn.gives)) for n in range(2))
        label = f"gradients {turn.number}"
        return turn, Exchange(self.members.place, label, sends, [(turn.target, x) for x in coming]), coming

    def _come_home(self, home: tuple[_Turn, Exchange, tuple[Tensor, ...]] | None) -> None:
        if home is None:
            return
        turn, exchange, coming = home
        exchange.wait()
        for total, part in zip(self.sums, coming, strict=False):
            assert turn.gives is not None
            turn.gives.add(total.wide(), part)

    def _add_own(self, dk: Tensor, dv: Tensor) -> None:
        self.sums[0].add(dk)
        self.sums[1].add(dv)

    def _packed(self, packing: Packing) -> tuple[int, ...]:
        return packing.shape(self.work.k.shape[0], self.work.k.shape[-1])

    def _lease(self, purpose: str, number: int, dtype: torch.dtype | None = None) -> Lease:
        """The COMM buffer for a purpose: what a later turn asks for stands where an earlier turn's stood, if there is room."""
        work, key = self.work, (purpose, number, dtype or self.work.k.dtype)

        def lease(shape: tuple[int, ...]) -> Tensor:
            flat, count = self.buffers.get(key), math.prod(shape)
            if flat is None or flat.numel() < count:
                flat = work.environment.allocator.empty((count,), key[2], work.k.device, "comm")
                self.buffers[key] = flat
            return flat[:count].view(shape)

        return lease


def _flat(spans: Spans) -> list[int]:
    return [n for span in spans for n in (span.start, span.length, span.step)]
