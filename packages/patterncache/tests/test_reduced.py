"""Maps of many tokens in few cells."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longattn.patterncache import Dilated, Full, Window
from longattn.patterncache.analysis.reduced import reduced_counts


@given(
    length=st.integers(1, 90),
    cells=st.integers(1, 40),
    causal=st.booleans(),
    pattern=st.sampled_from([Dilated((8, 16), (1, 2)), Window(5, sinks=2), Full()]),
)
def test_a_cell_is_the_mean_of_the_pairs_that_it_samples(length, cells, causal, pattern):
    """Every cell, beside the dense counts at the same positions."""
    pattern = pattern.with_causal(causal)
    found = reduced_counts(pattern, length, 4, head=1, cells=cells)
    cells = min(cells, length)
    run = min(length // cells, 16)
    dense = pattern.to_dense(length, 4)[1]
    rows = np.add.outer(np.arange(cells) * length // cells, np.arange(run))
    expected = dense[rows[:, None, :, None], rows[None, :, None, :]].mean(axis=(2, 3))
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"length": 0}, "length must be"),
        ({"head": 4}, "head must be below num_heads=4, got 4"),
        ({"cells": 0}, "cells must be"),
    ],
)
def test_a_bad_argument_is_named(changed, words):
    """The parameter, and what came."""
    arguments = {"length": 8, "num_heads": 4, "head": 0, "cells": 4} | changed
    with pytest.raises(ValueError, match=words):
        reduced_counts(Full(), **arguments)
