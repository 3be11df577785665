"""The discrete half: plans count what patterns count, on any rectangle."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longattn.patterncache import (
    Affine,
    Dilated,
    Full,
    HierarchicalBlocks,
    Listed,
    Pattern,
    Rectangle,
    Restrict,
    Span,
    Window,
    parse_pattern,
)
from longattn.patterncache.testing import check_pattern, dilated, patterns, rectangles


def square(length: int, num_heads: int = 4) -> Rectangle:
    return Rectangle(num_heads, (Span(0, length),), (Span(0, length),))


@given(patterns(), rectangles())
@example(Dilated((4,), (7,)), square(9))
@example(Dilated((5, 3), (2, 2), causal=True), Rectangle(3, (Span(1, 9, 3), Span(40, 6)), (Span(2, 12, 2),)))
@example(Window(3, sinks=2, causal=False), square(12))
@example(Window(1), Rectangle(1, Span(0, 2, 2), Span(1, 1)))
@settings(max_examples=4 * settings().max_examples)
def test_every_pattern_keeps_its_promises_on_any_rectangle(pattern: Pattern, rectangle: Rectangle):
    """Plan counts, piece counts, canonical strings, causality and additivity hold."""
    check_pattern(pattern, rectangle)


@given(patterns(), rectangles())
@example(Window(3, causal=False), Rectangle(1, Span(0, 9), Span(4, 2)))
def test_a_branch_knows_how_many_pairs_a_head_sees(pattern: Pattern, rectangle: Rectangle):
    """Keys outside its band are no pairs, nor do rows that see nothing make the number smaller."""
    plan = pattern.plan(rectangle)
    counted = sum(branch.pairs * branch.heads.length for branch in plan.branches)
    assert counted == pattern.counts(rectangle).sum()


@given(dilated(heads="split"), st.integers(3, 12), st.integers(0, 60))
def test_split_gives_every_head_one_branch(pattern: Dilated, num_heads: int, length: int):
    """Group sizes differ by at most one, and every head is in exactly one group."""
    sizes = []
    for b in range(len(pattern.segment_lengths)):
        classes = list(pattern.head_classes(b, square(length, num_heads)))
        sizes.append(sum(heads.length for heads, _ in classes))
    assert sum(sizes) == num_heads and max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
    check_pattern(pattern, square(length, num_heads))


@pytest.mark.parametrize(
    "rows",
    [
        Affine(5, 3, 20, 6, 2),
        Listed(np.array([[0, 9], [30, 21]]), 3, 2),
        Listed(np.array([[4], [50]]), 6, 3),
        Listed(np.array([[4, 7, 1, 30, 8, 2]]), 1, 1),
    ],
    ids=str,
)
def test_a_part_of_some_rows_is_that_part(rows: Affine | Listed):
    """Members from anywhere, so many of them, runs cut in two or not; and tiles."""
    whole = rows.rows()
    for first in range(rows.count + 1):
        for count in range(1, rows.count - first + 1):
            np.testing.assert_array_equal(rows.narrow(first, count).rows(), whole[:, first : first + count])
    for first in range(rows.tiles):
        np.testing.assert_array_equal(rows.tile_range(first, 1).rows(), whole[first : first + 1])


@given(patterns(), st.integers(1, 4), st.integers(0, 30))
def test_a_restriction_never_adds(pattern: Pattern, num_heads: int, length: int):
    """counts(Restrict(a, b)) <= counts(a)."""
    rectangle = square(length, num_heads)
    assert (Restrict(pattern, Window(5)).counts(rectangle) <= pattern.counts(rectangle)).all()


def test_dilated_counts_written_out_by_hand():
    """Segments 4 and 8 with rates 1 and 2: head 1 sees odd positions of its 8-segment beside its 4-segment."""
    counts = Dilated((4, 8), (1, 2)).counts(square(8, 2))
    expected = np.zeros((8, 8), np.int64)
    expected[:4, :4] += 1
    expected[4:, 4:] += 1
    expected[1::2, 1::2] += 1
    np.testing.assert_array_equal(counts[1], expected)


def test_all_queries_see_the_dilated_keys():
    """queries="all" dilates only the keys."""
    counts = Dilated((8,), (4,), queries="all").counts(square(8, 1))
    np.testing.assert_array_equal(counts[0], np.tile([1, 0, 0, 0], (8, 2)))


def test_a_million_token_plan_holds_no_index_data():
    """Affine plans are a few integers, whatever the length."""
    plan = Dilated((2048, 4096, 8192), (1, 2, 4), causal=True).plan(square(1 << 20, 8))
    assert plan.nbytes == 0 and len(plan.branches) == 7


def test_a_ragged_tail_is_one_more_branch_and_still_affine():
    """The last short segment has its own tiles; nothing is listed."""
    plan = Dilated((8,), (1,)).plan(square(20, 1))
    assert [type(b.q) for b in plan.branches] == [Affine, Affine]


def test_what_cannot_be_strided_is_listed():
    """A restriction by something that cannot filter lists its rows."""
    plan = Restrict(Window(4), HierarchicalBlocks(2, 2, 2)).plan(square(9, 2))
    assert plan.listed and all(isinstance(b.q, Listed) for b in plan.branches)


def test_nothing_to_see_is_an_empty_plan():
    """N = 0, and a causal rectangle that lies in the future."""
    assert Full().plan(square(0)).empty
    assert Full(causal=True).plan(Rectangle(1, (Span(0, 4),), (Span(4, 4),))).empty


def test_equal_patterns_have_one_string():
    """Lists, tuples and numpy integers mean the same."""
    first = Dilated([4, 8], [1, 2])
    assert first.canonical() == Dilated((np.int64(4), 8), (1, np.int32(2))).canonical()
    assert first == Dilated((4, 8), (1, 2)) and hash(first) == hash(Dilated((4, 8), (1, 2)))


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: Dilated((), ()), ValueError, "segment_lengths must have at least one entry"),
        (lambda: Dilated((4, 8), (1,)), ValueError, "dilation_rates must have as many entries"),
        (lambda: Dilated((0,), (1,)), ValueError, r"segment_lengths\[0\] must be an integer >= 1, got 0"),
        (lambda: Dilated((4,), (-1,)), ValueError, r"dilation_rates\[0\].*got -1"),
        (lambda: Dilated((4.0,), (1,)), TypeError, r"segment_lengths\[0\].*got 4.0 \(float\)"),
        (lambda: Dilated((True,), (1,)), TypeError, r"segment_lengths\[0\].*bool"),
        (lambda: Dilated(("4",), (1,)), TypeError, r"segment_lengths\[0\].*str"),
        (lambda: Dilated("48", (1, 1)), TypeError, "segment_lengths must be a sequence"),
        (lambda: Dilated(4, 1), TypeError, "segment_lengths must be a sequence"),
        (lambda: Dilated((4,), (1,), heads="some"), ValueError, "heads must be one of"),
        (lambda: Dilated((4,), (1,), queries="some"), ValueError, "queries must be one of"),
        (lambda: Dilated((4,), (1,), causal=1), TypeError, "causal must be True or False"),
        (lambda: Window(0), ValueError, "size"),
        (lambda: Window(2, sinks=-1), ValueError, "sinks"),
        (lambda: Full("yes"), TypeError, "causal"),
        (lambda: Restrict(Full(), "full"), TypeError, "b must be a Pattern"),
        (lambda: Span(-1, 2), ValueError, "start"),
        (lambda: Span(0, 2, 0), ValueError, "step"),
        (lambda: Rectangle(0, Span(0, 1), Span(0, 1)), ValueError, "num_heads"),
        (lambda: Rectangle(2, Span(0, 1), Span(0, 1), Span(1, 2)), ValueError, "heads must lie below num_heads=2"),
        (lambda: Rectangle(2, [1, 2], Span(0, 1)), TypeError, "queries must be a Span"),
        (lambda: Dilated((2, 2), (1, 1), "split").plan(square(4, 1)), ValueError, "at most one branch per head"),
        (lambda: parse_pattern("dilated"), ValueError, "canonical string"),
        (lambda: parse_pattern('["nobody",{}]'), ValueError, "nobody"),
    ],
)
def test_a_bad_value_is_named(build, error, words):
    """The message names the parameter, what was expected and what came."""
    with pytest.raises(error, match=words):
        build()
