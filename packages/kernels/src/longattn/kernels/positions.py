"""Where the rows of q and k stand in the whole sequence and among all heads, as the op's flat integers."""

# Arguments come as anything, and are checked here.
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from typing import Any

from longattn.patterncache import Span
from longattn.patterncache.spans import shortened


def flat_spans(name: str, spans: object, length: int) -> list[int]:
    """A Span or tuple of Spans of `length` positions together, as (start, length, step) triples for the op."""
    listed: Any = (spans,) if isinstance(spans, Span) else spans
    if not isinstance(listed, (tuple, list)) or not all(isinstance(s, Span) for s in listed):
        raise TypeError(f"{name} must be None, a Span or a tuple of Spans, got {shortened(spans)}")
    total = sum(s.length for s in listed)
    if total != length:
        raise ValueError(f"{name} must cover {length} positions, as many as the tensor has rows, got {total}")
    return [n for s in listed for n in (s.start, s.length, s.step)]


def last_positions(nq: int, nk: int, positional: bool) -> list[int]:
    """Queries are the last Nq positions of the keys; where positions do not matter and they outnumber keys, any will do.

    Raises:
        ValueError: queries outnumber keys and positions matter.
    """
    if nq > nk and positional:
        raise ValueError(
            f"q_start (or q_spans) must be given where queries outnumber keys and positions matter, got Nq={nq}, Nk={nk}"
        )
    return [nk - nq if nq <= nk else 0, nq, 1]


def flat_heads(local: int, heads: Span | None, num_heads: int | None) -> list[int]:
    """(total, first, count) of the `local` heads that q has.

    Raises:
        TypeError, ValueError: heads is not a Span of as many neighbouring heads, or num_heads no integer that reaches the last of them.
    """
    expected = f"None or a Span of {local} neighbouring heads, as many as q has"
    if heads is not None and not isinstance(heads, Span):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"heads must be {expected}, got {shortened(heads)} ({type(heads).__name__})")
    if heads is not None and (heads.length != local or heads.step != 1):
        raise ValueError(f"heads must be {expected}, got {shortened(heads)}")
    first = 0 if heads is None else heads.start
    total = local if num_heads is None else num_heads
    expected = f"an integer >= {first + local}, the heads up to the last of q"
    if isinstance(total, bool) or not isinstance(total, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"num_heads must be {expected}, got {shortened(num_heads)} ({type(num_heads).__name__})")
    if not first + local <= total < 1 << 63:
        raise ValueError(f"num_heads must be {expected}, got {shortened(total)}")
    return [total, first, local]
