"""Where a call's rows stand, and what ranks say of their masks, without processes."""

import pytest
import torch

from longattn.attention import Local, MultiheadPatternAttention, Ring
from longattn.attention.schedules.base import Schedule
from longattn.attention.schedules.extents import (
    BIAS,
    BY_ELEMENT,
    BY_HEAD,
    CONFLICT,
    HAS_ROWS,
    MASK,
    ONE_FOR_ALL,
    PADDING,
    Extents,
    agreed_flags,
    mask_flags,
    mask_has_rows,
    row_numbers,
)
from longattn.attention.schedules.passes import ScheduleRun
from longattn.patterncache import Full, Span

ROWS, ONE = torch.ones(1, 2, 5, 7, dtype=torch.bool), torch.ones(1, 2, 1, 7, dtype=torch.bool)


@pytest.mark.parametrize("schedule", [Local(), Ring(size=3, layout="zigzag")])
def test_one_process_holds_the_whole(schedule):
    """Queries are the last of the keys' positions, or begin where they are said to."""
    extents = schedule.extents(5, 13, None)
    assert extents == Extents.of_whole(5, 13)
    assert (extents.query_spans(), extents.query_spans(2)) == ((Span(8, 5),), (Span(2, 5),))
    assert schedule.extents(5, 3, None).query_spans() == extents.query_spans(0) == (Span(0, 5),)


def test_rows_of_a_part():
    """Positions follow the rows that are here, in their order."""
    part = Extents(10, 12, (Span(1, 2), Span(7, 2)), (Span(0, 4, 3),))
    assert part.query_spans() == (Span(3, 2), Span(9, 2))
    assert row_numbers(part.q_rows).tolist() == [1, 2, 7, 8]
    assert row_numbers(part.k_rows).tolist() == [0, 3, 6, 9]


@pytest.mark.parametrize(
    ("masks", "has_rows"),
    [
        ([(ROWS, 5), (ROWS[:, :, :1], 1)], True),
        ([(ROWS[:, :, :1], 1), (ROWS[:, :, :1], 1)], True),
        ([(ROWS[:, :, :1], 1), (ROWS[:, :, :0], 0)], True),
        ([(ONE, 5), (ONE, 1)], False),
        ([(ONE, 1), (ONE, 0)], False),
        ([(torch.ones(7), 5), (torch.ones(7), 1)], False),
        ([(None, 5), (None, 1)], False),
    ],
)
def test_a_mask_has_rows_where_the_whole_has(masks, has_rows):
    """One row on one rank says nothing by itself."""
    found = agreed_flags([mask_flags(None, mask, nq) for mask, nq in masks])
    assert mask_has_rows(found) == has_rows
    assert not found & PADDING


def test_groups_decide_together():
    """Of a mesh: a group in which all have one row learns from another what its rows are."""
    unsure = agreed_flags([mask_flags(None, ONE, 1), mask_flags(None, ONE, 1)])
    sure = agreed_flags([mask_flags(None, ONE, 2), mask_flags(None, ONE, 1)])
    assert mask_has_rows(unsure) and not mask_has_rows(sure)
    assert not mask_has_rows(agreed_flags([unsure, sure]))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([mask_flags(ROWS[:, 0, 0], None, 5), 0], "key_padding_mask must be given on every rank or on none"),
        ([mask_flags(None, ROWS, 5), 0], "attention_mask must be given on every rank or on none"),
        ([mask_flags(None, ROWS, 5), mask_flags(None, ROWS.float(), 5)], "attention_mask must be bool on every rank"),
        (
            [mask_flags(None, ROWS, 5), mask_flags(None, ROWS[:, :1], 5)],
            "attention_mask must have entries for each head",
        ),
        ([mask_flags(None, ROWS.expand(2, -1, -1, -1), 5), mask_flags(None, ROWS, 5)], "for each batch element"),
        ([mask_flags(None, ROWS, 5), CONFLICT], "must be of one kind on every rank, got others elsewhere"),
        (
            [mask_flags(None, ROWS, 5), mask_flags(None, ONE, 5)],
            "attention_mask must have this rank's rows on every rank",
        ),
    ],
)
def test_masks_of_different_kinds_are_refused(flags, words):
    """By every rank, for all see the same flags."""
    for seen in (flags, flags[::-1]):
        with pytest.raises(ValueError, match=words):
            agreed_flags(seen)


def test_flags_are_bits():
    """A floating mask of one row for five queries."""
    assert mask_flags(None, torch.zeros(7), 5) & (BIAS | ONE_FOR_ALL) == BIAS | ONE_FOR_ALL


@pytest.mark.parametrize(
    ("shape", "flags"),
    [((1, 1), 0), ((2, 1), BY_ELEMENT), ((3, 1), BY_ELEMENT), ((1, 2), BY_HEAD), ((2, 2), BY_ELEMENT | BY_HEAD)],
)
def test_a_mask_of_heads_or_of_batch_elements_says_so(shape: tuple[int, int], flags: int):
    """(batch, heads) of a bool mask with rows."""
    assert mask_flags(None, torch.ones(*shape, 5, 7, dtype=torch.bool), 5) == MASK | HAS_ROWS | flags


def test_gradients_of_a_schedule_that_says_nothing_are_added_up():
    """In float32, until they are whole: what `AllGather` counts on."""
    assert ScheduleRun.in_parts


class Elsewhere(Schedule, name="elsewhere"):
    """Over processes, and silent about where their rows stand."""

    distributed = True  # type: ignore[assignment]

    def start(self, work):
        """Never reached."""
        raise AssertionError

    def to_spec(self):
        """Nothing."""
        return {}

    @classmethod
    def from_spec(cls, spec):
        """Itself."""
        return cls()


def test_a_schedule_of_ones_own_must_say_where_rows_stand():
    """Rather than rotary positions of another sequence."""
    module = MultiheadPatternAttention(16, 2, Full(), rotary_base=10.0, schedule=Elsewhere())
    with pytest.raises(NotImplementedError, match=r"Elsewhere must define extents\(\)"):
        module(torch.randn(1, 4, 16))
    with pytest.raises(NotImplementedError, match=r"Elsewhere must define gather_keys\(\)"):
        Elsewhere().gather_keys(torch.ones(1, 2), 1, 2, None)
