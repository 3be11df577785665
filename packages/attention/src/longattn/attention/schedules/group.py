"""What every schedule over a process group knows: its ranks, how long each shard is, and which seed is used.

Each call begins with its metadata (`longattn::roll_call`): lengths of q and k, which masks and sinks there are, the dropout seed, of which
rank 0's counts, and the number of the call. Where `lengths` is given and nothing is dropped, every rank writes it down by itself; else they
exchange it. Either way each forward and backward begins with headers, which are compared (`group_calls`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from longattn.attention.schedules.base import Schedule
from longattn.attention.schedules.callers import caller_fields, calls_over
from longattn.attention.schedules.extents import (
    CONFLICT,
    SINKS,
    Extents,
    agreed_flags,
    describe_masks,
    mask_flags,
    mask_has_rows,
)
from longattn.attention.schedules.gathering import gather_rows
from longattn.attention.schedules.group_calls import GroupCalls
from longattn.attention.schedules.headers import Fields
from longattn.attention.schedules.layouts import (
    LAYOUTS,
    Layout,
    LayoutName,
    Spans,
    check_layout,
    neighbours,
    rows_by_rank,
    take,
)
from longattn.attention.schedules.passes import ScheduleWork, query_spans
from longattn.attention.schedules.place import Place
from longattn.attention.schedules.resetting import reset_calls
from longattn.attention.schedules.transport import gather_integers
from longattn.attention.validate import check_positive, integers
from longattn.kernels.interface import check_attention_mask, dtype_name
from longattn.patterncache import parse_pattern
from longattn.patterncache.spans import shortened

Lengths = int | tuple[int, ...] | None

COLUMNS = 5
"""Of a rank's metadata: length of q, of k, flags as `Schedule.exchange_metadata` takes them, seed, number of the call."""


def check_lengths(lengths: object, layout: str) -> Lengths:
    """None, the whole sequence's length, or that of each rank's shard (contiguous layouts only)."""
    if lengths is None:
        return None
    listed: Any = (lengths,) if isinstance(lengths, int) else lengths
    numbers: list[Any] = [*listed] if isinstance(listed, (tuple, list)) else [None]
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise TypeError(f"lengths must be None, the whole length, or one for each rank, got {shortened(lengths)}")
    if any(n < 0 for n in numbers):
        raise ValueError(f"lengths must be >= 0, got {shortened(lengths)}")
    if isinstance(lengths, int):
        return lengths
    if layout != "contiguous":
        raise ValueError(
            f"lengths must be None or the whole length where layout is {layout!r}, got {shortened(lengths)}"
        )
    return tuple(numbers)


@dataclass(frozen=True)
class Members:
    """The ranks of a group, and how a sequence is cut over them."""

    place: Place
    layout: LayoutName
    lengths: Lengths
    timeout: float | None = None

    @classmethod
    def of(cls, group: object, layout: object, lengths: object, timeout: object = None) -> Members:
        """Checked, by name."""
        name: Any = check_layout(layout)
        seconds = None if timeout is None else check_positive("timeout", timeout)
        return cls(Place.of(group), name, check_lengths(lengths, name), seconds)

    @property
    def calls(self) -> GroupCalls:
        """What this process has called over the group."""
        return calls_over(self.place)

    def to_spec(self) -> dict[str, Any]:
        """JSON values."""
        lengths = list(self.lengths) if isinstance(self.lengths, tuple) else self.lengths
        spec = {"group": self.place.name, "layout": self.layout, "lengths": lengths, "timeout": self.timeout}
        return {name: value for name, value in spec.items() if value is not None}

    @property
    def lengths_known(self) -> bool:
        """Whether lengths are known without an exchange of metadata."""
        return self.lengths is not None

    def gather_metadata(self, nq: int, nk: int, flags: int, seed: int | None, schedule: str, exchange: bool) -> Tensor:
        """(ranks, COLUMNS) int64: of a call that begins. Without `exchange`, lengths are those given, and flags this rank's."""
        call = self.calls.next_call()
        if exchange:
            row = (nq, nk, flags, 0 if seed is None else seed)
            rows = gather_integers(self.calls, "lengths", row, call, shared_schedule(schedule), self.timeout)
            return torch.cat([rows, rows.new_full((len(rows), 1), call)], 1)
        rows = [[n, n, flags, 0, call] for n in self._known_lengths()]
        return torch.tensor(rows, dtype=torch.int64, device="cpu")

    def _known_lengths(self) -> list[int]:
        if isinstance(self.lengths, int):
            return rows_by_rank(self.laid_out(self.lengths))
        assert self.lengths is not None
        return list(self.lengths)

    def laid_out(self, length: int) -> Layout:
        """Which rank holds which rows of a sequence of that length, unless an exchange of metadata says otherwise."""
        if isinstance(self.lengths, tuple):
            return neighbours(self.lengths)
        return LAYOUTS[self.layout](length, self.place.size)

    def held(self, length: int) -> Spans:
        """This rank's rows."""
        return self.laid_out(length).rows()[self.place.rank]

    def layouts(self, nq: int, nk: int, metadata: Tensor | None) -> tuple[Layout, Layout]:
        """How queries and keys of a call are cut over the ranks, of which this one has `nq` and `nk`.

        Raises:
            ValueError: lengths that do not fit the layout.
        """
        if metadata is not None:
            lengths = [integers(metadata[: self.place.size, column]) for column in range(2)]
        else:
            lengths = [self._known_lengths()] * 2
        _check_shard_lengths(lengths, self.place.rank, (nq, nk), self)
        return _layout_of_lengths(self, lengths[0]), _layout_of_lengths(self, lengths[1])


class OverGroup(Schedule):
    """What schedules over one process group share.

    Attributes:
        members: the group, and how a sequence is cut over it.
    """

    members: Members

    @property
    def distributed(self) -> bool:
        """q, k and v are one rank's shards."""
        return True

    @property
    def lengths_known(self) -> bool:
        """Whether lengths are known without an exchange of metadata."""
        return self.members.lengths_known

    def held(self, length: int) -> Spans:
        """This rank's rows."""
        return self.members.held(length)

    def exchange_metadata(self, nq: int, nk: int, flags: int, seed: Tensor | None) -> Tensor | None:
        """The metadata of all ranks: lengths, rank 0's seed, and the number of the call."""
        return torch.ops.longattn.roll_call(seed, nq, nk, flags, self.canonical())

    def underway(self) -> AbstractContextManager[None]:
        """One pass over the group."""
        return self.members.calls.underway(self.members.timeout)

    def reset(self, timeout: float | None = None) -> None:
        """Take calls again after a `GroupError`. Every rank of the group must call this; it waits for the others.

        What the failed call left in flight is brought to an end, so that nothing of it can reach a later call. The ranks then
        count their calls alike again.

        Args:
            timeout: seconds to wait for the other ranks. Default: the schedule's.

        Raises:
            GroupError: a rank has not called it in time, or is gone: then the group must be made anew.
        """
        seconds = self.members.timeout if timeout is None else check_positive("timeout", timeout)
        reset_calls(self.members.calls, seconds)

    def extents(self, nq: int, nk: int, metadata: Tensor | None) -> Extents:
        """As the layout has it, at the lengths that all ranks have together."""
        queries, keys = self.members.layouts(nq, nk, metadata)
        me = self.members.place.rank
        return Extents(total_rows(queries), total_rows(keys), queries.rows()[me], keys.rows()[me])

    def gather_keys(self, x: Tensor, nq: int, nk: int, metadata: Tensor | None) -> Tensor:
        """From every rank."""
        return gather_rows(self.members.calls, x, self.members.layouts(nq, nk, metadata)[1], self.members.timeout)

    @property
    def ranks(self) -> int:
        """Ranks of the group."""
        return self.members.place.size

    def gather_metadata(self, nq: int, nk: int, flags: int, seed: int | None) -> Tensor:
        """(ranks, COLUMNS) int64."""
        exchange = not self.lengths_known or seed is not None or bool(flags & CONFLICT)
        return self.members.gather_metadata(nq, nk, flags, seed, self.canonical(), exchange)


class WholeSequence:
    """A call's whole sequence: how queries and keys are cut over the ranks, where they stand, and the seed.

    Attributes:
        queries, keys: the two layouts. me: this rank. call: its number, 0 without metadata.
        spans: of each rank's queries. seed: rank 0's, or None.
        nq, nk: lengths. rows: whether the whole sequence's mask has rows of its own for each query, as far as ranks arguments.

    Raises:
        ValueError: lengths that do not fit the layout, on every rank alike.
    """

    def __init__(self, members: Members, work: ScheduleWork) -> None:
        metadata = work.tensors.metadata
        self.me, self.calls = members.place.rank, members.calls
        self.call = 0 if metadata is None else int(metadata[0, 4])
        self._flags = 0 if metadata is None else int(metadata[self.me, 2])
        self.seed = metadata[0, 3] if metadata is not None and work.arguments.dropout_p else None
        # Of all groups: a mask is of one kind in the whole sequence.
        self.rows = metadata is not None and mask_has_rows(agreed_flags(integers(metadata[:, 2])))
        self.queries, self.keys = members.layouts(work.queries[0].shape[1], work.k.shape[1], metadata)
        self.nq, self.nk = total_rows(self.queries), total_rows(self.keys)
        spans = query_spans(work.arguments, self.nq, self.nk)
        self.spans = [take(spans, rows) for rows in self.queries.rows()]

    def fields(self, work: ScheduleWork, step: str = "") -> Fields:
        """What the ranks must have alike in a pass over `work`."""
        arguments, tensors, (batch, _, heads, head_dim) = work.arguments, work.tensors, work.queries[0].shape
        forward = len(work.queries) == 1
        mask = tensors.mask if tensors.bias is None else tensors.bias
        graded = {"q, k, v": arguments.needs_grad, "bias": arguments.bias_grad, "terms": arguments.by_distance_grad}
        start = arguments.q_spans if len(arguments.q_spans) > 3 else arguments.q_spans[::2]
        return Fields(
            phase="forward" if forward else "backward",
            step=step,
            # A backward belongs to the forward of its call, whichever thread autograd takes.
            **(caller_fields(self.calls) if forward else {}),
            schedule=shared_schedule(arguments.schedule),
            pattern=arguments.pattern,
            dtype=dtype_name(work.k.dtype),
            batch=str(batch),
            heads=f"{heads}, first {arguments.heads[1]} of {arguments.heads[0]}",
            kv_heads=str(work.k.shape[2]),
            head_dim=str(head_dim),
            value_head_dim=str(work.v.shape[3]),
            q_lengths=str(rows_by_rank(self.queries)),
            k_lengths=str(rows_by_rank(self.keys)),
            q_start=str(start) if start else "",
            scale=str(arguments.scale),
            dropout_p=str(arguments.dropout_p),
            softcap=str(arguments.softcap),
            score_terms="" if tensors.by_distance is None else f"by distance {tuple(tensors.by_distance.shape)}",
            masks=describe_masks(mask_flags(work.padding, mask, self.queries.rows()[self.me][0].length)),
            sinks=str(bool(self._flags & SINKS)),
            gradients=", ".join(name for name, wanted in graded.items() if wanted),
        )


@lru_cache(maxsize=256)
def shared_schedule(canonical: str) -> str:
    """What ranks have alike of a schedule's canonical string: all but groups, which have other names on other ranks, and timeouts."""
    return json.dumps(_without_group(json.loads(canonical))) if canonical else ""


def _without_group(value: Any) -> Any:
    if isinstance(value, dict):
        items = cast(dict[str, Any], value).items()
        return {name: _without_group(x) for name, x in items if name not in ("group", "timeout")}
    return [_without_group(x) for x in cast(list[Any], value)] if isinstance(value, list) else value


def total_rows(layout: Layout) -> int:
    """Rows of all ranks together."""
    return sum(rows_by_rank(layout))


def _check_shard_lengths(lengths: list[list[int]], me: int, own_lengths: tuple[int, int], members: Members) -> None:
    for name, by_rank, length in zip(("q", "k"), lengths, own_lengths, strict=True):
        if len(by_rank) != members.place.size or by_rank[me] != length:
            raise ValueError(
                f"{name} must have the length that lengths={members.lengths} gives rank {me} of {by_rank}, got {length}"
            )


def _layout_of_lengths(members: Members, lengths: Sequence[int]) -> Layout:
    """The layout with shards of these lengths: contiguous ones may be any."""
    if members.layout == "contiguous":
        return neighbours(lengths)
    layout = LAYOUTS[members.layout](sum(lengths), len(lengths))
    expected = rows_by_rank(layout)
    if expected != list(lengths):
        raise ValueError(f"shards must have the lengths {expected} of layout {members.layout!r}, got {list(lengths)}")
    return layout


def check_masks(work: ScheduleWork, nq: int, nk: int) -> None:
    """Check what one shard could not show before the exchange: masks have the whole sequence's columns, and queries have positions."""
    q, keys = work.queries[0], work.k.new_empty(()).expand(work.k.shape[0], nk, *work.k.shape[2:])
    check_attention_mask(work.tensors.mask if work.tensors.bias is None else work.tensors.bias, q, keys)
    if not work.arguments.q_spans and nq > nk and parse_pattern(work.arguments.pattern).positional:
        raise ValueError(
            f"q_start must be given where queries outnumber keys and positions matter, got Nq={nq}, Nk={nk}"
        )
