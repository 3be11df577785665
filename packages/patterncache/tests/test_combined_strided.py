"""Unions and intersections of strided patterns stay strided: exact counts, as many branches at every length, no listed rows."""

from math import lcm

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longattn.patterncache import (
    BlockSparse,
    Dilated,
    Full,
    HierarchicalBlocks,
    Intersection,
    Pattern,
    Rectangle,
    Restrict,
    Span,
    Union,
    Window,
)
from longattn.patterncache.testing import block_sparse, check_pattern, dilated, rectangles, strided


@st.composite
def nested(draw: st.DrawFn) -> Dilated:
    """Segments and rates that divide the next, in any order."""
    rates = [draw(st.integers(1, 3))]
    segments = [rates[0] * draw(st.integers(1, 4))]
    for _ in range(draw(st.integers(0, 2))):
        rates.append(rates[-1] * draw(st.integers(1, 3)))
        segments.append(lcm(segments[-1], rates[-1]) * draw(st.integers(1, 3)))
    order = draw(st.permutations(range(len(rates))))
    queries, causal = draw(st.sampled_from(["dilated", "all"])), draw(st.booleans())
    return Dilated([segments[b] for b in order], [rates[b] for b in order], "shared", queries, causal)


def bands() -> st.SearchStrategy[Pattern]:
    """Bands, which have complements."""
    return st.one_of(st.builds(Full, st.booleans()), st.builds(Window, st.integers(1, 12), causal=st.booleans()))


def square(length: int, num_heads: int = 8) -> Rectangle:
    return Rectangle(num_heads, Span(0, length), Span(0, length))


@settings(max_examples=2 * settings().max_examples)
@given(bands() | block_sparse(), nested() | strided() | bands(), rectangles())
@example(Window(5), Dilated((64, 256), (1, 4)), Rectangle(4, Span(3, 40, 7), Span(0, 300)))
def test_a_union_is_exact_and_not_listed(filtering, other, rectangle):
    """What `check_pattern` demands; and planning looks at no pairs of rows."""
    pattern = Union((filtering, other))
    check_pattern(pattern, rectangle)
    assert not pattern.listing


@settings(max_examples=2 * settings().max_examples)
@given(bands() | block_sparse(), nested() | strided(), bands(), rectangles())
def test_an_intersection_is_exact_and_not_listed(filtering, other, third, rectangle):
    """A pattern that counts twice is counted once where another counts once."""
    pattern = Intersection((filtering, other, third))
    check_pattern(pattern, rectangle)
    assert not pattern.listing


def segments() -> st.SearchStrategy[Pattern]:
    """Dilated patterns of any segments and rates, with up to two branches, and others in their segments."""
    some = dilated(most_branches=2, heads="shared") | dilated(most_branches=2, heads="blocks")
    inside = st.tuples(dilated(most_branches=2, heads="shared"), bands() | block_sparse()).map(lambda ab: Restrict(*ab))
    return some | inside


@settings(max_examples=2 * settings().max_examples)
@given(st.lists(segments() | bands(), min_size=2, max_size=3), st.sampled_from([Union, Intersection]), rectangles())
@example([Dilated((4,), (2,)), Dilated((6,), (3,))], Union, Rectangle(3, Span(0, 30), Span(0, 30)))
@example([Dilated((64, 256), (1, 4)), Dilated((128, 512), (2, 8))], Union, Rectangle(4, Span(3, 40, 7), Span(0, 300)))
@example([Window(3), Dilated((4, 6), (1, 3))], Union, Rectangle(3, Span(0, 30), Span(0, 30)))
@example([Dilated((1,), (5,)), Dilated((30,), (7,))], Union, Rectangle(6, Span(0, 40), Span(1, 40, 2)))
def test_dilated_patterns_together_are_exact_and_not_listed(parts, how, rectangle):
    """Any two of them, joined or intersected, whatever their segments, rates and heads."""
    pattern = how(tuple(parts))
    check_pattern(pattern, rectangle)
    assert not pattern.listing


@settings(max_examples=2 * settings().max_examples)
@given(dilated(), segments() | bands() | block_sparse(), rectangles())
def test_terms_add_up_within_and_without_are_apart(a, b, rectangle):
    """Terms of a pattern count what it counts; what a pattern shows of branches, and what it hides, are the branches."""
    if a.heads == "split" and len(a.segment_lengths) > rectangle.num_heads:
        return
    counts = b.counts(rectangle)
    assert (sum(term.counts(rectangle) for term in b.terms) == counts).all()
    plan = a.plan(rectangle)
    for term in b.terms:
        assert term.binary and term.filters and term.complements
        seen = term.counts(rectangle)
        for work, part in ((term.within, seen), (term.without, 1 - seen)):
            cut = [piece for branch in plan.branches for piece in work(branch, rectangle)]
            assert (type(plan)(rectangle, tuple(cut)).counts() == plan.counts() * part).all()
            assert all(piece.q.distinct for piece in cut)


@pytest.mark.parametrize(
    "pattern",
    [
        Window(5) | Dilated((64, 256), (1, 4)),
        Window(100) | Dilated((2048, 4096, 8192), (1, 2, 4)),
        Window(100) & Dilated((2048, 4096, 8192), (1, 2, 4)),
        Full(causal=True) & Dilated((64, 256), (1, 4)) | Window(7, causal=False),
        Dilated((64, 256), (1, 4)) | Dilated((128, 512), (2, 8)),
        Dilated((2048, 4096), (1, 2), causal=True) | Dilated((2048, 8192), (1, 8), causal=True),
        Dilated((64, 32768), (1, 16), causal=True) | Window(9),
    ],
)
def test_as_many_branches_at_every_length(pattern):
    """No index data, and no more branches at a million tokens than at sixteen thousand."""
    short, long = (pattern.plan(square(length)) for length in (1 << 14, 1 << 20))
    assert (0, 0) == (short.nbytes, long.nbytes)
    assert len(long.branches) <= len(short.branches) <= 250


def test_what_has_no_order_is_still_listed():
    """Two patterns without complements list their rows, exactly; so does a sum of one that counts twice with itself."""
    trees = HierarchicalBlocks(2, 2, 2), HierarchicalBlocks(3, 2, 3)
    for pattern in (Union(trees), Intersection(trees), Window(3) | trees[0] + trees[1]):
        assert pattern.listing
        check_pattern(pattern, Rectangle(3, Span(0, 30), Span(0, 30)))


def test_a_mask_joined_with_strides_lists_blocks_only():
    """Rows of a mask's blocks, not pairs of tokens."""
    mask = [[(a + b) % 3 == 0 for b in range(32)] for a in range(32)]
    plan = (BlockSparse(32, mask) | Window(9)).plan(square(1024, 1))
    assert plan.nbytes < 40_000
