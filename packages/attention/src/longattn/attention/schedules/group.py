"""What every schedule over a process group knows: its ranks, how long each shard is, and which seed is used.

Before each call the ranks exchange their metadata, four integers (`longattn::roll_call`): lengths of q and k, which masks there are, and the
dropout seed, of which rank 0's counts. Where `lengths` is given and nothing is dropped, no exchange takes place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longattn.attention.schedules.base import Schedule
from longattn.attention.schedules.extents import Extents, agreed_flags, mask_has_rows
from longattn.attention.schedules.gathering import gather_rows
from longattn.attention.schedules.layouts import (
    LAYOUTS,
    Layout,
    LayoutName,
    Spans,
    check_layout,
    count_rows,
    neighbours,
    take,
)
from longattn.attention.schedules.passes import ScheduleWork, query_spans
from longattn.attention.schedules.transport import Place, gather_integers
from longattn.attention.validate import integers
from longattn.kernels.interface import check_attention_mask
from longattn.patterncache import parse_pattern

Lengths = int | tuple[int, ...] | None

COLUMNS = 4
"""Of a rank's metadata: length of q, of k, flags as `Schedule.exchange_metadata` takes them, seed."""


def check_lengths(lengths: object, layout: str) -> Lengths:
    """None, the whole sequence's length, or that of each rank's shard (contiguous layouts only)."""
    if lengths is None:
        return None
    listed: Any = (lengths,) if isinstance(lengths, int) else lengths
    numbers: list[Any] = [*listed] if isinstance(listed, (tuple, list)) else [None]
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise TypeError(f"lengths must be None, the whole length, or one for each rank, got {lengths!r}")
    if any(n < 0 for n in numbers):
        raise ValueError(f"lengths must be >= 0, got {lengths!r}")
    if isinstance(lengths, int):
        return lengths
    if layout != "contiguous":
        raise ValueError(f"lengths must be None or the whole length where layout is {layout!r}, got {lengths!r}")
    return tuple(numbers)


@dataclass(frozen=True)
class Members:
    """The ranks of a group, and how a sequence is cut over them."""

    place: Place
    layout: LayoutName
    lengths: Lengths

    @classmethod
    def of(cls, group: object, layout: object, lengths: object) -> Members:
        """Checked, by name."""
        name: Any = check_layout(layout)
        return cls(Place.of(group), name, check_lengths(lengths, name))

    def to_spec(self) -> dict[str, Any]:
        """JSON values."""
        lengths = list(self.lengths) if isinstance(self.lengths, tuple) else self.lengths
        known_lengths = {} if lengths is None else {"lengths": lengths}
        return {"group": self.place.name, "layout": self.layout, **known_lengths}

    @property
    def lengths_known(self) -> bool:
        """Whether lengths are known without an exchange of metadata."""
        return self.lengths is not None

    def gather_metadata(self, nq: int, nk: int, flags: int, seed: int) -> Tensor:
        """(ranks, COLUMNS) int64."""
        return gather_integers(self.place, (nq, nk, flags, seed))

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
        elif isinstance(self.lengths, int):
            lengths = [[count_rows(rows) for rows in self.laid_out(self.lengths).rows()]] * 2
        else:
            assert self.lengths is not None
            lengths = [list(self.lengths)] * 2
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
        """The metadata of all ranks: lengths, and rank 0's seed. None where lengths are known and nothing is dropped."""
        if self.lengths_known and seed is None:
            return None
        return torch.ops.longattn.roll_call(seed, nq, nk, flags, self.canonical())

    def extents(self, nq: int, nk: int, metadata: Tensor | None) -> Extents:
        """As the layout has it, at the lengths that all ranks have together."""
        queries, keys = self.members.layouts(nq, nk, metadata)
        me = self.members.place.rank
        return Extents(total_rows(queries), total_rows(keys), queries.rows()[me], keys.rows()[me])

    def gather_keys(self, x: Tensor, nq: int, nk: int, metadata: Tensor | None) -> Tensor:
        """From every rank."""
        return gather_rows(self.members.place, x, self.members.layouts(nq, nk, metadata)[1])

    @property
    def ranks(self) -> int:
        """Ranks of the group."""
        return self.members.place.size

    def gather_metadata(self, nq: int, nk: int, flags: int, seed: int) -> Tensor:
        """(ranks, COLUMNS) int64."""
        return self.members.gather_metadata(nq, nk, flags, seed)


class WholeSequence:
    """A call's whole sequence: how queries and keys are cut over the ranks, where they stand, and the seed.

    Attributes:
        queries, keys: the two layouts. me: this rank.
        spans: of each rank's queries. seed: rank 0's, or None.
        nq, nk: lengths. rows: whether the whole sequence's mask has rows of its own for each query, as far as ranks asked.

    Raises:
        ValueError: lengths that do not fit the layout, on every rank alike.
    """

    def __init__(self, members: Members, work: ScheduleWork) -> None:
        metadata = work.tensors.metadata
        self.me = members.place.rank
        self.seed = metadata[0, 3] if metadata is not None and work.asked.dropout_p else None
        # Of all groups: a mask is of one kind in the whole sequence.
        self.rows = metadata is not None and mask_has_rows(agreed_flags(integers(metadata[:, 2])))
        self.queries, self.keys = members.layouts(work.queries[0].shape[1], work.k.shape[1], metadata)
        self.nq, self.nk = total_rows(self.queries), total_rows(self.keys)
        spans = query_spans(work.asked, self.nq, self.nk)
        self.spans = [take(spans, rows) for rows in self.queries.rows()]


def total_rows(layout: Layout) -> int:
    """Rows of all ranks together."""
    return sum(count_rows(rows) for rows in layout.rows())


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
    expected = [count_rows(rows) for rows in layout.rows()]
    if expected != list(lengths):
        raise ValueError(f"shards must have the lengths {expected} of layout {members.layout!r}, got {list(lengths)}")
    return layout


def check_masks(work: ScheduleWork, nq: int, nk: int) -> None:
    """Check what one shard could not show before the exchange: masks have the whole sequence's columns, and queries have positions."""
    q, keys = work.queries[0], work.k.new_empty(()).expand(work.k.shape[0], nk, *work.k.shape[2:])
    check_attention_mask(work.tensors.mask if work.tensors.bias is None else work.tensors.bias, q, keys)
    if not work.asked.q_spans and nq > nk and parse_pattern(work.asked.pattern).positional:
        raise ValueError(
            f"q_start must be given where queries outnumber keys and positions matter, got Nq={nq}, Nk={nk}"
        )
