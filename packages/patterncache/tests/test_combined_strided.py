"""Unions and intersections of strided patterns stay strided: exact counts, as many branches at every length, no listed rows."""

from math import lcm

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longattn.patterncache import BlockSparse, Dilated, Full, Intersection, Pattern, Rectangle, Span, Union, Window
from longattn.patterncache.testing import block_sparse, check_pattern, rectangles, strided


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


@settings(max_examples=2 * settings().max_examples)
@given(nested(), rectangles())
def test_support_and_excess_add_up(pattern, rectangle):
    """Each pair once, and what is beyond."""
    counts = pattern.counts(rectangle)
    for branches, expected in (
        (pattern.support(rectangle), counts.clip(max=1)),
        (pattern.excess(rectangle), (counts - 1).clip(min=0)),
    ):
        plan = pattern.plan(rectangle)
        assert (type(plan)(rectangle, tuple(branches)).counts() == expected).all()


@pytest.mark.parametrize(
    "pattern",
    [
        Window(5) | Dilated((64, 256), (1, 4)),
        Window(100) | Dilated((2048, 4096, 8192), (1, 2, 4)),
        Window(100) & Dilated((2048, 4096, 8192), (1, 2, 4)),
        Full(causal=True) & Dilated((64, 256), (1, 4)) | Window(7, causal=False),
    ],
)
def test_as_many_branches_at_every_length(pattern):
    """No index data, and no more branches at a million tokens than at sixteen thousand."""
    short, long = (pattern.plan(square(length)) for length in (1 << 14, 1 << 20))
    assert (0, 0) == (short.nbytes, long.nbytes)
    assert len(long.branches) <= len(short.branches) <= 250


def test_what_has_no_order_is_still_listed():
    """Two patterns without complements, and branches that are not nested, list their rows, exactly."""
    for pattern in (Dilated((4,), (2,)) | Dilated((6,), (3,)), Window(3) | Dilated((4, 6), (1, 3))):
        assert pattern.listing
        check_pattern(pattern, Rectangle(3, Span(0, 30), Span(0, 30)))


def test_a_mask_joined_with_strides_lists_blocks_only():
    """Rows of a mask's blocks, not pairs of tokens."""
    mask = [[(a + b) % 3 == 0 for b in range(32)] for a in range(32)]
    plan = (BlockSparse(32, mask) | Window(9)).plan(square(1024, 1))
    assert plan.nbytes < 40_000
