"""From a plan to jobs: the same counts, no row written twice at a time, and nothing outside the rectangle."""

from collections import Counter
from dataclasses import replace
from math import lcm

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from longattn.kernels.native.lowering import Job, Lowered, RowSet, lower, query_rows
from longattn.kernels.native.progressions import PeriodicRows, Progression, multiset, period_of, rows_of
from longattn.kernels.native.structures import PackedJobs
from longattn.patterncache import Branch, Dilated, Full, Plan, Rectangle, Restrict, Span, Strided, Window
from longattn.patterncache.indices import Affine, Listed
from longattn.patterncache.testing import patterns, spans

LONGNET = Dilated((8, 16, 32), (1, 2, 4))
ROWS = st.builds(Progression, st.integers(0, 40), st.integers(1, 12), st.integers(1, 20))


def members(p: Progression) -> list[int]:
    return list(range(p.start, p.last + 1, p.step))


def tile_rows(rows: RowSet, tile: int) -> np.ndarray:
    return rows_of(rows.index) if isinstance(rows.index, PeriodicRows) else rows.index.rows()[tile]


def times(rows: RowSet) -> np.ndarray | int:
    if not isinstance(rows.index, PeriodicRows):
        return 1
    return np.array(rows.index.times)[np.arange(rows.index.count) % len(rows.index.times)]


def counts(lowered: Lowered, plan: Plan) -> np.ndarray:
    """What the jobs say, pair by pair."""
    total = np.zeros(plan.rectangle.shape, np.int64)
    for job in (job for phase in lowered.phases for job in phase):
        for tile in range(job.tiles):
            q = tile_rows(job.queries, tile)
            for keys in job.keys:
                k = tile_rows(keys, tile)
                distance = (job.queries.at[0] + job.queries.at[1] * q)[:, None] - (keys.at[0] + keys.at[1] * k)
                seen = keys.band.sees(distance) * times(keys)
                np.add.at(total, (job.heads.positions()[:, None, None], q[None, :, None], k[None, None]), seen[None])
    return total


@given(st.lists(ROWS, min_size=1, max_size=5))
@example([Progression(1, 2, 3), Progression(0, 1, 8), Progression(3, 4, 2)])
def test_a_multiset_holds_every_row_as_often_as_it_stands_there(progressions: list[Progression]):
    """Each row once, in ascending order within a piece, with its multiplicity."""
    found: Counter[int] = Counter()
    for piece in multiset(progressions):
        rows = rows_of(piece).tolist()
        assert rows == sorted(rows) and len(rows) == piece.count
        assert not found.keys() & set(rows)
        found.update({row: piece.times[i % len(piece.times)] for i, row in enumerate(rows)})
    assert found == Counter(row for p in progressions for row in members(p))
    assert period_of(progressions) == lcm(*(p.step for p in progressions))


@given(
    patterns(), st.integers(1, 5), st.lists(spans(), min_size=1, max_size=2), st.lists(spans(), min_size=1, max_size=2)
)
@example(LONGNET, 4, [Span(0, 70)], [Span(0, 70)])
@example(LONGNET.with_causal(True), 3, [Span(5, 9, 3), Span(1, 4)], [Span(0, 40)])
@example(Window(5, sinks=2), 2, [Span(0, 20)], [Span(0, 20)])
def test_jobs_say_what_the_plan_says(pattern, heads: int, queries: list[Span], keys: list[Span]):
    """Integer equality, as between plan and pattern."""
    plan = pattern.plan(Rectangle(heads, tuple(queries), tuple(keys)))
    assert np.array_equal(counts(lower(plan), plan), plan.counts())


@given(patterns(), spans(), spans())
@example(Restrict(Restrict(Window(9), Dilated((4,), (2,))), Strided(4)) + LONGNET, Span(0, 40), Span(0, 40))
@example(Restrict(Restrict(Window(9), Dilated((4,), (2,))), Strided(4)) + Full(), Span(0, 20), Span(0, 20))
def test_jobs_of_a_phase_share_no_row(pattern, queries: Span, keys: Span):
    """Threads may take them in any order; a job is fresh where nobody wrote before, and `complete` says that everybody did."""
    plan = pattern.plan(Rectangle(4, queries, keys))
    lowered = lower(plan)
    written = np.zeros(plan.rectangle.shape[:2], bool)
    complete = True
    for phase in lowered.phases:
        now = np.zeros_like(written)
        for job in phase:
            at = np.ix_(job.heads.positions(), query_rows(job))
            assert len(set(query_rows(job).tolist())) == len(query_rows(job)) and not now[at].any()
            assert job.fresh == (not written[at].any())
            complete &= job.fresh or bool(written[at].all())
            now[at] = True
        written |= now
    assert lowered.complete == (complete and bool(written.all()))


def test_row_classes_have_fewer_pairs_than_branches():
    """Keys of LongNet's branches overlap: one softmax over unique keys has a fifth fewer."""
    plan = Dilated((2048, 4096, 8192), (1, 2, 4)).plan(Rectangle(8, Span(0, 8192), Span(0, 8192)))
    (jobs,) = lower(plan).phases
    pairs = sum(
        job.heads.length * job.tiles * job.queries.index.count * sum(keys.index.count for keys in job.keys)
        for job in jobs
    )
    assert pairs / sum(b.pairs * b.heads.length for b in plan.branches) == pytest.approx(0.786, abs=0.001)
    assert lower(plan) is lower(plan)


BAD = {
    "queries": Branch(Span(0, 1), Affine(5, 1, 0, 4, 1), Affine(0, 1, 0, 8, 1)),
    "keys": Branch(Span(0, 1), Affine(0, 1, 0, 8, 1), Affine(3, 2, 4, 4, 1)),
    "listed keys": Branch(Span(0, 1), Affine(0, 1, 0, 8, 1), Listed(np.array([[0, 6]]), 3, 1)),
    "negative keys": Branch(Span(0, 1), Affine(0, 1, 0, 8, 1), Listed(np.array([[-1]]), 3, 1)),
    "heads": Branch(Span(1, 2), Affine(0, 1, 0, 8, 1), Affine(0, 1, 0, 8, 1)),
    "tiles of keys": Branch(Span(0, 1), Affine(0, 2, 4, 4, 1), Affine(0, 1, 0, 8, 1)),
    "query row in two tiles": Branch(Span(0, 1), Listed(np.array([[0], [2]]), 4, 1), Affine(0, 2, 0, 8, 1)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_plan_that_leaves_its_rectangle_is_refused(name: str):
    """Whoever writes a pattern may get its plan wrong: that is an error, and no address."""
    plan = Plan(Rectangle(2, Span(0, 8), Span(0, 8)), (BAD[name],))
    with pytest.raises(ValueError, match=r"a plan's (queries|keys|heads|branch) must|query row in two tiles"):
        lower(plan)


def test_a_position_beyond_what_64_bits_can_add_is_refused():
    """Row times step is computed in 64 bits on the other side."""
    job = Job(Span(0, 1), 1, RowSet(Affine(0, 1, 0, 2, 1), (1 << 61, 1)), ())
    with pytest.raises(ValueError, match="positions must lie below"):
        PackedJobs((job,), group=1)
    PackedJobs((replace(job, queries=RowSet(Affine(0, 1, 0, 2, 1), (5, 1))),), group=1)


def test_many_tiles_are_left_to_their_branches():
    """Beyond some thousand tiles, or periods, nobody looks for row classes: branches merge one after the other."""
    long = Dilated((2, 4), (1, 2)).plan(Rectangle(1, Span(0, 20_000), Span(0, 20_000)))
    assert len(lower(long).phases) == 2
    rates = Dilated((100_000, 100_000, 100_000), (97, 89, 83)).plan(Rectangle(1, Span(0, 9000), Span(0, 9000)))
    assert sum(map(len, lower(rates).phases)) == 3
    whole = Full().plan(Rectangle(2, Span(0, 9), Span(0, 9)))
    assert [[job.tiles for job in phase] for phase in lower(whole).phases] == [[1]]
