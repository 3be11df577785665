"""`Dilated.for_length`: what it returns joins all tokens, and costs no more than it may. Judged by boolean products."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longattn.patterncache import Dilated, HierarchicalBlocks, Pattern, Rectangle, Span, Window
from longattn.patterncache.analysis import joining
from longattn.patterncache.patterns.dilated import QUERIES


def shown_by(pattern: Pattern, length: int, num_heads: int) -> np.ndarray:
    """(length, length) bool: what any head shows, and oneself."""
    shows = np.eye(length, dtype=bool)
    for head in range(num_heads):  # one at a time: all heads of 4096 tokens are a gigabyte of counts
        shows |= pattern.counts(Rectangle(num_heads, Span(0, length), Span(0, length), Span(head, 1)))[0] > 0
    return shows


def joined_after(
    pattern: Pattern | tuple[Pattern, ...], length: int, layers: int, num_heads: int = 8, causal: bool = True
) -> bool:
    """Whether every token has heard of all that it may: boolean products of what layers show (patterns in turn), rows as packed bits."""
    shown = [shown_by(p, length, num_heads) for p in (pattern if isinstance(pattern, tuple) else (pattern,))]
    heard = np.packbits(np.eye(length, dtype=bool), axis=1)
    for layer in range(layers):
        rows = shown[layer % len(shown)]
        heard = np.stack([np.bitwise_or.reduce(heard[np.flatnonzero(row)], axis=0) for row in rows])
    hoped = np.tril(np.ones((length, length), bool)) if causal else np.ones((length, length), bool)
    return bool((np.unpackbits(heard, axis=1, count=length).astype(bool) >= hoped).all())


def mean_keys(pattern: Pattern, length: int, num_heads: int = 8) -> float:
    plan = pattern.plan(Rectangle(num_heads, Span(0, length), Span(0, length)))
    return sum(branch.pairs * branch.heads.length for branch in plan.branches) / length / num_heads


@pytest.mark.parametrize(("length", "layers"), [(1000, 2), (2048, 4), (2048, 12), (4096, 4), (4096, 12)])
def test_lengths_and_depths_of_models(length: int, layers: int):
    """At most half of dense attention's pairs; in fact 17 keys a head at most."""
    pattern = Dilated.for_length(length, layers=layers)
    assert joined_after(pattern, length, layers)
    assert mean_keys(pattern, length) <= min(17.1, length / 4)


@pytest.mark.parametrize(
    ("length", "layers", "rate", "width"),
    [(4096, 4, 16, 9), (4096, 12, 32, 6), pytest.param(32768, 4, 32, 25, marks=pytest.mark.nightly)],
)
def test_the_cheapest_known_joins_are_found(length: int, layers: int, rate: int, width: int):
    """17, 8 and 41 keys a head."""
    known = Dilated((length,), (rate,), causal=True) + Window(width)
    ours = Dilated.for_length(length, layers)
    assert mean_keys(ours, length) <= mean_keys(known, length)
    assert known.reach(layers, length).complete and ours.reach(layers, length).complete


@pytest.mark.nightly
def test_a_hierarchy_can_be_cheaper():
    """`for_length` chooses among dilated branches with a window; 26 keys a head of a hierarchy join 32768 tokens in 4 layers."""
    hierarchy = HierarchicalBlocks(15, 4, 13, causal=True)
    assert hierarchy.reach(4, 32768).complete and mean_keys(hierarchy, 32768) < 26


@pytest.mark.parametrize(
    ("segments", "rates"), [((8, 16), (1, 2)), ((4, 8, 16), (1, 2, 4)), ((16,), (2,)), ((64,), (4,))]
)
def test_what_a_dilated_pattern_lacks(segments: tuple[int, ...], rates: tuple[int, ...]):
    """Alone it joins 64 tokens at no depth. A window of two mends it; so does a shift in every second layer where a branch shows neighbours."""
    alone, shifted = (Dilated(segments, rates, causal=True, shift=shift) for shift in (0, 1))
    assert not joined_after(alone, 64, 64, 4) and alone.lint(64, 4).layers is None
    assert joined_after(alone + Window(2), 64, 64, 4)
    assert joined_after((alone, shifted), 64, 64, 4) == (1 in rates)


@settings(max_examples=25)
@given(st.integers(1, 160), st.integers(1, 6), st.integers(1, 9), st.booleans())
@example(length=1, layers=1, num_heads=1, causal=True)
@example(length=97, layers=2, num_heads=1, causal=True)
@example(
    length=149, layers=3, num_heads=3, causal=False
)  # the last tokens cannot go on to the next residue that a head has
def test_every_length_is_joined(length: int, layers: int, num_heads: int, causal: bool):
    pattern = Dilated.for_length(length, layers, num_heads=num_heads, causal=causal)
    assert pattern.causal is causal and joined_after(pattern, length, layers, num_heads, causal)


@settings(max_examples=25)
@given(
    st.integers(2, 24),
    st.integers(1, 30),
    st.integers(1, 5),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from(QUERIES),
)
def test_few_tokens_say_as_much_as_all(rate: int, width: int, layers: int, num_heads: int, causal: bool, queries: str):
    """A rate and a window join a long sequence exactly where they join the stretch that is followed."""
    length = layers * width + 7 * rate + 1
    join = joining._Join(length, rate, width, queries, causal)
    assert join.joins(layers, num_heads) == joined_after(join.pattern, length, layers, num_heads, causal)


@settings(max_examples=25)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 40), st.booleans(), st.sampled_from(QUERIES))
def test_no_pattern_has_more_keys_than_is_said(length: int, rate: int, width: int, causal: bool, queries: str):
    join = joining._Join(length, min(rate, length), min(width, length), queries, causal)
    assert mean_keys(join.pattern, length) <= join.keys + 1e-9


@pytest.mark.parametrize(("length", "layers"), [(1000, 2), (2048, 4), (2048, 12)])
def test_a_budget_for_all_residues_shows_every_pair(length: int, layers: int):
    """A key in 2 * heads, and a window: some head sees every earlier token directly, for a quarter of dense attention's pairs."""
    pattern = Dilated.for_length(length, layers, budget=length / 16 + 64)
    assert joined_after(pattern, length, 1) and mean_keys(pattern, length) <= length / 8 + 64


@pytest.mark.parametrize("budget", [13, 40, 150.5])
def test_a_budget_is_spent_on_pairs_seen_directly(budget: float):
    """Never exceeded, and more is never worse."""
    length = 600
    cheapest, richer = Dilated.for_length(length, 4), Dilated.for_length(length, 4, budget=budget)
    assert mean_keys(cheapest, length) <= mean_keys(richer, length) <= budget and joined_after(richer, length, 4)
    direct = [int((p.to_dense(length) > 0).any(0).sum()) for p in (cheapest, richer)]
    assert direct[1] >= direct[0]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [((0, 2), ValueError, "N must be"), ((8, 0), ValueError, "layers must be"), ((8, 2.0), TypeError, "layers must be"),
     ((4096, 4, 3.0), ValueError, "budget must be at least 1"), ((8, 2, "9"), TypeError, "budget must be"),
     ((4096, 4, float("nan")), ValueError, "budget must be at least")],
)  # fmt: skip
def test_bad_arguments(arguments: tuple[object, ...], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        Dilated.for_length(*arguments)  # type: ignore[arg-type]
