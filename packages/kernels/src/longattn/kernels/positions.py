"""Where the rows of q and k stand in the whole sequence and among all heads, as the op's flat integers."""

from __future__ import annotations

from typing import Any

from longattn.patterncache import Span


def flat_spans(name: str, spans: object, length: int) -> list[int]:
    """A Span or tuple of Spans of `length` positions together, as (start, length, step) triples for the op."""
    listed: Any = (spans,) if isinstance(spans, Span) else spans
    if not isinstance(listed, (tuple, list)) or not all(isinstance(s, Span) for s in listed):
        raise TypeError(f"{name} must be None, a Span or a tuple of Spans, got {spans!r}")
    total = sum(s.length for s in listed)
    if total != length:
        raise ValueError(f"{name} must cover {length} positions, as many as the tensor has rows, got {total}")
    return [n for s in listed for n in (s.start, s.length, s.step)]


def last_positions(nq: int, nk: int) -> list[int]:
    """Queries are the last Nq positions of the keys; where positions do not matter and they outnumber keys, any will do."""
    return [nk - nq if nq <= nk else 0, nq, 1]


def flat_heads(local: int, heads: Span | None, num_heads: int | None) -> list[int]:
    """(total, first, count) of the `local` heads that q has."""
    if heads is None:
        first = 0
    elif not isinstance(heads, Span) or heads.length != local or heads.step != 1:
        raise ValueError(f"heads must be None or a Span of {local} neighbouring heads, as many as q has, got {heads!r}")
    else:
        first = heads.start
    total = local if num_heads is None else num_heads
    if isinstance(total, bool) or not isinstance(total, int) or total < first + local:
        raise ValueError(
            f"num_heads must be an integer >= {first + local}, the heads up to the last of q, got {num_heads!r}"
        )
    return [total, first, local]
