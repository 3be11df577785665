"""What all rows that lower a plan share: the order in which query rows are written, and heads that are served alike."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from longattn.kernels.eager.tile_walk import source_branches, writes
from longattn.kernels.lowering.head_classes import head_classes
from longattn.kernels.lowering.write_order import WriteOrder
from longattn.kernels.triton.passes import query_passes
from longattn.patterncache import Dilated, Full, Pattern, Rectangle, Span, Window
from longattn.patterncache.testing import patterns, spans

LONGNET = Dilated((8, 16, 32), (1, 2, 4))


@given(patterns(), spans(), spans())
@example(LONGNET, Span(0, 70), Span(0, 70))
@example(LONGNET.with_causal(True), Span(3, 40), Span(0, 64))
@example(Window(3, causal=True), Span(0, 20), Span(30, 9))
@pytest.mark.parametrize("triangles", [False, True])
def test_who_writes_first_is_as_row_by_row(triangles: bool, pattern: Pattern, queries: Span, keys: Span):
    """A branch is fresh where nobody wrote before, and complete says that memory need not be filled: each row on its own."""
    plan = pattern.plan(Rectangle(3, queries, keys))
    written: set[tuple[int, int]] = set()
    fresh, complete = [], True
    for branch in source_branches(plan, triangles):
        rows = branch.q.rows()
        mine = {(int(h), int(row)) for h in branch.heads.positions() for row in rows.reshape(-1)}
        fresh.append(not mine & written)
        complete &= fresh[-1] or mine <= written
        seeing = np.broadcast_to(branch.seeing, rows.shape)
        written |= {(int(h), int(row)) for h in branch.heads.positions() for row in rows[seeing]}
    assert writes(plan, triangles) == (tuple(fresh), complete and len(written) == 3 * queries.length)


@given(patterns(), spans(), spans())
@example(LONGNET.with_causal(True), Span(0, 40), Span(0, 40))
def test_branches_that_share_a_row_keep_their_order(pattern: Pattern, queries: Span, keys: Span):
    """They stand in different launches, the earlier one first, unless one launch takes all."""
    plan = pattern.plan(Rectangle(3, queries, keys))
    launches = query_passes(plan).launches
    number = {id(branch): at for at, launch in enumerate(launches) for branch in launch.branches}
    assert len(number) == len(plan.branches) and [launch.fresh for launch in launches][1:] == [False] * (
        len(launches) - 1
    )
    if len(launches) > 1:
        rows = [{(h, r) for h in b.heads.positions() for r in b.q.rows().reshape(-1)} for b in plan.branches]
        pairs = [(a, b) for b in range(len(rows)) for a in range(b) if rows[a] & rows[b]]
        assert all(number[id(plan.branches[a])] < number[id(plan.branches[b])] for a, b in pairs)


def test_many_phases_are_counted():
    """More phases than fit in a byte."""
    plan = Full().plan(Rectangle(1, Span(0, 4), Span(0, 4)))
    order = WriteOrder(plan, 300)
    at = (np.array([[0]]), np.arange(4))
    assert [order.write(at) for _ in range(300)] == list(range(300))
    assert order.phase(at) == 300 and order.complete


def test_a_writer_that_merges_into_nothing_is_noticed():
    """The second writer's last row was never written."""
    order = WriteOrder(Full().plan(Rectangle(1, Span(0, 4), Span(0, 4))), 2)
    assert 0 == order.write((np.array([[0]]), np.arange(3)))
    assert 1 == order.write((np.array([[0]]), np.arange(4)))
    assert not order.complete


@given(patterns(), st.sampled_from([1, 2, 3, 4]), st.integers(1, 12))
@example(LONGNET, 2, 8)
def test_heads_of_a_class_are_served_alike(pattern: Pattern, members: int, heads: int):
    """Every owner that is served stands in one class, with the branches of each of its heads in the plan's order."""
    plan = pattern.plan(Rectangle(heads, Span(0, 40), Span(0, 40)))
    found = head_classes(heads, plan.branches, members)
    served = {}
    for owner in range(heads // members):
        own = [(m, id(b)) for m in range(members) for b in plan.branches if owner * members + m in b.heads.positions()]
        if own:
            served[owner] = own
    assert served == {owner: [(m, id(b)) for m, b in alike.branches] for alike in found for owner in alike.owners}
    assert len({tuple((m, id(b)) for m, b in alike.branches) for alike in found}) == len(found)
    assert sorted(served) == sorted(owner for alike in found for owner in alike.owners)
