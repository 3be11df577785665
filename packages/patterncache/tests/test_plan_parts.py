"""What plans are made of, each against its meaning written out pair by pair: bands, spans, indices, branches."""

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from longattn.patterncache import Affine, Band, Branch, Listed, Pattern, Rectangle, Span
from longattn.patterncache.indices import index_of
from longattn.patterncache.planning.intervals import Intervals, lands
from longattn.patterncache.spans import congruent_indices
from longattn.patterncache.testing import patterns, rectangles, spans

BOUND = st.none() | st.integers(-9, 9)
BANDS = st.builds(Band, BOUND, BOUND)


@st.composite
def branches(draw: st.DrawFn) -> Branch:
    """One or several tiles of strided rows within a band; tiles may differ in geometry."""
    tiles = draw(st.integers(1, 3))

    def side() -> Affine:
        return Affine(
            draw(st.integers(0, 5)),
            tiles,
            draw(st.integers(0, 6)) if tiles > 1 else 0,
            draw(st.integers(1, 7)),
            draw(st.integers(1, 3)),
        )

    at = st.tuples(st.integers(0, 9), st.integers(1, 3))
    return Branch(Span(0, 1), side(), side(), draw(at), draw(at), draw(st.none() | BANDS))


def shown(branch: Branch) -> np.ndarray:
    """(tiles, q count, k count) bool, from positions."""
    q, k = branch.positions()
    distance = q[:, :, None] - k[:, None, :]
    band = branch.band or Band()
    low = -np.inf if band.low is None else band.low
    high = np.inf if band.high is None else band.high
    return (low <= distance) & (distance <= high)


@given(patterns(), rectangles())
def test_no_branch_of_a_plan_is_there_for_nothing(pattern: Pattern, rectangle: Rectangle):
    """Each shows a pair, and a band hides one."""
    for branch in pattern.plan(rectangle).branches:
        assert shown(branch).any() and (branch.band is None or not shown(branch).all())


@given(BANDS, BANDS, st.integers(-12, 12), st.integers(0, 8))
@example(Band(3, 3), Band(), 3, 0)
@example(Band(4, 2), Band(), 3, 0)
def test_a_band_covers_and_misses_what_it_says(band: Band, other: Band, nearest: int, length: int):
    """Of every distance between two; two bands together show what both do."""
    distance = np.arange(nearest, nearest + length + 1)
    assert band.covers(nearest, nearest + length) == band.sees(distance).all()
    assert band.misses(nearest, nearest + length) == (not band.sees(distance).any())
    np.testing.assert_array_equal((band & other).sees(distance), band.sees(distance) & other.sees(distance))


@given(spans(), st.integers(0, 9), st.integers(1, 9), st.integers(0, 60), st.integers(0, 60))
def test_members_of_a_residue_in_a_window(span: Span, residue: int, modulus: int, low: int, high: int):
    """By index, in order, whatever the steps."""
    first, count, step = congruent_indices(span, np.array([low]), np.array([high]), np.array([residue]), modulus)
    found = first[0] + step * np.arange(count[0])
    positions = span.positions()
    expected = (positions % modulus == residue % modulus) & (positions >= low) & (positions < high)
    np.testing.assert_array_equal(found, np.flatnonzero(expected))
    first_of_all, number, step = span.congruent(residue, modulus)
    np.testing.assert_array_equal(
        first_of_all + step * np.arange(number), np.flatnonzero(positions % modulus == residue % modulus)
    )
    if number:
        taken = span.take(first_of_all, number, step)
        np.testing.assert_array_equal(taken.positions(), positions[positions % modulus == residue % modulus])
        assert taken.last == taken.positions()[-1]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(1, 5), st.integers(1, 4))
def test_tiles_are_affine_where_they_are_evenly_spaced(starts: list[int], count: int, step: int):
    """Forwards; and are the same rows in either form."""
    index = index_of(np.array(starts), count, step)
    np.testing.assert_array_equal(index.rows(), np.array(starts)[:, None] + step * np.arange(count))
    spacing = np.diff(starts)
    assert isinstance(index, Affine) == (len(set(spacing)) <= 1 and not (spacing < 0).any())
    rows = index.rows()
    alone = len(np.unique(rows)) == rows.size
    # Affine ones are judged by their strides: never wrongly said to be distinct.
    assert alone or not index.distinct
    assert index.distinct or not alone or isinstance(index, Affine)
    for first in range(len(starts)):
        np.testing.assert_array_equal(index.tile_range(first, len(starts) - first).rows(), rows[first:])


@pytest.mark.parametrize(
    ("index", "distinct"),
    [
        (Affine(0, 3, 5, 3, 2), True),  # one after the other: 0 2 4, 5 7 9
        (Affine(0, 3, 4, 3, 2), False),  # the last of one is the first of the next
        (Affine(0, 3, 1, 4, 3), True),  # woven: 0 3 6, 1 4 7, 2 5 8
        (Affine(0, 4, 1, 4, 3), False),
        (Affine(0, 2, 0, 1, 1), False),
        (Affine(0, 1, 0, 4, 1), True),
        (Affine(0, 3, 0, 0, 1), True),
        (Listed(np.array([[0, 4], [2, 6]]), 2, 1), True),
        (Listed(np.array([[0, 4], [3, 6]]), 2, 1), False),
    ],
)
def test_whether_a_row_stands_in_two_tiles(index: Affine | Listed, distinct: bool):
    """Tiles that follow one another or interleave share no row."""
    assert index.distinct is distinct


def test_pairs_of_a_billion_rows():
    """By a closed form: no array of rows is made."""
    many = 1 << 30
    rows = Affine(0, 1, 0, many, 1)
    assert Branch(Span(0, 1), rows, rows, band=Band(0, None)).pairs == many * (many + 1) // 2
    assert Branch(Span(0, 1), rows, rows, band=Band(0, 99)).pairs == 100 * many - 99 * 100 // 2
    # Every third query, every second key: query i sees floor(3 i / 2) + 1 of them.
    queries, half = many // 3, many // 3 // 2
    thirds, seconds = Affine(0, 1, 0, queries, 3), Affine(0, 1, 0, many // 2, 2)
    assert Branch(Span(0, 1), thirds, seconds, band=Band(0, None)).pairs == 3 * half**2 + half + queries


@given(branches())
def test_a_branch_is_what_its_positions_say(branch: Branch):
    """Visible pairs, how many, which rows see a key, and up to where; whether it is one geometry, and a triangle."""
    q, k = branch.positions()
    pairs = shown(branch)
    visible = np.ones_like(pairs) if branch.visible is None else np.broadcast_to(branch.visible, pairs.shape)
    np.testing.assert_array_equal(visible, pairs)
    assert branch.pairs == pairs.sum()
    offsets = q[:, 0] - k[:, 0]
    assert branch.uniform == (len(set(offsets)) == 1)
    triangle = branch.band is not None and branch.uniform and branch.band.high is None and branch.band.low is not None
    if branch.uniform:
        assert branch.offset == offsets[0]
        np.testing.assert_array_equal(branch.seeing, pairs[0].any(axis=1))
    if branch.band is not None and branch.uniform:
        begin, end = branch.key_range()
        row = np.arange(branch.k.count)
        np.testing.assert_array_equal((begin[:, None] <= row) & (row <= end[:, None]), pairs[0])
        distances = q[0][:, None] - k[0]
        if not branch.band.misses(distances.min(), distances.max()):
            assert lands(branch, branch.band) == pairs.any()
    if branch.triangle:
        assert triangle
        np.testing.assert_array_equal(pairs[0], np.tri(branch.q.count, dtype=bool))
    elif triangle and branch.q.count == branch.k.count > 1 and branch.steps[0] == branch.steps[1]:
        assert not np.array_equal(pairs[0], np.tri(branch.q.count, dtype=bool))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(1, 9), spans(), spans())
def test_intervals_cut_and_met(borders: list[int], size: int, queries: Span, keys: Span):
    """Between borders; cut into parts of a size from each start on; only those that both sides reach."""
    whole = Intervals.between(np.sort(np.array(borders)))
    held = [i for low, high in zip(whole.low, whole.high, strict=True) for i in range(low, high)]
    assert held == list(range(min(borders), max(borders))) and (whole.high > whole.low).all()
    low, high = whole.segments(size)
    assert [i for a, b in zip(low, high, strict=True) for i in range(a, b)] == held
    starts = np.array([whole.low[whole.low <= a].max() for a in low])
    assert ((high - low <= size) & (high > low) & ((low - starts) % size == 0)).all()
    assert set(high[(high - low) < size]) <= set(whole.high)
    assume(queries.length and keys.length)
    begin, end = max(queries.start, keys.start), min(queries.last, keys.last)
    met = whole.meeting(((queries, 0), (keys, 0)))
    expected = [
        (a, b)
        for a, b in zip(whole.low, whole.high, strict=True)
        if begin <= end and any(begin <= i <= end for i in range(a, b))
    ]
    found = list(zip(met.low, met.high, strict=True))
    assert set(expected) <= set(found) and (begin > end or found == expected)
