"""`Pattern.last_queries`: until when a key is needed, beside the counts themselves."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from longattn.patterncache import (
    BlockSparse,
    ByHead,
    Dilated,
    Documents,
    Full,
    Pattern,
    Rectangle,
    Restrict,
    Span,
    Strided,
    Window,
)
from longattn.patterncache.analysis.retention import FOREVER
from longattn.patterncache.testing import patterns

HEADS, BEYOND = 2, 64


def by_counts(pattern: Pattern, keys: Span, stop: int) -> np.ndarray:
    """The last query before `stop`, not before its key, that sees each key, by looking at every pair."""
    counts = pattern.counts(Rectangle(HEADS, Span(0, stop), keys))
    rows = np.arange(stop)[:, None]
    return np.where((counts > 0) & (rows >= keys.positions()), rows, -1).max(1, initial=-1)


@given(patterns(), st.integers(0, 20), st.integers(0, 20))
@example(Strided(2), 1, 2)
@example(Restrict(Full(), Dilated((1,), (1,), shift=1)), 0, 1)
def test_the_last_query_is_that_of_the_counts(pattern, start, length):
    """For every pattern: no query after it sees the key, and it does; where no end is known, nothing is said too early."""
    keys = Span(start, length)
    try:
        expected = by_counts(pattern, keys, BEYOND)
    except ValueError:
        return  # heads that the pattern is not for
    actual = pattern.last_queries(keys, HEADS)
    assert actual.shape == expected.shape
    exact = actual < BEYOND
    np.testing.assert_array_equal(expected[exact], actual[exact])
    assert (actual >= expected).all()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (Window(3, sinks=1), [FOREVER, 3, 4, 5]),
        (Full(causal=True), [FOREVER] * 4),
        (Dilated((2, 4), (1, 2), causal=True), [2, 1, 3, 3]),
        (Documents((0, 3, 9), Full(causal=True)), [2, 2, 2, 8]),
        (BlockSparse(2, np.array([[1, 0, 0], [0, 1, 0], [1, 0, 1]], bool), causal=True), [5, 5, 3, 3]),
        (Restrict(Full(causal=True), Window(2)), [1, 2, 3, 4]),
        (Window(2) + Window(4), [3, 4, 5, 6]),
        (Dilated((2, 4), (1, 2), causal=True) | Window(2, sinks=1), [FOREVER, 2, 3, 4]),
        (Dilated((2, 4), (1, 2), causal=True) & Window(2), [1, 1, 3, 3]),
        (Restrict(Dilated((2, 4), (1, 2), causal=True), Window(2)), [1, 1, 3, 3]),
        (Documents((0, 3, 9), Full(causal=True)) | Window(2, sinks=1), [8, 2, 3, 8]),
        (Dilated((2, 4), (1, 2), causal=True) & Strided(2), [2, 1, 3, 3]),
    ],
    ids=str,
)
def test_examples(pattern, expected):
    """By hand, of the first four keys, in the first head."""
    actual = np.minimum(pattern.last_queries(Span(0, 4), 1)[0], FOREVER)
    np.testing.assert_array_equal(expected, actual)


def test_heads_differ():
    """Each head has its own."""
    pattern = ByHead(((Span(0, 1), Window(2)), (Span(1, 1), Full(causal=True))))
    actual = np.minimum(pattern.last_queries(Span(5, 2), 2), FOREVER)
    np.testing.assert_array_equal([[6, 7], [FOREVER, FOREVER]], actual)


def test_bad_keys_are_refused():
    """By name."""
    with pytest.raises(ValueError, match="keys must be neighbouring positions, a Span of step 1"):
        Full(causal=True).last_queries(Span(0, 4, 2))
    with pytest.raises(ValueError, match="keys must lie below|queries must lie below"):
        Documents((0, 3), Full(causal=True)).last_queries(Span(0, 4), 1)
