"""`Ulysses`: from rows to heads and back (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509).

Each rank sends its rows of most heads away and receives all rows of a few: an all-to-all before the attention, and one after. In between
an inner schedule runs on those heads: `Local`, or a `Ring` over another dimension of a DeviceMesh, which is the 2-D combination.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from longattn.attention.schedules import all_gather, ring  # noqa: F401  # pyright: ignore[reportUnusedImport]  Registers what may run inside, beside Local.
from longattn.attention.schedules.base import Schedule, build_schedule
from longattn.attention.schedules.extents import CONFLICT, MASK, Extents, agreed_flags
from longattn.attention.schedules.gathering import gather_rows
from longattn.attention.schedules.group import Members, OverGroup, WholeSequence, check_masks, total_rows
from longattn.attention.schedules.head_exchange import HeadExchange
from longattn.attention.schedules.layouts import LayoutName, Spans, count_rows, take
from longattn.attention.schedules.local import Local
from longattn.attention.schedules.passes import QueryShard, ScheduleRun, ScheduleWork
from longattn.attention.validate import check_type, integers
from longattn.kernels.interface import OpTensors


@dataclass(frozen=True, init=False)
class Ulysses(OverGroup, name="ulysses"):
    """Exchanges rows for heads, runs `inner` on all rows of this rank's heads, and exchanges back. Gives what `Local` gives.

    A kv head and its query heads stay together, so there must be at least as many kv heads as ranks; they need not divide. With an
    inner Ring over `mesh["ring"]`, the sequence is first cut over the ring, and each of its shards over this group.

    Args:
        group, layout, lengths, timeout: as in `Ring`.
        inner: what runs on the heads. Default Local().

    Raises:
        TypeError, ValueError: a bad argument, by name.

    Example: Ulysses(mesh["heads"], inner=Ring(mesh["ring"], layout="zigzag"))
    """

    members: Members
    inner: Schedule

    def __init__(
        self,
        group: ProcessGroup | DeviceMesh,
        layout: LayoutName = "contiguous",
        lengths: int | Sequence[int] | None = None,
        inner: Schedule | None = None,
        timeout: float | None = None,
    ) -> None:
        schedule = (
            Local()
            if inner is None
            else check_type("inner", inner, Schedule, "None or a Schedule such as Ring(mesh['ring'])")
        )
        object.__setattr__(self, "members", Members.of(group, layout, lengths, timeout))
        object.__setattr__(self, "inner", schedule)
        self._check_groups()

    def _check_groups(self) -> None:
        """This group and the inner ones must be different dimensions: this rank is all that two of them share."""
        place, inner = self.members.place, self.inner
        while isinstance(inner, OverGroup) and inner.distributed:
            inner_place = inner.members.place
            shared = set(place.members()) & set(inner_place.members())
            if len(shared) > 1:
                raise ValueError(
                    f"inner must be over another dimension than group: they may share this rank only, got ranks {sorted(shared)} in "
                    f"both groups; make a DeviceMesh of two dimensions, and give each of them one"
                )
            inner = getattr(inner, "inner", None)

    def start(self, work: ScheduleWork) -> ScheduleRun:
        """A run of `inner` on this rank's heads, which are here when it returns."""
        return _HeadsRun(self, work)

    def to_spec(self) -> dict[str, Any]:
        """What says the group, and the inner schedule."""
        return self.members.to_spec() | {"inner": [self.inner.name, self.inner.to_spec()]}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """The engine over that group."""
        inside: Any = {"inner": build_schedule(*spec["inner"])}
        return cls(**(spec | inside))

    def held(self, length: int) -> Spans:
        """This rank's rows: its part of what the inner schedule holds."""
        rows = self.inner.held(length)
        return take(rows, self.members.laid_out(count_rows(rows)).rows()[self.members.place.rank])

    @property
    def lengths_known(self) -> bool:
        """Whether lengths are known without an exchange of metadata, here and inside."""
        return self.members.lengths_known and (not isinstance(self.inner, OverGroup) or self.inner.lengths_known)

    @contextmanager
    def underway(self) -> Generator[None]:
        """One pass over the group and the inner ones."""
        with super().underway(), self.inner.underway():
            yield

    def reset(self, timeout: float | None = None) -> None:
        """Take calls again after a `GroupError`, on this group and the inner ones; as in `Ring`."""
        super().reset(timeout)
        if isinstance(self.inner, OverGroup):
            self.inner.reset(timeout)

    def extents(self, nq: int, nk: int, metadata: Tensor | None) -> Extents:
        """This rank's part of what the inner schedule's rank, the whole of this group, has."""
        queries, keys = self.members.layouts(nq, nk, metadata)
        whole = self.inner.extents(total_rows(queries), total_rows(keys), self.inner_metadata(metadata))
        me = self.members.place.rank
        rows = take(whole.q_rows, queries.rows()[me]), take(whole.k_rows, keys.rows()[me])
        return Extents(whole.nq, whole.nk, *rows)

    def gather_keys(self, x: Tensor, nq: int, nk: int, metadata: Tensor | None) -> Tensor:
        """From every rank of this group, and then of the inner one."""
        queries, keys = self.members.layouts(nq, nk, metadata)
        x = gather_rows(self.members.calls, x, keys, self.members.timeout)
        return self.inner.gather_keys(x, total_rows(queries), total_rows(keys), self.inner_metadata(metadata))

    def inner_metadata(self, metadata: Tensor | None) -> Tensor | None:
        """The inner schedule's part of the metadata."""
        return metadata[self.members.place.size :] if metadata is not None and self.inner.distributed else None

    @property
    def ranks(self) -> int:
        """Rows of the metadata: those of this group, then those of the inner one."""
        return self.members.place.size + self.inner.ranks * self.inner.distributed

    def gather_metadata(self, nq: int, nk: int, flags: int, seed: int | None) -> Tensor:
        """This group's metadata; then the inner one's, in which this group is one rank, with its rank 0's seed.

        Exchanged also where there is a mask: one rank alone cannot tell whether the mask's rows travel.
        """
        exchange = not self.lengths_known or seed is not None or bool(flags & MASK)
        metadata = self.members.gather_metadata(nq, nk, flags, seed, self.canonical(), exchange)
        if not self.inner.distributed:
            return metadata
        nq, nk = (int(n) for n in metadata[:, :2].sum(0))
        seed = None if seed is None else int(metadata[0, 3])
        return torch.cat([metadata, self.inner.gather_metadata(nq, nk, _as_one(integers(metadata[:, 2])), seed)])


def _as_one(flags: list[int]) -> int:
    """The flags of a group as one rank of the inner schedule; CONFLICT where its ranks differ, so that all ranks raise."""
    try:
        return agreed_flags(flags)
    except ValueError:
        return CONFLICT


class _HeadsRun(ScheduleRun):
    def __init__(self, ulysses: Ulysses, work: ScheduleWork) -> None:
        members, inner, given = ulysses.members, ulysses.inner, work.tensors
        self.work, self.whole = work, WholeSequence(members, work)
        self.exchange = HeadExchange(self.whole, work)
        mask, bias = (None if x is None else self.exchange.mask_to_heads(x) for x in (given.mask, given.bias))
        (*queries, k, v), padding = self.exchange.operands_to_heads(work)
        metadata = ulysses.inner_metadata(given.metadata)
        by_distance = None if given.by_distance is None else self.exchange.of_heads(given.by_distance)
        tensors = OpTensors(queries[0], k, v, bias, by_distance, mask, padding, self.whole.seed, metadata=metadata)
        # Ranks of the inner group need not have this group's lengths.
        arguments = work.arguments._replace(heads=self.exchange.heads, schedule=inner.canonical())
        inside = ScheduleWork(tuple(queries), tensors, arguments, work.environment)
        if not inner.distributed:
            check_masks(inside, self.whole.nq, self.whole.nk)
        self.inside = inner.start(inside)
        self.seed, self.mask, self.bias = self.inside.seed, self.inside.mask, self.inside.bias
        self.by_distance = self.inside.by_distance
        self.one_step, self.in_parts = self.inside.one_step, self.inside.in_parts

    def shards(self) -> Iterator[QueryShard]:
        yield from self.inside.shards()

    def join(self, parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        out, *rest = self.inside.join(parts)
        # Nothing is added on the way, so it is rounded before it travels.
        dtype = self.work.queries[0].dtype if len(self.work.queries) > 1 else self.work.arguments.out_dtype
        return tuple(self.exchange.to_rows("queries to rows", [out.to(dtype), *rest], self.whole.queries))

    def key_gradients(self) -> tuple[Tensor, Tensor]:
        dtype = self.work.k.dtype
        gradients = [x.to(dtype) for x in self.inside.key_gradients()]
        dk, dv = self.exchange.to_rows("gradients to rows", gradients, self.whole.keys)
        return dk, dv

    def bias_gradient(self, gradient: Tensor) -> Tensor:
        bias = self.work.tensors.bias
        assert bias is not None
        return self.exchange.mask_to_rows(self.inside.bias_gradient(gradient), bias)

    def by_distance_gradient(self, gradient: Tensor) -> Tensor:
        return self.exchange.among_heads(self.inside.by_distance_gradient(gradient))
