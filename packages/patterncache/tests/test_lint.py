"""`lint` and `reach` beside brute force: dense counts, and powers of a dense matrix."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longattn.patterncache import (
    BlockSparse,
    ByHead,
    Dilated,
    Documents,
    Full,
    Gap,
    HierarchicalBlocks,
    Pattern,
    Rectangle,
    Restrict,
    Span,
    Strided,
    Window,
)
from longattn.patterncache.analysis.lint import lint
from longattn.patterncache.analysis.propagation import stretches
from longattn.patterncache.analysis.reach import layers_needed, reach
from longattn.patterncache.testing import dilated, patterns

LONGNET = ((2048, 4096, 8192), (1, 2, 4))


def dense(pattern: Pattern, length: int, num_heads: int):
    """Counts, and (layers until done or None, what is known after every number of layers, islands), the slow way."""
    counts = pattern.counts(Rectangle(num_heads, Span(0, length), Span(0, length)))
    hop = (counts.sum(axis=0) > 0) | np.eye(length, dtype=bool)
    known = [np.eye(length, dtype=bool)]
    for _ in range(length):
        known.append((hop.astype(int) @ known[-1].astype(int)) > 0)
    joined = np.eye(length, dtype=bool)
    for _ in range(length):
        joined = ((hop | hop.T).astype(int) @ joined.astype(int)) > 0
    goal = np.tri(length, dtype=bool) if pattern.causal else np.ones((length, length), bool)
    needed = next((layers for layers, bits in enumerate(known) if bits[goal].all()), None)
    return counts, needed, known, len({tuple(row) for row in joined.tolist()})


@given(patterns(), st.integers(0, 40), st.integers(1, 4), st.integers(0, 5))
@example(Dilated((4, 6), (2, 3), causal=True), 31, 2, 2)
@example(Dilated((4, 8), (1, 2)), 8, 1, 2)
@example(Window(3, causal=False), 20, 1, 3)
@example(Full(), 0, 1, 1)
@example(Restrict(Dilated((6,), (2,)), Window(3)), 20, 2, 2)
@example(Documents([0, 3, 3, 9, 256], Window(3, sinks=1)), 20, 2, 2)
@example(Documents([0, 256], Full(causal=True)), 12, 1, 2)
@example(HierarchicalBlocks(2, levels=3, fanout=2), 23, 1, 2)
@settings(max_examples=4 * settings().max_examples)
def test_figures_are_those_of_brute_force(pattern, length, num_heads, layers):
    """Islands, depth, keys, starvation, and what is heard of after some layers."""
    counts, needed, known, groups = dense(pattern, length, num_heads)
    found = lint(pattern, length, num_heads, head_dim=8)
    keys = counts.sum(axis=2)
    others = keys - np.diagonal(counts, axis1=1, axis2=2)
    alone = [int(at) for at in np.flatnonzero(~others.any(axis=0)) if at]
    assert (found.islands, found.layers, found.layers_known) == (groups, needed, True)
    assert (found.starved, found.first_starved) == (len(alone), tuple(alone[:8]))
    assert found.blind == (~keys.any(axis=0)).sum()
    assert (found.fewest_keys, found.most_keys) == (keys.min(initial=10**9) % 10**9, keys.max(initial=0))
    assert found.pairs == keys.sum() and found.mean_keys == pytest.approx(keys.mean() if keys.size else 0)
    assert (found.flops_forward, found.flops_backward) == (32 * keys.sum(), 80 * keys.sum())
    said = reach(pattern, layers, length, num_heads)
    heard = known[min(layers, length)].sum(axis=1)
    assert (said.fewest, said.most) == (heard.min(initial=10**9) % 10**9, heard.max(initial=0))
    assert said.mean == pytest.approx(heard.mean() if length else 0)
    assert (said.needed, said.islands, said.complete) == (needed, groups, needed is not None and needed <= layers)


@given(dilated(most_branches=3), st.integers(3, 5))
def test_gaps_are_residues_that_no_head_shows(pattern, num_heads):
    """Branch by branch, beside the counts of that branch's own diagonal over one segment."""
    heads = np.arange(num_heads)[:, None]
    expected = []
    for b, (segment, rate) in enumerate(zip(pattern.segment_lengths, pattern.dilation_rates, strict=True)):
        # Which offset a head has is what `count` asks too, one head at a time.
        shown = (np.arange(segment)[None] % rate == pattern._offset(b, heads, num_heads)).any(axis=0)
        missing = tuple(np.flatnonzero(~shown[: min(rate, segment)]).tolist())
        expected += [Gap(segment, rate, missing)] if missing else []
    assert list(lint(pattern, 7, num_heads).gaps) == expected


def test_gaps_of_a_group_are_those_of_its_heads():
    """Two heads of rate 4 cover two residues, whatever the others do."""
    pattern = ByHead([(Span(0, 2), Dilated((8,), (4,))), (Span(2, 2), Full())])
    assert lint(pattern, 16, 4).gaps == (Gap(8, 4, (2, 3)),)


@pytest.mark.parametrize("causal", [False, True])
def test_longnet_segments_leave_four_islands(causal):
    """2048/4096/8192 over 32K tokens: four islands at any depth, and the first token of the later ones sees only itself."""
    found = lint(Dilated(*LONGNET, causal=causal), 32768)
    assert (found.islands, found.layers, found.gaps) == (4, None, ())
    assert found.first_starved == ((8192, 16384, 24576) if causal else ())
    assert "4 islands; no depth joins all tokens" in found.line and str(found).startswith(found.line)
    assert lint(Dilated(*LONGNET, causal=causal), 8192).islands == 1


def test_split_heads_leave_residues_uncovered():
    """Every group of heads has one offset only."""
    assert lint(Dilated((8, 16), (1, 4), heads="split"), 16).gaps == (Gap(16, 4, (0, 2, 3)),)


@given(st.integers(0, 40), st.integers(1, 9), st.integers(0, 9), st.booleans())
def test_the_depth_of_a_window_is_that_of_a_walk(length, size, sinks, causal):
    """Said from its figures where they say it, and so known at any length."""
    pattern = Window(size, sinks, causal)
    said = pattern.direct_depth(length)
    assert said is None or said == layers_needed(pattern, stretches(pattern, length, 1))
    assert lint(Window(512), 1 << 20).layers == -(-((1 << 20) - 1) // 511)


@pytest.mark.parametrize("causal", [False, True])
def test_a_million_tokens_cost_one_period(causal):
    """The work does not grow with the length: 64 times the tokens make hardly more calls of functions."""
    pattern = Dilated(*LONGNET, causal=causal)
    calls = dict.fromkeys((1 << 14, 1 << 20), 0)
    for length in calls:

        def count(*_: object, length: int = length) -> None:
            calls[length] += 1

        sys.setprofile(count)
        try:
            verdict = lint(pattern, length)
        finally:
            sys.setprofile(None)
    assert calls[1 << 20] < 1.2 * calls[1 << 14]
    assert verdict.islands == 128 and verdict.pairs == 128 * lint(pattern, 8192).pairs


def test_a_long_walk_is_not_guessed():
    """Where a walk is too long, lint says so and reach refuses; islands and keys are exact all the same."""
    found = lint(Strided(512), 40_000)
    assert (found.layers, found.layers_known, found.islands, found.most_keys) == (None, False, 1, 590)
    assert "depth not followed" in found.line
    with pytest.raises(ValueError, match="N must leave at most 131072 tokens .*got 200000"):
        reach(Window(512), 2, 200_000)


def test_patterns_answer_themselves_and_draw_a_small_map():
    """The methods, and the map: rows see columns, a key seen twice is 2."""
    pattern = Dilated((2, 4), (1, 2), causal=True)
    assert (pattern.lint(64), pattern.reach(3, 64)) == (lint(pattern, 64), reach(pattern, 3, 64))
    assert str(pattern.reach(3, 64)).startswith("reach: 64 tokens, 3 layers: 1 to 4 tokens")
    assert pattern.describe(4).splitlines()[:5] == ["2...", "11..", "1.2.", "..11", lint(pattern, 4).line]


@pytest.mark.parametrize(
    ("pattern", "length"),
    [(Dilated((8, 16), (1, 2), causal=True), 40), (Full(), 100), (Full(), 1), (Window(9, causal=True), 8192)],
)
def test_a_picture_is_drawn_where_matplotlib_is(pattern, length, tmp_path):
    """A PNG of some size, beside the text."""
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "pattern.png"
    text = pattern.describe(length, 4, head=1, png=path)
    assert image.imread(path).shape[0] > 300 and str(lint(pattern, length, 4)) in text
    with pytest.raises(ValueError, match="N must be at least 1 for a picture, got 0"):
        Full().describe(0, png=path)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: lint(Full(), -1), ValueError, "N must be an integer >= 0, got -1"),
        (lambda: lint(Full(), 8, 0), ValueError, "num_heads"),
        (lambda: lint(Full(), 8, head_dim=0), ValueError, "head_dim"),
        (lambda: lint(Full(), 8, dtype="int8"), ValueError, "dtype must be one of"),
        (lambda: reach(Full(), -1, 8), ValueError, "layers"),
        (lambda: reach(Full(), 1, 8.0), TypeError, "N must be an integer"),
        (lambda: Full().describe(65), ValueError, "N must be at most 64 without"),
        (lambda: Full().describe(4, 2, 2), ValueError, "head below num_heads=2"),
        (lambda: lint(BlockSparse(4, [[True]]), 5), ValueError, "queries must lie below 4"),
    ],
)
def test_a_bad_value_is_named(call, error, words):
    """The message names the parameter, what was expected and what came."""
    with pytest.raises(error, match=words):
        call()


def test_a_document_asks_about_its_own_start():
    """A token's sight of itself is asked at its true position: the second document's first token sees itself, its second that one."""
    pattern = Documents([0, 1, 14], Dilated((256,), (3,), queries="all", causal=True))
    assert (1, (1,)) == (pattern.lint(3, 1).starved, pattern.lint(3, 1).first_starved)


class Rooms(Pattern):
    """A pattern of one's own: full attention in rooms of four, which says so itself."""

    causal = False

    def count(self, h, i, j, num_heads):
        return ((i // 4 == j // 4) & (h >= 0)).astype(np.int64)

    def stretches(self, length):
        assert length % 4 == 0
        yield Full(), 4, length // 4

    def gaps(self, rectangle):
        yield Gap(4, rectangle.num_heads, (1,))

    def with_causal(self, causal):
        return self

    def to_spec(self):
        return {}

    @classmethod
    def from_spec(cls, spec):
        return cls()


def test_a_pattern_of_ones_own_says_what_lint_asks():
    """Its stretches make a long sequence cheap, its gaps are reported; both as the package's own patterns do it."""
    own, packed = lint(Rooms(), 12, 3), lint(Documents([0, 4, 8, 12], Full()), 12, 3)
    assert replace(own, pattern="Documents", gaps=()) == packed
    assert own.gaps == (Gap(4, 3, (1,)),)
    assert lint(Rooms(), 1 << 20).islands == 1 << 18
    assert reach(Rooms(), 1, 12).most == 4
    assert lint(Restrict(Rooms(), Full()), 12, 3).gaps == own.gaps


def test_a_pattern_of_ones_own_says_its_depth():
    """Asked instead of a walk, where nothing stands apart."""

    class Deep(Full):
        def direct_depth(self, length):
            return 7

    assert lint(Deep(), 12).layers == 7


@settings(max_examples=settings().max_examples // 2)
@given(
    dilated(heads="shared") | st.builds(Window, st.integers(1, 9), st.integers(0, 3), st.booleans()),
    st.integers(1, 70),
    st.integers(1, 4),
)
@example(Dilated((64,), (4,)), 100, 3)
def test_shares_are_those_of_boolean_products(pattern, length, depth):
    """Seen directly, in two hops, within the depth, never."""
    sees = (pattern.to_dense(length, 3) > 0).any(axis=0) | np.eye(length, dtype=bool)
    hopes = np.tri(length, k=-1, dtype=bool) if pattern.causal else ~np.eye(length, dtype=bool)
    heard, after = np.eye(length, dtype=bool), []
    for _ in range(max(length, depth, 2)):
        heard = (sees.astype(int) @ heard) > 0
        after.append(heard[hopes].mean() if hopes.any() else 1.0)
    shares = pattern.lint(length, 3, depth=depth).shares
    assert shares is not None and shares.depth == depth
    np.testing.assert_allclose(
        (shares.direct, shares.two_hops, shares.within_depth, shares.never),
        (after[0], after[1], after[depth - 1], 1 - after[-1]),
    )
