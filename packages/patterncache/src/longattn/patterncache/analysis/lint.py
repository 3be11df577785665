"""`Lint`: what a pattern does to a sequence, in figures that are exact: islands, gaps, starvation, depth, keys, work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from os import PathLike

import numpy as np
import numpy.typing as npt

from longattn.patterncache.analysis.propagation import nodes_of, square, stretches
from longattn.patterncache.analysis.reach import count_islands, direct_depth, layers_needed
from longattn.patterncache.indices import Affine
from longattn.patterncache.interop.csr import head_classes
from longattn.patterncache.pattern import Pattern
from longattn.patterncache.patterns.by_head import ByHead
from longattn.patterncache.patterns.combined import Intersection, Restrict, Sum, Union
from longattn.patterncache.patterns.dilated import Dilated
from longattn.patterncache.plan import Branch, Plan
from longattn.patterncache.spans import Rectangle, Rows, Span, check_int

_MOST_NODES = 1 << 14
"""Tokens of a stretch that `lint` follows one by one; `reach` is more patient."""

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Gap:
    """Residues of one dilated branch that no head serves: tokens there are not seen through it.

    Attributes:
        segment, rate: of the branch.
        residues: of the position in its segment modulo the rate, below the segment's length.
    """

    segment: int
    rate: int
    residues: tuple[int, ...]


@dataclass(frozen=True)
class Lint:
    """What a pattern does to `length` tokens in `num_heads` heads.

    Attributes:
        pattern: its class name.
        length, num_heads: what was asked about.
        islands: groups of tokens that no depth joins; 1 is healthy.
        layers: layers until every token has heard of all that it may (of all before it where causal); None: it never has.
        layers_known: False where the walk was too long to follow here and `layers` says nothing; `reach` goes further.
        gaps: residues of dilated branches that no head covers.
        blind: tokens that see nothing in any head.
        starved: tokens after the first that see no token but themselves, in any head.
        first_starved: the first few of them.
        fewest_keys, mean_keys, most_keys: keys per query and head; a key that counts twice is two.
        pairs: (head, query, key) triples, with multiplicity.
        flops_forward, flops_backward: 4 and 10 per pair and head dimension: two and five matrix products.
        bytes_moved: q, k, v and out once, and lse in float32: the least that a forward moves.
        plan_bytes: index data of the plan of the stretches that differ; 0 where everything is strided.
    """

    pattern: str
    length: int
    num_heads: int
    islands: int
    layers: int | None
    layers_known: bool
    gaps: tuple[Gap, ...]
    blind: int
    starved: int
    first_starved: tuple[int, ...]
    fewest_keys: int
    mean_keys: float
    most_keys: int
    pairs: int
    flops_forward: int
    flops_backward: int
    bytes_moved: int
    plan_bytes: int

    @property
    def line(self) -> str:
        """The verdict in one line."""
        depth = "depth not followed" if not self.layers_known else f"all joined after {self.layers} layers"
        if self.layers_known and self.layers is None:
            depth = "no depth joins all tokens"
        found = [f"{self.islands} island{'s' * (self.islands != 1)}", depth]
        found += [f"{len(self.gaps)} branch(es) with uncovered residues"] * bool(self.gaps)
        found += [f"{self.starved} tokens see only themselves"] * bool(self.starved)
        found += [f"{self.blind} tokens see nothing"] * bool(self.blind)
        found += [f"{self.fewest_keys} to {self.most_keys} keys per query, mean {self.mean_keys:.1f}"]
        return f"lint: {self.pattern}, {self.length} tokens, {self.num_heads} heads: " + "; ".join(found)

    def __str__(self) -> str:
        lines = [self.line]
        lines += [
            f"  segment {gap.segment}, rate {gap.rate}: no head covers residues {_few(gap.residues)}"
            for gap in self.gaps
        ]
        lines += [f"  only themselves: positions {_few(self.first_starved, self.starved)}"] * bool(self.starved)
        lines.append(
            f"  {self.pairs} pairs: {self.flops_forward:.3e} FLOPs forward, {self.flops_backward:.3e} backward"
        )
        lines.append(f"  {self.bytes_moved} bytes moved at least, {self.plan_bytes} bytes of index data")
        return "\n".join(lines)


def _few(values: tuple[int, ...], of: int | None = None) -> str:
    many = len(values) if of is None else of
    return ", ".join(str(value) for value in values[:8]) + (f", ... ({many})" if many > 8 else "")


def lint(pattern: Pattern, length: int, num_heads: int = 8, *, head_dim: int = 64, dtype: str = "float32") -> Lint:
    """Judge `pattern` over `length` tokens. Exact; patterns of closed segments, `Dilated` above all, cost one period only.

    Args:
        pattern: who sees whom.
        length: tokens, at least 0.
        num_heads: query heads, at least 1. Default 8.
        head_dim: elements of a head, at least 1, for FLOPs and bytes. Default 64.
        dtype: of q, k, v and out: "float64", "float32" (default), "bfloat16" or "float16".

    Raises:
        TypeError, ValueError: an argument is not such a value, by name.
    """
    length = check_int("N", length, minimum=0)
    num_heads, head_dim = check_int("num_heads", num_heads, minimum=1), check_int("head_dim", head_dim, minimum=1)
    if dtype not in _BYTES:
        raise ValueError(f"dtype must be one of {tuple(_BYTES)}, got {dtype!r}")
    parts = stretches(pattern, length, num_heads)
    apart = sum(part.times * count_islands(part) for part in parts)
    depth = None if apart > 1 else direct_depth(pattern, length)
    known = (
        apart > 1
        or depth is not None
        or all(len(nodes_of(part.plan, pattern.causal).token) <= _MOST_NODES for part in parts)
    )
    if known and depth is None:
        depth = layers_needed(pattern, parts)
    starved, blind, at = _Tally(), _Tally(), 0
    fewest, most, pairs = [], [], 0
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
        layers=depth,
        layers_known=known,
        gaps=tuple(_gaps(pattern, square(0, num_heads))),
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
    )


def describe(
    pattern: Pattern, length: int = 32, num_heads: int = 8, head: int = 0, png: str | PathLike[str] | None = None
) -> str:
    """The lint text, below a map of up to 64 tokens (rows see columns; "." is none, "+" more than nine times).

    Args:
        pattern: who sees whom.
        length: tokens: up to 64, or 1 to 2048 with a picture, and then without a map in the text above 64.
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
        import_module("longattn.patterncache.analysis.plot").draw(pattern, verdict, head, png)
    if length > 64:
        return str(verdict)
    seen = pattern.counts(replace(square(length, num_heads), heads=Span(head, 1)))[0]
    rows = ["".join("." if not n else str(n) if n < 10 else "+" for n in row) for row in seen.tolist()]
    return "\n".join([*rows, str(verdict)])


def keys_per_query(plan: Plan) -> tuple[Rows, Rows]:
    """((heads,) class of each head, (classes, queries) int64 keys that each query sees), with multiplicity, without dense counts."""
    classes, members = head_classes(plan)
    total = np.zeros((len(members), plan.rectangle.shape[1]), np.int64)
    for b, branch in enumerate(plan.branches):
        seen = _keys_of_tiles(branch)
        for c, some in enumerate(members):
            # No query row stands twice in a branch, so nothing is added to itself.
            if b in some and isinstance(branch.q, Affine) and branch.q.tiles == 1:
                end = branch.q.start + branch.q.count * branch.q.step
                total[c, branch.q.start : end : branch.q.step] += np.broadcast_to(seen, (1, branch.q.count))[0]
            elif b in some:
                total[c, branch.q.rows()] += seen
    return classes, total


def _keys_of_tiles(branch: Branch) -> Rows:
    """(tiles or 1, q count or 1): how many keys each query row of each tile sees."""
    if branch.band is None:
        return np.array([[branch.k.count]])
    if branch.uniform:
        begin, end = branch.key_range()
        return np.maximum(end - begin + 1, 0)[None]
    assert branch.visible is not None
    return branch.visible.sum(axis=2)


class _Tally:
    """Positions of a kind: how many, and the first nine, over repeated stretches."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[int] = []

    def add(self, flags: npt.NDArray[np.bool_], start: int, times: int) -> None:
        found = np.flatnonzero(flags)
        self.count += times * len(found)
        for turn in range(min(times, 9) if len(found) else 0):
            self.first += (found[:9] + start + turn * len(flags)).tolist()
        self.first = sorted(self.first)[:9]


def _gaps(pattern: Pattern, rectangle: Rectangle) -> Iterator[Gap]:
    """Uncovered residues of every dilated branch in a pattern, its parts included, among the heads of a rectangle."""
    parts: tuple[Pattern, ...] = ()
    if isinstance(pattern, Restrict):
        parts = (pattern.a, pattern.b)
    elif isinstance(pattern, (Union, Intersection, Sum)):
        parts = tuple(pattern.parts)
    elif isinstance(pattern, ByHead):
        for heads, part in pattern.parts:
            yield from _gaps(part, replace(rectangle, heads=heads))
    for part in parts:
        yield from _gaps(part, rectangle)
    if isinstance(pattern, Dilated):
        for b, (segment, rate) in enumerate(zip(pattern.segment_lengths, pattern.dilation_rates, strict=True)):
            covered = {offset for heads, offset in pattern.head_classes(b, rectangle) if heads.length}
            missing = tuple(residue for residue in range(min(rate, segment)) if residue not in covered)
            if missing:
                yield Gap(segment, rate, missing)
