"""Strided + local, hierarchical blocks, and documents."""

import cProfile
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from longattn.patterncache import (
    ByHead,
    Dilated,
    Documents,
    Full,
    HierarchicalBlocks,
    Periodic,
    Rectangle,
    Span,
    Strided,
    Window,
)
from longattn.patterncache.testing import check_pattern, documents, hierarchical_blocks, patterns, rectangles, strided


def square(length, num_heads=2):
    return Rectangle(num_heads, Span(0, length), Span(0, length))


@given(st.one_of(strided(), hierarchical_blocks(), documents(patterns(1))), rectangles())
@example(Strided(3, 2), Rectangle(1, Span(1, 9, 3), (Span(0, 6), Span(20, 7, 2))))
@example(Strided(4, heads="split", causal=False), square(13, 3))
@example(HierarchicalBlocks(2, 3, 2, causal=True), square(19))
@example(Documents([0, 3, 3, 10, 256], Window(2, sinks=1)), Rectangle(1, (Span(1, 5, 2), Span(4, 9)), Span(0, 12)))
def test_they_keep_every_promise_of_a_pattern(pattern, rectangle):
    """Plans count what the rule counts, canonical strings read back, causal hides the future, parts add up."""
    check_pattern(pattern, rectangle)


def test_strided_is_the_papers_set():
    """Child et al., section 4.2: A1 = {max(0, i - l), ..., i} and A2 = {j: (i - j) mod l = 0}, merged."""
    counts, stride = Strided(4).counts(square(23))[0], 4
    for i in range(23):
        first = set(range(max(0, i - stride), i + 1))
        second = {j for j in range(i + 1) if (i - j) % stride == 0}
        assert set(np.flatnonzero(counts[i]).tolist()) == first | second


def test_strided_by_hand_and_by_head():
    """Query 5 with stride 3 and local 2: head 0 is local, head 1 strided."""
    counts = Strided(3, 2, heads="split").counts(square(7))
    assert counts[:, 5].tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 1, 0]]


def test_hierarchical_blocks_by_hand():
    """Blocks of 2, of 4 and of 8: query 5 sees its block 4-5, the end 7 beside it, and the end 3 of the other half."""
    counts = HierarchicalBlocks(2, levels=3, fanout=2).counts(square(16))[0]
    assert np.flatnonzero(counts[5]).tolist() == [3, 4, 5, 7]
    assert np.flatnonzero(HierarchicalBlocks(2, 3, 2, causal=True).counts(square(16))[0, 5]).tolist() == [3, 4, 5]


def test_three_layers_of_a_tree_reach_everything():
    """Up to the last token of one's own part, across, and down again: as many layers as that takes, no island left."""
    found = HierarchicalBlocks(4, levels=3, fanout=4).lint(64, 1)
    assert found.islands == 1 and found.layers is not None and found.most_keys <= 4 + 2 * 4


def test_documents_are_the_pattern_on_each_alone():
    """Dilated segments restart with every document."""
    pattern, borders = Dilated((4, 8), (1, 2), causal=True), [0, 5, 5, 18, 20]
    counts = Documents(np.array(borders), pattern).counts(square(20))
    expected = np.zeros_like(counts)
    for begin, end in pairwise(borders):
        expected[:, begin:end, begin:end] = pattern.counts(square(end - begin))
    np.testing.assert_array_equal(counts, expected)
    assert Documents(borders).lint(20).islands == 3


def test_a_long_plan_holds_strides_only():
    """A million tokens: no index data, and few branches."""
    for pattern, most in ((Strided(1024), 3), (HierarchicalBlocks(128, 4, 8, causal=True), 23)):
        plan = pattern.plan(square(1 << 20))
        assert plan.nbytes == 0 and len(plan.branches) <= most


@st.composite
def by_head(draw, num_heads):
    """Any groups of some of so many heads."""
    step = draw(st.integers(1, 2))
    groups = [Span(first, len(range(first, num_heads, step)), step) for first in range(min(step, num_heads))]
    return ByHead([(heads, draw(patterns(0))) for heads in groups])


@given(st.data(), rectangles())
def test_groups_of_heads_keep_every_promise_of_a_pattern(data, rectangle):
    """Evenly spaced heads included, seen from any heads of a rectangle."""
    check_pattern(data.draw(by_head(rectangle.num_heads)), rectangle)


def test_each_head_sees_by_its_own_pattern():
    """And a head of no group sees nothing; groups have no order."""
    pattern = ByHead([(Span(2, 1), Window(2)), (Span(0, 1), Full(causal=True))])
    counts = pattern.counts(square(5, 4))
    for head, own in ((0, Full(causal=True)), (2, Window(2))):
        np.testing.assert_array_equal(counts[head], own.counts(square(5, 1))[0])
    assert not counts[[1, 3]].any() and pattern == ByHead(pattern.parts[::-1])


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: Strided(0), ValueError, "stride must be an integer >= 1, got 0"),
        (lambda: Strided(2, local=0), ValueError, "local"),
        (lambda: Strided(2, heads="both"), ValueError, "heads must be one of"),
        (lambda: HierarchicalBlocks(4, fanout=1), ValueError, "fanout must be an integer >= 2"),
        (lambda: HierarchicalBlocks(4, levels=1.0), TypeError, "levels"),
        (lambda: HierarchicalBlocks(4, levels=64, fanout=2), ValueError, "levels must keep the outermost block"),
        (
            lambda: ByHead([(Span(0, 3), Full()), (Span(2, 2), Full())]),
            ValueError,
            r"parts\[1\] must not overlap .*\[2\]",
        ),
        (lambda: ByHead([(3, Full())]), TypeError, "must be a Span of heads"),
        (lambda: ByHead([(Span(0, 3), Full(), 1)]), TypeError, r"parts\[0\] must be \(heads, pattern\)"),
        (lambda: ByHead([3]), TypeError, r"parts\[0\] must be \(heads, pattern\)"),
        (lambda: ByHead([]), TypeError, "parts must be a sequence of at least one"),
        (lambda: ByHead(Span(0, 3)), TypeError, "parts must be a sequence of at least one"),
        (lambda: ByHead([(Span(0, 3), "full")]), TypeError, r"parts\[0\]\[1\] must be a Pattern"),
        (
            lambda: ByHead([(Span(0, (1 << 20) + 1), Full())]),
            ValueError,
            r"parts\[0\]\[0\] must lie below 1048576 heads",
        ),
        (lambda: Periodic(0, [], 4), ValueError, "period must be an integer >= 1"),
        (lambda: Periodic(2, [], 0), ValueError, "length must be an integer >= 1"),
        (lambda: Periodic(2, 3, 4), TypeError, "runs must be a sequence"),
        (lambda: Periodic(2, [3], 4), TypeError, r"runs\[0\] must be \(a, b, low, high\)"),
        (lambda: Periodic(2, [(0, 1, None)], 4), TypeError, r"runs\[0\] must be \(a, b, low, high\)"),
        (
            lambda: Periodic(2, [(0, 2, None, 0)], 4),
            ValueError,
            r"runs\[0\] must have residues below period=2, got 0 and 2",
        ),
        (
            lambda: Periodic(2, [(2, 0, None, 0)], 4),
            ValueError,
            r"runs\[0\] must have residues below period=2, got 2 and 0",
        ),
        (lambda: Periodic(2, [(0, -1, None, 0)], 4), ValueError, r"runs\[0\]\[1\] must be an integer >= 0"),
        (lambda: Periodic(2, [(0, 1, -5, 0)], 4), ValueError, r"runs\[0\] must be an integer >= -4"),
        (lambda: Periodic(2, [(0, 1, None, 1.5)], 4), TypeError, r"runs\[0\] must be an integer"),
        (lambda: Periodic(2, [(0, 1, None, 0)], 4, causal=1), TypeError, "causal must be"),
        (lambda: Periodic(2, [(0, 1, None, 0)], 4).plan(square(5)), ValueError, "queries must lie below length=4"),
        (lambda: HierarchicalBlocks(0), ValueError, "block_size must be an integer >= 1"),
        (lambda: HierarchicalBlocks(4, levels=0), ValueError, "levels must be an integer >= 1"),
        (lambda: HierarchicalBlocks(4, causal=None), TypeError, "causal must be"),
        (lambda: HierarchicalBlocks(2, levels=63, fanout=2), ValueError, "levels must keep the outermost block"),
        (lambda: ByHead([(Span(0, 3), Full())]).plan(square(4, 2)), ValueError, "heads must lie below num_heads=2"),
        (lambda: Documents([0]), ValueError, "cu_seqlens must begin with 0, .*at least two"),
        (lambda: Documents([1, 4]), ValueError, "cu_seqlens must begin with 0"),
        (lambda: Documents([0, 4, 3]), ValueError, "never fall"),
        (lambda: Documents([0, 4.0]), TypeError, r"cu_seqlens\[1\]"),
        (lambda: Documents(4), TypeError, "cu_seqlens must be a sequence"),
        (lambda: Documents([0, 4], "full"), TypeError, "pattern must be a Pattern"),
        (lambda: Documents([0, 4], Full()).plan(square(5)), ValueError, r"queries must lie below cu_seqlens\[-1\] = 4"),
    ],
)
def test_a_bad_value_is_named(build, error, words):
    """The message names the parameter, what was expected and what came."""
    with pytest.raises(error, match=words):
        build()


def test_documents_are_planned_together():
    """Sixty-four documents cost as many interval calculations as one: segments alike share a branch."""
    borders = np.cumsum(np.random.default_rng(0).integers(20, 120, 64)).tolist()
    rectangle = Rectangle(8, Span(0, borders[-1]), Span(0, borders[-1]))
    inner = Dilated((64, 128, 256), (1, 2, 4), causal=True)
    with cProfile.Profile() as profile:
        plan = Documents([0, *borders], inner).plan(rectangle)
    calls = {
        str(entry.code.co_name): entry.callcount for entry in profile.getstats() if not isinstance(entry.code, str)
    }
    assert calls["congruent_indices"] <= 30 and len(plan.branches) < 4 * 64
