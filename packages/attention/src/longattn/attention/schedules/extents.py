"""Where the rows of a call stand, and how long the whole sequence is: one description for all that depends on positions.

Under a schedule over a process group, a process holds some rows of a longer sequence. Rotary positions, left padding, packed documents,
masks and weights depend on where those rows stand and on lengths that only all ranks together know; none of them counts from its own
row 0. `Schedule.extents` gives the description; `call_extents` finds it for a module's call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longattn.attention.schedules.layouts import Spans, take
from longattn.patterncache import Span


@dataclass(frozen=True)
class Extents:
    """The whole of a call, and what of it is here.

    Attributes:
        nq, nk: rows of queries and of keys in the whole sequence.
        q_rows, k_rows: which of them this process holds, in its order.
    """

    nq: int
    nk: int
    q_rows: Spans
    k_rows: Spans

    @classmethod
    def of_whole(cls, nq: int, nk: int) -> Extents:
        """Everything is here."""
        return cls(nq, nk, (Span(0, nq),), (Span(0, nk),))

    def first_query(self, start: int | None) -> int:
        """Position of the whole sequence's first query: `start`, or such that queries are the last of the keys' positions."""
        return self.nk - self.nq if start is None else start

    def query_spans(self, start: int | None = None) -> Spans:
        """Positions of this process's queries; from 0 where queries outnumber keys and `start` is None."""
        return take((Span(max(0, self.first_query(start)), self.nq),), self.q_rows)


def row_numbers(rows: Spans) -> Tensor:
    """(rows,) int64 on the CPU: the members of some spans, one after the other."""
    # The device is named, because torch.device may be a context of another one.
    spans = [torch.arange(s.length, dtype=torch.int64, device="cpu") * s.step + s.start for s in rows]
    return torch.cat(spans)


# What a rank's attention mask is, in the metadata that ranks exchange (`Schedule.exchange_metadata`).
PADDING = 1
"""There is key padding."""
HAS_ROWS = 2
"""A mask with rows of its own for each query, for certain: not one row."""
MASK = 4
"""There is an attention mask."""
ONE_FOR_ALL = 8
"""A mask with one row for all queries, for certain: one row, where this rank's queries are not one."""
BY_HEAD = 16
"""A mask with entries of its own for each head."""
BY_ELEMENT = 32
"""A mask with entries of its own for each element of the batch."""
BIAS = 64
"""A floating mask."""
CONFLICT = 128
"""Of a group that is one rank of another schedule: its own ranks have different masks."""
SINKS = 256
"""The call has sink logits."""


def mask_flags(key_padding: Tensor | None, mask: Tensor | None, nq: int) -> int:
    """The flags of the masks of a rank with `nq` queries. One row where there is one query may be either kind, if it is a row at all."""
    flags = 0 if key_padding is None else PADDING
    if mask is None:
        return flags
    batch, heads, rows, _ = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    # Plain branches: in traced code sizes are symbols, and flags must not be.
    flags |= MASK | (BIAS if mask.is_floating_point() else 0)
    flags |= (BY_ELEMENT if batch != 1 else 0) | (BY_HEAD if heads != 1 else 0)
    if rows != 1:
        return flags | HAS_ROWS
    return flags | ONE_FOR_ALL if nq != 1 or mask.dim() < 2 else flags


_SHARED = {
    PADDING: ("key_padding_mask", "be given on every rank or on none"),
    MASK: ("attention_mask", "be given on every rank or on none"),
    BIAS: ("attention_mask", "be bool on every rank, or floating on every rank"),
    BY_HEAD: ("attention_mask", "have entries for each head on every rank or on none"),
    BY_ELEMENT: ("attention_mask", "have entries for each batch element on every rank or on none"),
}


def agreed_flags(flags: list[int]) -> int:
    """The flags of the whole sequence's masks, from those of each rank. `Ulysses` passes them to its inner schedule.

    Raises:
        ValueError: masks of different kinds, on every rank alike.
    """
    if any(rank_flags & CONFLICT for rank_flags in flags):
        raise ValueError(
            "attention_mask and key_padding_mask must be of one kind on every rank, got others elsewhere in the mesh"
        )
    for bit, (name, expected) in _SHARED.items():
        ranks = [rank for rank, rank_flags in enumerate(flags) if rank_flags & bit]
        if 0 < len(ranks) < len(flags):
            raise ValueError(f"{name} must {expected}, got ranks {ranks} of {len(flags)} that differ from the others")
    union = 0
    for rank_flags in flags:
        union |= rank_flags
    if union & HAS_ROWS and union & ONE_FOR_ALL:
        raise ValueError(
            "attention_mask must have this rank's rows on every rank, or one row for all queries on every rank, "
            "got one row on some and more on others"
        )
    return union


def describe_masks(flags: int) -> str:
    """What masks there are and which axes they have, in words: alike on every rank."""
    words = {PADDING: "padding", MASK: "mask", BIAS: "floating", BY_HEAD: "by head", BY_ELEMENT: "by batch element"}
    return ", ".join(word for bit, word in words.items() if flags & bit)


def mask_has_rows(flags: int) -> bool:
    """Whether a mask with these flags, of all ranks, has rows of its own for each query.

    It is one for all only where that is so for the whole sequence: where no rank is certain, each has one query, and what it holds is
    that query's.
    """
    return bool(flags & MASK) and not flags & ONE_FOR_ALL
