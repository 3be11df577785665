"""For tests of patterns and caches, ours and yours: Hypothesis strategies, `check_pattern`, the conformance test, and traces of keys."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from hypothesis import strategies as st

from longattn.patterncache.interop.csr import IndexArrays
from longattn.patterncache.pattern import Pattern
from longattn.patterncache.patterns.block_layout import LAYOUTS, BlockLayout
from longattn.patterncache.patterns.block_sparse import BlockSparse
from longattn.patterncache.patterns.combined import Intersection, Sum, Union
from longattn.patterncache.patterns.dilated import HEADS, QUERIES, Dilated
from longattn.patterncache.patterns.documents import Documents
from longattn.patterncache.patterns.hierarchical import HierarchicalBlocks
from longattn.patterncache.patterns.periodic import Periodic
from longattn.patterncache.patterns.registry import parse_pattern
from longattn.patterncache.patterns.restrict import Restrict
from longattn.patterncache.patterns.strided import HEADS as STRIDED_HEADS
from longattn.patterncache.patterns.strided import Strided
from longattn.patterncache.patterns.window import Full, Window
from longattn.patterncache.plan import Counts, Plan, add_branch_counts
from longattn.patterncache.planning.bands import pieces, strips
from longattn.patterncache.spans import Rectangle, Span

COVERED = 256
"""Positions that drawn block masks cover: no drawn span reaches further."""


def spans(longest: int = 40) -> st.SearchStrategy[Span]:
    """Any span, strided and empty ones included."""
    return st.builds(Span, st.integers(0, 50), st.integers(0, longest), st.integers(1, 5))


@st.composite
def rectangles(draw: st.DrawFn, most_heads: int = 6) -> Rectangle:
    """Any rectangle: one or two spans a side (two is a zigzag shard), some or all heads."""
    num_heads = draw(st.integers(1, most_heads))
    begin = draw(st.integers(0, num_heads - 1))
    heads = draw(st.sampled_from([None, Span(begin, draw(st.integers(0, num_heads - begin)))]))
    sides = [tuple(draw(st.lists(spans(), min_size=1, max_size=2))) for _ in range(2)]
    return Rectangle(num_heads, sides[0], sides[1], heads)


@st.composite
def dilated(draw: st.DrawFn, most_branches: int = 3, heads: str | None = None) -> Dilated:
    """Any dilated pattern, with r > s and r that does not divide s."""
    branches = draw(st.integers(1, most_branches))
    segments = draw(st.lists(st.integers(1, 30), min_size=branches, max_size=branches))
    rates = draw(st.lists(st.integers(1, 7), min_size=branches, max_size=branches))
    assignment = heads or draw(st.sampled_from(HEADS))
    shift = draw(st.just(0) | st.integers(0, 40))
    return Dilated(
        tuple(segments), tuple(rates), assignment, draw(st.sampled_from(QUERIES)), draw(st.booleans()), shift
    )


@st.composite
def block_sparse(draw: st.DrawFn, num_heads: int | None = None) -> BlockSparse:
    """Any block mask over at least `COVERED` positions a side, a small drawn one repeated; one per head where `num_heads` is given."""
    size = draw(st.integers(1, 40))
    shape = (*([] if num_heads is None else [num_heads]), draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    cells = int(np.prod(shape))
    small = np.array(draw(st.lists(st.booleans(), min_size=cells, max_size=cells))).reshape(shape)
    blocks = -(-COVERED // size)
    mask = np.tile(small, [1] * (small.ndim - 2) + [-(-blocks // n) for n in shape[-2:]])
    return BlockSparse(size, mask, draw(st.booleans()))


def block_layout() -> st.SearchStrategy[BlockLayout]:
    """Any rule for block masks, of small blocks."""
    ratio = st.sampled_from([0.05, 0.3, 1.0])
    few = st.integers(0, 40)
    return st.builds(BlockLayout, st.sampled_from(LAYOUTS), st.integers(1, 20), ratio, few, few, few, st.booleans())


def strided() -> st.SearchStrategy[Strided]:
    """Any strided + local pattern."""
    local = st.one_of(st.none(), st.integers(1, 20))
    return st.builds(Strided, st.integers(1, 12), local, st.sampled_from(STRIDED_HEADS), st.booleans())


def hierarchical_blocks() -> st.SearchStrategy[HierarchicalBlocks]:
    """Any tree of small blocks."""
    return st.builds(HierarchicalBlocks, st.integers(1, 9), st.integers(1, 4), st.integers(2, 4), st.booleans())


@st.composite
def periodic(draw: st.DrawFn) -> Periodic:
    """Any periodic pattern up to at least `COVERED` positions; runs may overlap, and are then counted twice."""
    period = draw(st.integers(1, 5))
    bound = st.none() | st.integers(-20, 40)
    run = st.tuples(st.integers(0, period - 1), st.integers(0, period - 1), bound, bound)
    return Periodic(period, draw(st.lists(run, max_size=4)), COVERED + draw(st.integers(0, 9)), draw(st.booleans()))


@st.composite
def documents(draw: st.DrawFn, inner: st.SearchStrategy[Pattern]) -> Documents:
    """Documents up to at least `COVERED` positions, empty ones included, with a pattern in each."""
    lengths = draw(st.lists(st.integers(0, 60), min_size=1, max_size=8))
    return Documents([0, *np.cumsum([*lengths, COVERED]).tolist()], draw(inner))


def patterns(depth: int = 1) -> st.SearchStrategy[Pattern]:
    """Any pattern of this package. "split" needs a head per branch, so those have one branch only."""
    single = st.one_of(
        st.builds(Full, st.booleans()),
        st.builds(Window, st.integers(1, 20), st.integers(0, 6), st.booleans()),
        dilated(heads="shared"),
        dilated(heads="blocks"),
        dilated(most_branches=1, heads="split"),
        block_sparse(),
        block_layout(),
        strided(),
        hierarchical_blocks(),
        periodic(),
    )
    if depth == 0:
        return single
    pair = st.tuples(patterns(depth - 1), patterns(depth - 1))
    combined = st.one_of(*[st.builds(how, pair) for how in (Union, Intersection, Sum)])
    return st.one_of(single, documents(patterns(depth - 1)), pair.map(lambda parts: Restrict(*parts)), combined)


def dense_counts(arrays: IndexArrays, shape: tuple[int, int, int]) -> Counts:
    """The (heads, queries, keys) counts that index arrays of such a rectangle hold, read entry by entry."""
    heads, queries, keys = shape
    total = np.zeros((heads, keys, queries) if arrays.transposed else shape, np.int64)
    for head, c in enumerate(arrays.head_class):
        for row, (begin, end) in enumerate(zip(arrays.indptr[c, :-1], arrays.indptr[c, 1:], strict=True)):
            total[head, row, arrays.indices[begin:end]] += arrays.counts[begin:end]
    return total.swapaxes(1, 2) if arrays.transposed else total


def check_plan(plan: Plan, pattern: Pattern) -> None:
    """Assert that the plan, and the pieces it is cut into, count what the pattern counts, and that branches keep their promises."""
    expected = pattern.counts(plan.rectangle)
    np.testing.assert_array_equal(plan.counts(), expected)
    for strip in (4, 256):
        total = np.zeros(plan.rectangle.shape, np.int64)
        for piece in pieces(plan, strip):
            add_branch_counts(total, piece)
        np.testing.assert_array_equal(total, expected)
        total = np.zeros(plan.rectangle.shape, np.int64)
        for part in (part for branch in plan.branches for part in strips(branch, strip)):
            add_branch_counts(total, part)
        np.testing.assert_array_equal(total, expected)
    for branch in plan.branches:
        assert branch.q.tiles == branch.k.tiles
        assert branch.q.distinct, "a query row stands in two tiles of one branch"
        at = (plan.rectangle.query_positions()[branch.q.rows()], plan.rectangle.key_positions()[branch.k.rows()])
        for said, true in zip(branch.positions(), at, strict=True):
            np.testing.assert_array_equal(said, true, "a branch says other positions than its rows have")
    assert plan.empty == (not expected.any())


def check_pattern(pattern: Pattern, rectangle: Rectangle) -> None:
    """Assert everything a pattern promises, on one rectangle.

    Its plan counts what it counts; its canonical string reads back equal; counts are not negative, and a binary pattern's not above 1;
    causal hides the future, and `with_causal` of what it is changes nothing; the counts of a rectangle split in two add up, and so do those
    of its addends, where it has any.
    """
    counts = pattern.counts(rectangle)
    assert counts.shape == rectangle.shape and counts.dtype == np.int64 and (counts >= 0).all()
    check_plan(pattern.plan(rectangle), pattern)
    read_back = parse_pattern(pattern.canonical())
    assert read_back == pattern and hash(read_back) == hash(pattern) and read_back.canonical() == pattern.canonical()
    assert not pattern.binary or not (counts > 1).any()
    np.testing.assert_array_equal(pattern.with_causal(pattern.causal).counts(rectangle), counts)
    if pattern.addends:
        np.testing.assert_array_equal(sum(part.counts(rectangle) for part in pattern.addends), counts)
    future = rectangle.key_positions()[None, :] > rectangle.query_positions()[:, None]
    assert not (pattern.with_causal(True).counts(rectangle) * future).any()
    for side in ("queries", "keys"):
        whole: tuple[Span, ...] = getattr(rectangle, side)
        first = whole[0]
        half = first.length // 2
        parts = ((first.take(0, half),), (first.take(half, first.length - half), *whole[1:]))
        axis = 1 if side == "queries" else 2
        sides = [
            pattern.plan(
                Rectangle(
                    rectangle.num_heads,
                    part if side == "queries" else rectangle.queries,
                    part if side == "keys" else rectangle.keys,
                    rectangle.heads,
                )
            ).counts()
            for part in parts
        ]
        np.testing.assert_array_equal(np.concatenate(sides, axis), counts)


def zipf_and_scan(seed: int, keys: int = 2000, length: int = 40_000) -> list[int]:
    """Zipf 0.9 over `keys` keys; every fourth ask, by chance, is for a key that is asked for once."""
    rng = np.random.default_rng(seed)
    weight = np.arange(1, keys + 1) ** -0.9
    trace = rng.choice(keys, length, p=weight / weight.sum())
    scan = rng.random(length) < 0.25
    trace[scan] = keys + np.arange(scan.sum())
    return trace.tolist()


def attention_lengths(seed: int, length: int = 20_000) -> list[tuple[int, int]]:
    """Batches of log-normal length in steps of 16, each asked for by four layers of two patterns."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.normal(6.5, 0.8, length // 4)).astype(int) // 16 * 16
    return [(int(n), layer % 2) for n in lengths for layer in range(4)]


def decode_lengths(seed: int, sequences: int = 600) -> list[int]:
    """A prompt, then tens of steps, each one key longer."""
    rng = np.random.default_rng(seed)
    prompts = np.exp(rng.normal(4.5, 0.7, sequences)).astype(int)
    return [int(p + step) for p in prompts for step in range(rng.integers(10, 60))]


TRACES: dict[str, Callable[[int], Sequence[Hashable]]] = {
    "zipf and scan": zipf_and_scan,
    "attention lengths": attention_lengths,
    "decode lengths": decode_lengths,
}
"""Seeded sequences of keys that caches are asked for: each takes a seed."""


def belady(trace: Sequence[Hashable], size: int) -> float:
    """Hit rate of Belady's policy, which knows the trace and evicts the entry whose next use is farthest away."""
    later: list[int] = [0] * len(trace)
    last_use: dict[Hashable, int] = {}
    for i in reversed(range(len(trace))):
        later[i] = last_use.get(trace[i], len(trace))
        last_use[trace[i]] = i
    contents: dict[Hashable, int] = {}
    farthest: list[tuple[int, int, Hashable]] = []
    hits = 0
    for i, key in enumerate(trace):
        hits += key in contents
        if key not in contents and len(contents) >= size:
            while contents.get(farthest[0][2]) != -farthest[0][0]:
                heapq.heappop(farthest)
            del contents[heapq.heappop(farthest)[2]]
        contents[key] = later[i]
        heapq.heappush(farthest, (-later[i], i, key))
    return hits / len(trace)
