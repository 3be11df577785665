"""Patterns made of patterns: laws of max, min and sum, and what stays in strides."""

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from longattn.patterncache import (
    BlockSparse,
    ByHead,
    Dilated,
    Full,
    Intersection,
    Pattern,
    Rectangle,
    Restrict,
    Span,
    Sum,
    Union,
    Window,
    parse_pattern,
)
from longattn.patterncache.plan import Counts
from longattn.patterncache.spans import Rows
from longattn.patterncache.testing import check_pattern, check_plan, patterns, rectangles

COMBINED = [
    (lambda a, b: a | b, np.maximum),
    (lambda a, b: a & b, np.minimum),
    (lambda a, b: a + b, np.add),
]


def square(length: int, num_heads: int = 4) -> Rectangle:
    return Rectangle(num_heads, Span(0, length), Span(0, length))


@pytest.mark.parametrize(("combine", "elementwise"), COMBINED)
@given(a=patterns(0), b=patterns(0), rectangle=rectangles())
def test_an_operator_is_its_elementwise_meaning(combine, elementwise, a: Pattern, b: Pattern, rectangle: Rectangle):
    """| is max, & is min, + is sum, of counts."""
    expected = elementwise(a.counts(rectangle), b.counts(rectangle))
    np.testing.assert_array_equal(combine(a, b).counts(rectangle), expected)
    check_pattern(combine(a, b), rectangle)


@pytest.mark.parametrize(("combine", "_"), COMBINED)
@given(a=patterns(0), b=patterns(0), c=patterns(0))
def test_order_and_brackets_do_not_matter(combine, _, a: Pattern, b: Pattern, c: Pattern):
    """However it is written, it is one pattern with one string and one hash."""
    first, second = combine(combine(a, b), c), combine(c, combine(b, a))
    assert first == second and first.canonical() == second.canonical() and hash(first) == hash(second)
    assert parse_pattern(first.canonical()) == first == pickle.loads(pickle.dumps(first))


@given(patterns(0))
def test_a_part_is_no_better_twice(a: Pattern):
    """a | a and a & a are a; a + a is not."""
    assert (a | a) == (a & a) == a
    assert a + a != a


@given(patterns(0), patterns(0), st.integers(1, 4), st.integers(0, 30))
def test_the_smaller_and_the_larger_add_up(a: Pattern, b: Pattern, num_heads: int, length: int):
    """counts(a | b) + counts(a & b) == counts(a + b)."""
    rectangle = square(length, num_heads)
    total = Sum((a | b, a & b)).counts(rectangle)
    np.testing.assert_array_equal(total, (a + b).counts(rectangle))


def test_block_masks_of_one_shape_become_one_mask():
    """Then a union is planned in blocks, and equals the mask written at once."""
    a, b = np.eye(4, dtype=bool), np.tri(4, k=-2, dtype=bool)
    assert (BlockSparse(8, a) | BlockSparse(8, b)) == BlockSparse(8, a | b)
    assert (BlockSparse(8, a | b) & BlockSparse(8, b, causal=True)) == BlockSparse(8, b, causal=True)
    apart = BlockSparse(8, a) | BlockSparse(8, b, causal=True) | BlockSparse(4, np.ones((8, 8), bool))
    assert isinstance(apart, Union) and len(apart.parts) == 3
    check_pattern(apart, square(30))


@pytest.mark.parametrize(
    "pattern",
    [
        Window(9) & Full(causal=True),
        Dilated((8,), (2,)) & Window(5) & Full(causal=True),
        BlockSparse(8, np.tri(4, dtype=bool)) & Full(causal=True) & Dilated((16,), (1,)),
        Dilated((8,), (2,)) + Dilated((8,), (2,)),
        Restrict(Dilated((8, 16), (1, 2)), Window(9) & Full(causal=True)),
    ],
)
def test_what_is_easy_stays_in_strides(pattern: Pattern):
    """Bands and blocks under &, and sums of strides, list no rows."""
    plan = pattern.plan(square(32))
    assert plan.nbytes <= 8 * 4 * len(plan.branches)
    check_pattern(pattern, square(32))


def test_the_smaller_of_a_double_count_is_listed_rightly():
    """Dilated & Full counts once what two branches show, so its strides cannot be kept."""
    doubled = Dilated((4, 8), (1, 1))
    assert (doubled & Full()).counts(square(8)).max() == 1
    check_pattern(doubled & Full(), square(8))


def test_causal_says_that_the_future_is_hidden():
    """A union and a sum are causal where all parts are, an intersection where one is."""
    past, both = Window(3), Window(3, causal=False)
    assert [(past | both).causal, (past + both).causal, (past & both).causal] == [False, False, True]
    assert (past | both).with_causal(False) == (past | both) != (past | both).with_causal(True)
    assert (past | Full(causal=True)).causal and not (past & both).with_causal(False).causal


class Listing(Pattern, name="listing"):
    """A pattern of somebody's own that leaves planning to the default, and counts a pair up to three times."""

    causal = False

    def count(self, h: Rows, i: Rows, j: Rows, num_heads: int) -> Counts:
        return (h + i * i + j) % 4

    def with_causal(self, causal: bool) -> "Listing":
        return self

    def to_spec(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> "Listing":
        return cls()


@given(patterns(0), rectangles())
@example(BlockSparse(1, np.eye(256, dtype=bool)), Rectangle(1, Span(1, 1), Span(0, 2)))
def test_listed_rows_know_their_positions(b: Pattern, rectangle: Rectangle):
    """What filters a pattern that lists its rows sees their true positions, wherever the rectangle begins."""
    for pattern in (Restrict(Listing(), b), Restrict(b, Listing()), Listing() + b, Listing() & b):
        check_plan(pattern.plan(rectangle), pattern)


@pytest.mark.parametrize("cells", [1, 20, 100])
def test_rows_are_listed_strip_by_strip(cells: int, monkeypatch: pytest.MonkeyPatch):
    """A rectangle with more cells than may stand at once, rows of several spans and steps included."""
    monkeypatch.setattr("longattn.patterncache.planning.listing._DENSE_CELLS", cells)
    for rectangle in (square(9, 2), Rectangle(2, (Span(1, 5, 3), Span(40, 6)), (Span(2, 7, 2), Span(30, 4)))):
        check_plan(Listing().plan(rectangle), Listing())


@pytest.mark.parametrize(("combine", "elementwise"), COMBINED)
def test_groups_of_heads_join_with_what_all_heads_share(combine, elementwise):
    """In either order: each head's own pattern with the other, heads of no group with the other alone."""
    mine = ByHead([(Span(0, 2), Dilated((4, 8), (1, 2))), (Span(3, 1), Window(3))])
    for other in (Window(5, sinks=1), BlockSparse(2, np.eye(6, dtype=bool)), Listing()):
        expected = elementwise(mine.counts(square(12)), other.counts(square(12)))
        for pattern in (combine(mine, other), combine(other, mine)):
            np.testing.assert_array_equal(pattern.counts(square(12)), expected)
            for rectangle in (square(12), Rectangle(4, Span(1, 5, 2), Span(3, 9), Span(1, 3))):
                check_plan(pattern.plan(rectangle), pattern)
    restricted = Restrict(mine, Window(5))
    check_plan(restricted.plan(square(12)), restricted)
    assert (restricted.counts(square(12)) == np.where(Window(5).counts(square(12)), mine.counts(square(12)), 0)).all()


@pytest.mark.parametrize("combine", [combine for combine, _ in COMBINED])
def test_other_things_do_not_combine(combine):
    """TypeError, as Python says it."""
    with pytest.raises(TypeError, match="unsupported operand"):
        combine(Full(), 3)


@pytest.mark.parametrize("kind", [Union, Intersection, Sum])
@pytest.mark.parametrize("parts", [(), None, "ab", Full(), (Full(), 3)])
def test_bad_parts_are_named(kind, parts):
    """The message names the parts."""
    with pytest.raises(TypeError, match=r"parts(\[1\])? must be a"):
        kind(parts)
