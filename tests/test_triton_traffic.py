"""Bytes and operations of the Triton kernels, counted from plans, and the page that shows them."""

from longattn.kernels.triton.configurations import choose
from longattn.patterncache import Dilated, Full, Rectangle, Span
from tests.workspace import ROOT
from tools.triton_traffic import forward_traffic, keys_traffic, queries_traffic, traffic_rows

PAGE = ROOT / "docs" / "memory-hierarchy.md"


def test_dense_counts_are_what_one_can_count_by_hand():
    """q and out once, k and v once for each block of queries, four times pairs times head_dim."""
    plan = Full().plan(Rectangle(2, Span(0, 1024), Span(0, 1024)))
    tile, _ = choose("forward", "sm_90", 64, 2)
    found = forward_traffic(plan, "sm_90", 64, 2)
    blocks = 1024 // tile.owned
    tables = found.loaded - 2 * 1024 * 64 * 2 - 2 * blocks * 2 * 1024 * 64 * 2
    assert 0 < tables == 2 * blocks * (4 * 10 + 36)
    assert found.stored == 2 * 1024 * (64 * 2 + 4)
    assert found.flops == found.useful == 4 * 2 * 1024 * 1024 * 64


def test_backward_counts():
    """Five products fast, seven deterministic; only the fast way adds."""
    plan = Full().plan(Rectangle(2, Span(0, 512), Span(0, 512)))
    fast, fixed = (keys_traffic(plan, "sm_90", 64, 2, fast=way) for way in (True, False))
    queries = queries_traffic(plan, "sm_90", 64, 2)
    assert fast.flops == 10 * 2 * 512 * 512 * 64 and fixed.flops + queries.flops == 14 * 2 * 512 * 512 * 64
    assert fast.added > 0 == fixed.added == queries.added


def test_chunks_are_read_again():
    """Where head_dim goes in chunks, owned rows are read for every tile that they meet."""
    plan = Full().plan(Rectangle(1, Span(0, 256), Span(0, 256)))
    tile, _ = choose("backward_keys", "sm_80", 256, 2)
    assert tile.chunk and 256 % tile.owned == 256 % tile.streamed == 0
    owned, met = 256 * (256 // tile.streamed), 256 * (256 // tile.owned)
    found = [keys_traffic(plan, "sm_80", 256, 2, fast=way).loaded for way in (True, False)]
    assert found[0] - found[1] == owned * 256 * 2
    tables = found[1] - (2 * owned + 4 * met) * 256 * 2 - 2 * 4 * met
    assert 0 < tables < 4096


def test_unique_keys_issue_less_than_branches_mean():
    """LongNet in one launch does not multiply twice what two branches both see."""
    plan = Dilated((2048, 4096, 8192), (1, 2, 4)).plan(Rectangle(4, Span(0, 8192), Span(0, 8192)))
    found = forward_traffic(plan, "sm_90", 64, 2)
    assert 0.8 < found.flops / found.useful < 0.9


def test_the_page_shows_what_is_counted():
    """The table of the page is written by the code that counts."""
    shown = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.count("|") == 9]
    assert shown[2:] == traffic_rows()
