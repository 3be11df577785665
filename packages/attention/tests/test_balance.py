"""Borders of shards that share out the pairs of any pattern."""

import pytest
import torch

from longattn.attention import balanced_lengths
from longattn.attention.schedules.balance import pairs_of
from longattn.attention.schedules.traffic import ScheduledCall, ring_traffic
from longattn.patterncache import BlockSparse, Dilated, Documents, Full, Strided, Window

N, HEADS = 2048, 4
BLOCKS = torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) < 0.3
PATTERNS = {
    "full causal": Full(causal=True),
    "window": Window(100, causal=True),
    "dilated": Dilated((256, 1024, 2048), (1, 2, 4), causal=True),
    "dilated, split heads": Dilated((256, 1024), (1, 4), "split", causal=True),
    "documents": Documents((0, 7, 900, 1000, N), Full(causal=True)),
    "block sparse": BlockSparse(64, BLOCKS.tril().numpy()),
    "strided": Strided(64, causal=True),
}


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("name", PATTERNS)
def test_the_slowest_rank_has_hardly_more_than_the_mean(name, ranks):
    """At most 1.05 times, by the plans of the ring's own rectangles; and all rows are on some rank."""
    lengths = balanced_lengths(PATTERNS[name], N, ranks, HEADS)
    traffic = ring_traffic(ScheduledCall(PATTERNS[name], N, ranks, HEADS, HEADS), lengths=lengths)
    assert (sum(lengths), len(lengths)) == (N, ranks)
    assert traffic.imbalance <= 1.05, (lengths, traffic.work)
    assert sum(traffic.work) == pairs_of(PATTERNS[name], 0, N, N, HEADS)


def test_rows_are_shared_out_where_nobody_sees_anything():
    """No pair at all: even shards."""
    assert balanced_lengths(BlockSparse(4, torch.zeros(4, 4).bool().numpy()), 16, 4, 2) == (4, 4, 4, 4)


def test_what_the_docstring_shows():
    """Causal: half of the rows have a quarter of the pairs."""
    assert balanced_lengths(Full(causal=True), 4096, 4, num_heads=8) == (2048, 848, 651, 549)


@pytest.mark.parametrize("given", [{"length": 0}, {"ranks": 0}, {"num_heads": 0}])
def test_sizes_are_positive(given):
    """Named where they are not."""
    with pytest.raises(ValueError, match=f"{next(iter(given))} must be"):
        balanced_lengths(Full(), **({"length": 8, "ranks": 2, "num_heads": 2} | given))
