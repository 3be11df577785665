"""`lint`: what a pattern does to a sequence, in figures that are exact: islands, gaps, starvation, depth, keys, work."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike

import numpy as np
import numpy.typing as npt

from longattn.patterncache.analysis.keys import keys_per_query
from longattn.patterncache.analysis.plot import draw
from longattn.patterncache.analysis.propagation import nodes_of, square, stretches
from longattn.patterncache.analysis.reach import count_islands, layers_needed
from longattn.patterncache.analysis.results import Lint
from longattn.patterncache.analysis.shares import shares
from longattn.patterncache.pattern import Pattern
from longattn.patterncache.spans import Span, check_flag, check_int, shortened

_MOST_NODES = 1 << 14
"""Tokens of a stretch that `lint` follows one by one; `reach` is more patient."""

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def lint(
    pattern: Pattern,
    length: int,
    num_heads: int = 8,
    *,
    head_dim: int = 64,
    dtype: str = "float32",
    depth: int | None = None,
    follow: bool = True,
) -> Lint:
    """Judge `pattern` over `length` tokens. Exact; patterns of closed segments, `Dilated` above all, cost one period only.

    Args:
        pattern: who sees whom.
        length: tokens, at least 0.
        num_heads: query heads, at least 1. Default 8.
        head_dim: elements of a head, at least 1, for FLOPs and bytes. Default 64.
        dtype: of q, k, v and out: "float64", "float32" (default), "bfloat16" or "float16".
        depth: layers of a model, at least 1, for `shares`: which part of the earlier tokens is seen directly, in two hops, within that
            depth, never. Tokens are followed for it layer by layer, up to 131072 of a stretch. Default None: not asked.
        follow: find `layers` by following tokens layer by layer where nothing else says it. Default True; without, it is not known then.

    Raises:
        TypeError, ValueError: an argument is not such a value, by name.
    """
    length = check_int("N", length, minimum=0)
    num_heads, head_dim = check_int("num_heads", num_heads, minimum=1), check_int("head_dim", head_dim, minimum=1)
    depth = None if depth is None else check_int("depth", depth, minimum=1)
    check_flag("follow", follow)
    if not isinstance(dtype, str) or dtype not in _BYTES:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"dtype must be one of {tuple(_BYTES)}, got {shortened(dtype)}")
    parts = stretches(pattern, length, num_heads)
    apart = sum(part.times * count_islands(part) for part in parts)
    layers = None if apart > 1 else pattern.direct_depth(length)
    known = (
        apart > 1
        or layers is not None
        or (follow and all(len(nodes_of(part.plan, pattern.causal).token) <= _MOST_NODES for part in parts))
    )
    if known and layers is None:
        layers = layers_needed(pattern, parts)
    starved, blind, at = _Tally(), _Tally(), 0
    fewest: list[int] = []
    most: list[int] = []
    pairs = 0
    for part in parts:
        heads, keys = keys_per_query(part.plan)
        # True positions, not those from the stretch's start: a document asks where it begins.
        own = at + np.arange(part.length, dtype=np.int64)[None]
        # Which heads are alike, and one of each kind.
        _, first, times = np.unique(heads, return_index=True, return_counts=True)
        itself = pattern.count(first[:, None], own, own, num_heads)
        blind.add(keys.sum(axis=0) == 0, at, part.times)
        starved.add((keys > itself).sum(axis=0) == 0, at, part.times)
        fewest += [int(keys.min())] if keys.size else []
        most += [int(keys.max())] if keys.size else []
        pairs += part.times * int(keys.sum(axis=1) @ times)
        at += part.times * part.length
    rows = length * num_heads
    return Lint(
        pattern=type(pattern).__name__,
        length=length,
        num_heads=num_heads,
        islands=apart,
        layers=layers,
        layers_known=known,
        gaps=tuple(pattern.gaps(square(length, num_heads))),
        blind=blind.count,
        starved=starved.count - (0 in starved.first),
        first_starved=tuple(position for position in starved.first if position)[:8],
        fewest_keys=min(fewest, default=0),
        mean_keys=pairs / max(1, rows),
        most_keys=max(most, default=0),
        pairs=pairs,
        flops_forward=4 * head_dim * pairs,
        flops_backward=10 * head_dim * pairs,
        bytes_moved=rows * (4 * head_dim * _BYTES[dtype] + 4),
        plan_bytes=sum(part.plan.nbytes for part in parts),
        shares=None if depth is None else shares(pattern, parts, length, depth),
    )


def describe(
    pattern: Pattern, length: int = 32, num_heads: int = 8, head: int = 0, png: str | PathLike[str] | None = None
) -> str:
    """The lint text, below a map of up to 64 tokens (rows see columns; "." is none, "+" more than nine times).

    Args:
        pattern: who sees whom.
        length: tokens: up to 64, or any number from 1 with a picture, and then without a map in the text above 64.
        num_heads, head: how many heads, and whose map.
        png: where to draw a picture. Needs matplotlib, the extra `png`. Default None: nowhere.

    Raises:
        TypeError, ValueError: as `lint`; or length is above that, or head not below num_heads.
    """
    verdict = lint(pattern, length, num_heads)
    head = check_int("head", head, minimum=0)
    if (length > 64 and png is None) or head >= num_heads:
        raise ValueError(
            f"N must be at most 64 without a picture, and head below num_heads={num_heads}, got N={length} and head={head}"
        )
    if png is not None:
        if not isinstance(png, (str, PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"png must be None or the path of a picture, got {shortened(png)} ({type(png).__name__})")
        draw(pattern, verdict, head, png)
    if length > 64:
        return str(verdict)
    counts = pattern.counts(replace(square(length, num_heads), heads=Span(head, 1)))[0]
    rows = ["".join("." if not n else str(n) if n < 10 else "+" for n in row) for row in counts.tolist()]
    return "\n".join([*rows, str(verdict)])


class _Tally:
    """Positions of a kind: how many, and the first nine, over repeated stretches."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[int] = []

    def add(self, flags: npt.NDArray[np.bool_], start: int, times: int) -> None:
        positions = np.flatnonzero(flags)
        self.count += times * len(positions)
        for turn in range(min(times, 9) if len(positions) else 0):
            self.first += (positions[:9] + start + turn * len(flags)).tolist()
        self.first = sorted(self.first)[:9]
