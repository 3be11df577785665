"""The simulation of engines: its counts are those of the plans, and its times follow from them."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longattn.attention.schedules.layouts import LAYOUTS
from longattn.attention.schedules.simulation import ENGINES, Hardware, _steps, simulate
from longattn.attention.schedules.traffic import ScheduledCall, full_ring_bytes, ring_traffic, ulysses_traffic
from longattn.patterncache import Dilated, Full, Window

PATTERNS = (Full(causal=True), Full(), Window(9), Dilated((8, 32, 128), (1, 2, 4), causal=True))
AT = Hardware(flops=1e9, bandwidth=math.inf, link=math.inf, latency=0.0, launch=0.0)


def call_of(pattern, ranks=4, length=128, kv_heads=4):
    return ScheduledCall(pattern, length, ranks, 8, kv_heads, 16, dtype=torch.float32)


@given(st.sampled_from(PATTERNS), st.integers(1, 8), st.sampled_from(sorted(LAYOUTS)))
def test_steps_count_what_the_traffic_counts(pattern, ranks, layout):
    """Pairs of each rank, and the bytes that all of them receive in a forward."""
    call = call_of(pattern, ranks)
    steps = [_steps(call, layout, reader) for reader in range(ranks)]
    counted = ring_traffic(call, layout)
    assert tuple(sum(step.pairs for step in some) for some in steps) == counted.work
    assert sum(step.sent for some in steps for step in some) * call.width * 4 == counted.forward


def test_products_alone_take_what_they_take():
    """Where links and memory are infinitely fast: FLOP over FLOP a second, of the slowest rank; five products for two backward."""
    call = call_of(Full(causal=True))
    slowest = max(ring_traffic(call).work) * 2 * call.width / AT.flops
    assert simulate(call, "ring contiguous", AT, backward=False).seconds == pytest.approx(slowest)
    assert simulate(call, "ring contiguous", AT, backward=True).seconds == pytest.approx(3.5 * slowest)
    even = simulate(call, "ring zigzag", AT, backward=False).seconds
    assert even == pytest.approx(sum(ring_traffic(call).work) / 4 * 2 * call.width / AT.flops)


def test_cores_that_are_shared_are_never_idle():
    """Four ranks on two cores: an even pass takes twice as long, an uneven one no longer than its work or its slowest rank."""
    shared = replace(AT, load=2.0)
    call = call_of(Full(causal=True))
    even = [simulate(call, "ring zigzag", at, backward=False).seconds for at in (AT, shared)]
    assert even[1] == pytest.approx(2 * even[0])
    uneven = [simulate(call, "ring contiguous", at, backward=False).seconds for at in (AT, shared)]
    assert uneven[1] == pytest.approx(max(uneven[0], 2 * even[0]))


@pytest.mark.parametrize("engine", ENGINES)
def test_slower_hardware_is_never_faster(engine):
    call, at = call_of(Full(causal=True)), Hardware(1e9, 1e9, 1e6, 1e-3, 1e-3)
    first = simulate(call, engine, at, backward=True)
    for change in ({"flops": 1e8}, {"bandwidth": 1e6}, {"link": 1e4}, {"latency": 1.0}, {"launch": 1.0}, {"load": 3.0}):
        assert simulate(call, engine, replace(at, **change), backward=True).seconds > first.seconds


def test_only_rings_hide_what_travels():
    """A link as slow as the products: a ring takes less than both together, the others take both."""
    call, at = call_of(Full()), replace(AT, link=2e6)
    for engine in ENGINES:
        found = simulate(call, engine, at, backward=False)
        together = found.compute + found.transfer
        assert found.seconds < together if engine.startswith("ring") else found.seconds == pytest.approx(together)


def test_one_rank_receives_nothing():
    for engine in ENGINES:
        found = simulate(call_of(PATTERNS[3], ranks=1), engine, AT, backward=True)
        assert (found.transfer, found.received) == (0.0, 0) and found.seconds > 0


def test_received_bytes_are_those_of_the_engines():
    """All-gather: all other shards; Ulysses: a rank's part of all that change places."""
    call = call_of(Full())
    gathered = simulate(call, "all_gather", AT, backward=False)
    assert gathered.received == full_ring_bytes(call) // call.ranks
    ulysses = ulysses_traffic(call)
    assert ulysses is not None
    assert simulate(call, "ulysses", AT, backward=False).received == ulysses.forward // call.ranks
    assert simulate(call, "ulysses", AT, backward=True).received == ulysses.sent // call.ranks


def test_what_stands_beside_what_travels():
    """An all-gather joins whole keys, and has their gradients in a backward; a ring unpacks a shard of which a part travels, and no other."""
    call, shard = call_of(Full()), 32 * 4 * 32 * 4  # rows, kv heads, numbers of k and v, bytes
    forward, training = (simulate(call, "all_gather", AT, backward=backward).in_flight for backward in (False, True))
    assert (forward, training) == ((3 + 4) * shard, (4 + 4) * shard)
    # Keys of two steps; then gradients that are computed, sent and received.
    forward, training = (
        simulate(call, "ring contiguous", AT, backward=backward).in_flight for backward in (False, True)
    )
    assert (forward, training) == (2 * shard, (2 + 3) * shard)
    sparse = call_of(Dilated((128,), (4,)))
    most = max(step.sent for step in _steps(sparse, "contiguous", 0)) * 32 * 4
    forward, training = (
        simulate(sparse, "ring contiguous", AT, backward=backward).in_flight for backward in (False, True)
    )
    assert 0 < most < shard and (forward, training) == (2 * most + shard, 4 * most + 2 * shard)
    alone = call_of(Full(), ranks=2)
    assert simulate(alone, "ring contiguous", AT, backward=True).in_flight == (1 + 2) * 2 * shard


def test_a_thousand_ranks_are_sampled():
    """Two of them, and a billion tokens of a window: no more is received than the window holds."""
    call = ScheduledCall(Window(4096), 1 << 30, 1024, 8, 2, 64)
    found = simulate(call, "ring contiguous", AT, backward=False)
    assert found.readers == 2 and found.received <= 2 * (1 << 20) * 2 * 2 * 64 * 2
    assert found.compute == pytest.approx((1 << 20) * 4096 * 8 * 2 * 128 / 1e9, rel=0.01)


@pytest.mark.parametrize(
    ("engine", "ranks", "message"),
    [
        ("rings", 4, "engine must be one of"),
        ("ring zigzag", 129, "ranks must be 1 .. 128, got 129"),
        ("ulysses", 8, "ulysses must have a kv head a rank, got 4 kv heads for 8 ranks"),
    ],
)
def test_what_cannot_be_simulated(engine, ranks, message):
    with pytest.raises(ValueError, match=message):
        simulate(call_of(Full(), ranks), engine, AT, backward=False)
