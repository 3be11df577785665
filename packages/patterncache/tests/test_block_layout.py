"""`BlockLayout`: one rule for every length."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longattn.patterncache import BlockLayout, BlockSparse, Dilated, Rectangle, Restrict, Span
from longattn.patterncache.testing import block_layout, check_pattern, rectangles


@given(block_layout(), rectangles())
def test_a_layout_keeps_every_promise_of_a_pattern(layout, rectangle):
    """Plans count what the rule counts, canonical strings read back, causal hides the future, parts add up."""
    check_pattern(layout, rectangle)


@given(block_layout(), rectangles(), st.booleans())
def test_a_dilated_pattern_can_be_restricted_to_a_layout(layout, rectangle, causal):
    """In strides: what the preset for block-sparse rings does."""
    check_pattern(Restrict(Dilated((16, 40), (1, 3), causal=causal), layout), rectangle)


@pytest.mark.parametrize("name", ["dilated_sparse", "local_window", "bigbird"])
def test_a_layout_is_the_block_mask_of_its_length(name):
    """The same plan as BlockSparse with the layout's mask."""
    layout = BlockLayout(name, block_size=8, ratio=0.25, window=8, num_global=3)
    rectangle = Rectangle(2, Span(0, 61), Span(0, 61))
    expected = BlockSparse(8, layout.mask(8, 8)).counts(rectangle)
    np.testing.assert_array_equal(layout.plan(rectangle).counts(), expected)


def test_dilated_sparse_keeps_the_ratio():
    """A tenth of the blocks, the diagonal among them."""
    mask = BlockLayout("dilated_sparse", ratio=0.1).mask(200, 200)
    assert mask.mean() == pytest.approx(0.1) and mask.diagonal().all()


def test_local_window_reaches_as_far_as_it_says():
    """512 positions in blocks of 128 are four blocks to each side."""
    mask = BlockLayout("local_window", window=512).mask(20, 20)
    distance = abs(np.arange(20)[:, None] - np.arange(20))
    np.testing.assert_array_equal(mask, distance <= 4)


def test_bigbird_has_a_window_globals_and_its_share_of_random_blocks():
    """Globals see and are seen; far blocks are drawn with probability `ratio`; another seed draws others."""
    layout = BlockLayout("bigbird", window=128, ratio=0.1, num_global=130)
    mask = layout.mask(300, 300)
    assert mask[:2].all() and mask[:, :2].all() and mask.diagonal().all()
    far = mask[2:, 2:][abs(np.arange(298)[:, None] - np.arange(298)) > 1]
    assert far.mean() == pytest.approx(0.1, abs=0.005)
    other = BlockLayout("bigbird", window=128, ratio=0.1, num_global=130, seed=1).mask(300, 300)
    assert (mask != other).any()
    np.testing.assert_array_equal(layout.mask(50, 60), mask[:50, :60])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"layout": "ring"}, ValueError, "layout must be one of"),
        ({"layout": 3}, TypeError, "layout must be one of"),
        ({"ratio": 0}, ValueError, "ratio must be in (0, 1], got 0"),
        ({"ratio": 1.5}, ValueError, "ratio must be in (0, 1], got 1.5"),
        ({"ratio": float("nan")}, ValueError, "ratio must be in (0, 1], got nan"),
        ({"ratio": "0.1"}, TypeError, "ratio must be a number"),
        ({"block_size": 0}, ValueError, "block_size must be an integer >= 1, got 0"),
        ({"window": -1}, ValueError, "window must be an integer >= 0, got -1"),
        ({"num_global": 1.5}, TypeError, "num_global must be an integer"),
        ({"seed": True}, TypeError, "seed must be an integer"),
        ({"causal": 1}, TypeError, "causal"),
    ],
)
def test_a_bad_value_is_named(options, error, words):
    """The message names the parameter, what was expected and what came."""
    with pytest.raises(error, match=re.escape(words)):
        BlockLayout(**options)
