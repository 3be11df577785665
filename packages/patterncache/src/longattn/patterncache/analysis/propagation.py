"""Walks through a pattern: which tokens reach which, layer by layer. Exact, from plans.

A layer hands a token what the keys it sees hold, in any head, beside what it holds itself (the residual connection). Tiles are
sets of tokens, so a layer is one OR over each tile's keys; no dense matrix of tokens stands anywhere but in bits, columns at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from longattn.patterncache.analysis.components import listed_pairs
from longattn.patterncache.pattern import Pattern
from longattn.patterncache.plan import Branch, Plan
from longattn.patterncache.spans import Rectangle, Rows, Span

Bits = npt.NDArray[np.uint64]

MOST_TOKENS = 1 << 28
"""Tokens of a stretch that an analysis takes: a few numbers for each are gigabytes."""

_BLOCK_BYTES = 1 << 23
"""Bytes of the bit columns that stand at once."""


@dataclass(frozen=True)
class Stretch:
    """A part of the sequence that nothing enters or leaves, and that comes `times` times: its plan from position 0."""

    plan: Plan
    times: int

    @property
    def length(self) -> int:
        """Tokens of one."""
        return self.plan.rectangle.shape[1]


def stretches(pattern: Pattern, length: int, num_heads: int) -> list[Stretch]:
    """`length` tokens as the stretches that the pattern is made of, each planned."""
    pattern.check_rectangle(square(length, num_heads))
    longest = max((size for _, size, _ in pattern.stretches(length)), default=0)
    if longest > MOST_TOKENS:
        raise ValueError(
            f"N must be at most {MOST_TOKENS}, or be cut by the pattern's segments into stretches of at most so many tokens, got {longest}"
        )
    return [Stretch(part.plan(square(size, num_heads)), times) for part, size, times in pattern.stretches(length)]


def square(length: int, num_heads: int) -> Rectangle:
    """All heads, the first `length` positions as queries and keys."""
    return Rectangle(num_heads, Span(0, length), Span(0, length))


@dataclass(frozen=True)
class Nodes:
    """Representative tokens. Of tokens that share all their tiles two are kept: a token knows itself, so one does not speak for another.

    Attributes:
        token: (nodes,) the tokens kept.
        number: (tokens,) their place in `token`, -1 for the others.
        weight: (nodes,) how many tokens a node is when it is reached.
        repeat: (nodes,) how many tokens reach as many as this node does; 0 for the second of a pair.
    """

    token: Rows
    number: Rows
    weight: Rows
    repeat: Rows


def nodes_of(plan: Plan, causal: bool) -> Nodes:
    """All tokens where order matters, a band cuts a tile, or a key stands in two tiles of a branch; else two of each kind."""
    length = plan.rectangle.shape[1]
    every = np.arange(length, dtype=np.int64)
    if causal or any(branch.band is not None or not branch.k.distinct for branch in plan.branches):
        return Nodes(every, every, np.ones_like(every), np.ones_like(every))
    kind, kinds = np.zeros(length, np.int64), 1
    for branch in plan.branches:
        # Queries and keys of the same tiles tell tokens apart once.
        for index in (branch.q,) if branch.q == branch.k else (branch.q, branch.k):
            rows, tile = index.rows(), np.zeros(length, np.int64)
            tile[rows] = np.arange(1, index.tiles + 1)[:, None]
            kind, kinds = _renumbered(kind * (index.tiles + 1) + tile, kinds * (index.tiles + 1))
    size = np.bincount(kind, minlength=kinds if length else 0)
    # Assigned backwards, so that the first of each kind is what stays; then the first of what is left.
    first, second = np.empty(len(size), np.int64), np.empty(len(size), np.int64)
    first[kind[::-1]] = every[::-1]
    left = np.delete(every, first)
    second[kind[left][::-1]] = left[::-1]
    token = np.concatenate([first, second[size > 1]])
    number = np.full(length, -1, np.int64)
    number[token] = np.arange(len(token))
    weight = np.concatenate([np.ones_like(first), size[size > 1] - 1])
    return Nodes(token, number, weight, np.concatenate([size, np.zeros(len(token) - len(first), np.int64)]))


def _renumbered(kind: Rows, below: int) -> tuple[Rows, int]:
    """The same kinds numbered without gaps, and how many there are; sorted only where counting would take more room than that."""
    if below > 8 * len(kind):
        kinds, number = np.unique(kind, return_inverse=True)
        return number.reshape(-1), len(kinds)
    there = np.bincount(kind, minlength=below) > 0
    number = np.cumsum(there) - 1
    return number[kind], int(there.sum())


class Walk:
    """The bits of one stretch, layer by layer: bit j of row i is whether token i has been told of token j."""

    def __init__(self, plan: Plan, causal: bool) -> None:
        self.nodes = nodes_of(plan, causal)
        self._causal = causal
        self._plan = plan

    @cached_property
    def _hops(self) -> list[_Hop]:
        # Made on first use: a walk that is too long to follow needs its nodes only.
        return [_Hop(branch, self.nodes) for branch in self._plan.branches]

    def columns(self) -> Iterator[Span]:
        """Blocks of columns, 64 nodes to a word, few enough to stand at once."""
        words = -(-len(self.nodes.token) // 64)
        at_once = max(1, _BLOCK_BYTES // (8 * max(1, len(self.nodes.token))))
        for first in range(0, words, at_once):
            yield Span(first, min(at_once, words - first))

    def start(self, block: Span) -> Bits:
        """No layer: every token knows itself. (nodes, words) uint64."""
        bits = np.zeros((len(self.nodes.token), block.length), np.uint64)
        own = np.arange(block.start * 64, min(len(bits), (block.last + 1) * 64))
        bits[own, own // 64 - block.start] = np.uint64(1) << (own % 64).astype(np.uint64)
        return bits

    def layer(self, bits: Bits) -> Bits:
        """One layer more."""
        after = bits.copy()
        for hop in self._hops:
            hop.add(bits, after)
        return after

    def goal(self, block: Span) -> Bits:
        """All tokens, or all up to one's own: what a row can hope for. (nodes, words) uint64."""
        many = len(self.nodes.token)
        upto = np.arange(1, many + 1)[:, None] if self._causal else np.full((many, 1), many)
        full = np.clip(upto - np.arange(block.start, block.last + 1)[None] * 64, 0, 64).astype(np.uint64)
        # A shift by all 64 bits is undefined, so a word of ones is made separately.
        return np.where(full == 64, ~np.uint64(0), (np.uint64(1) << (full % np.uint64(64))) - np.uint64(1))

    def reached(self, bits: Bits, block: Span) -> Rows:
        """(nodes,) how many tokens of this block of columns each row holds."""
        flags = np.unpackbits(bits.astype("<u8").view(np.uint8), axis=1, bitorder="little")
        weight = self.nodes.weight[block.start * 64 : (block.last + 1) * 64]
        if (weight == 1).all():
            return flags.sum(axis=1, dtype=np.int64)
        # Integers below 2 ** 53 are exact in float64, whose product is many times faster.
        return np.rint(flags[:, : len(weight)].astype(np.float64) @ weight).astype(np.int64)


class _Hop:
    """What one branch hands on in a layer."""

    def __init__(self, branch: Branch, nodes: Nodes) -> None:
        self._branch = branch
        if branch.band is None:
            self._q, self._k = (nodes.number[index.rows()] for index in (branch.q, branch.k))
        else:
            self._q, self._k = branch.q.rows(), branch.k.rows()
        self._range = branch.key_range() if branch.band is not None and branch.uniform else None
        self._pairs = None if branch.band is None or branch.uniform else listed_pairs(branch)

    def add(self, bits: Bits, after: Bits) -> None:
        """OR into `after` what the keys held in `bits`."""
        if self._pairs is not None:
            np.bitwise_or.at(after, self._pairs[0], bits[self._pairs[1]])
            return
        for q, k in zip(self._q, self._k, strict=True):
            if self._range is None:
                q, k = q[q >= 0], k[k >= 0]
                after[q] |= np.bitwise_or.reduce(bits[k], axis=0)
            else:
                begin, end = self._range
                seeing = begin <= end
                after[q[seeing]] |= _ranges(bits[k], begin[seeing], end[seeing])


def _ranges(rows: Bits, begin: Rows, end: Rows) -> Bits:
    """OR of rows[begin] to rows[end], for every range."""
    if not begin.any():
        return np.bitwise_or.accumulate(rows, axis=0)[end]
    joined = np.empty((len(begin), rows.shape[1]), np.uint64)
    size = np.ones_like(begin)
    size <<= np.frexp(end - begin + 1)[1] - 1
    width = 1
    while len(rows):
        # rows[a] is now the OR of `width` rows from a; two of them cover a range less than twice as long.
        some = size == width
        joined[some] = rows[begin[some]] | rows[end[some] - width + 1]
        rows = rows[:-width] | rows[width:]
        width *= 2
    return joined
