"""Tensors of plans on devices: made once each, bounded together, and nobody's to write."""

import gc

import numpy as np
import pytest

from longattn.patterncache import DeviceTier, Dilated, IndexArrays, PatternCache, index_arrays
from longattn.patterncache.analysis.propagation import square
from longattn.patterncache.testing import dense_counts

torch = pytest.importorskip("torch")

NAMES = ("head_class", "indptr", "indices", "counts")
PATTERN = Dilated((4, 8), (1, 2), causal=True)


def plan_of(length):
    return PATTERN.plan(square(length, 2))


def test_one_build_serves_all_devices():
    """Two devices, two tensors, one plan in the cache; and each device's are made once."""
    cache, tier, built = PatternCache(), DeviceTier(), []
    for device in ("cpu", "meta", "cpu", "meta"):
        plan = cache.get_or_build("key", lambda: built.append(1) or plan_of(20))
        found = tier.resident(plan, device)
        assert found is tier.resident(plan, device) and found.indices.device.type == device
    assert built == [1] and len(cache) == 1
    assert tier.get_stats()["resident_bytes"] == 2 * index_arrays(plan).nbytes


@pytest.mark.parametrize("device", [0, "cuda", "xpu", "mps", "hpu", "nonsense", 1.5])
def test_devices_that_are_not_here_are_named(device):
    """torch knows the name of many; without a driver, or in a build without them, each fails in a way of its own."""
    try:
        torch.empty(0, device=device)
    except Exception:  # noqa: BLE001 - whatever this torch raises
        with pytest.raises((TypeError, ValueError), match=r"device"):
            DeviceTier().resident(plan_of(20), device)
        with pytest.raises((TypeError, ValueError), match=r"device"):
            PATTERN.to_block_mask(16, 2, device=device)
    else:
        assert DeviceTier().resident(plan_of(20), device).indices.device == torch.empty(0, device=device).device


@pytest.mark.parametrize("transposed", [False, True])
def test_tensors_are_the_index_arrays(transposed):
    """Of the plan, by queries or by keys."""
    plan, tier = plan_of(20), DeviceTier()
    found = tier.index_tensors(plan, transposed=transposed)
    expected = PATTERN.counts(plan.rectangle)
    arrays = IndexArrays(*(getattr(found, name).numpy() for name in NAMES), transposed)
    np.testing.assert_array_equal(dense_counts(arrays, expected.shape), expected)
    assert found.indptr.dtype == torch.int64 and found.indices.dtype == torch.int32


def test_a_caller_cannot_change_what_the_tier_has():
    """What is handed out is a copy, and the plan's arrays are not what the tensors look into."""
    plan, tier = plan_of(20), DeviceTier()
    tier.index_tensors(plan).indices.fill_(99)
    assert tier.index_tensors(plan).indices.max() < 20


def test_bytes_are_bounded_over_all_plans():
    """The plan asked for longest ago loses its tensors; who holds them keeps them; the count equals a recount."""
    one = index_arrays(plan_of(20)).nbytes
    tier, plans = DeviceTier(max_bytes=2 * one), [plan_of(20) for _ in range(3)]
    held = [tier.resident(plan) for plan in plans[:2]]
    tier.resident(plans[0])
    tier.resident(plans[2])
    stats = tier.get_stats()
    assert (stats["resident_bytes"], stats["resident_plans"], stats["resident_evictions"]) == (2 * one, 2, 1)
    assert tier.resident(plans[0]) is held[0] and tier.resident(plans[1]) is not held[1]
    assert held[1].indices.numel() == index_arrays(plans[1]).indices.size


def test_what_rows_add_themselves_counts_at_the_next_ask():
    """Whoever keeps tensors with a plan lends the tier the mapping."""
    tier, first, second = DeviceTier(max_bytes=100), plan_of(8), plan_of(9)
    for plan in (first, second):
        tier.hold(plan, lambda plan: plan.derived.setdefault("mine", {}))
        plan.derived["mine"]["rows"] = torch.zeros(20, dtype=torch.int32)
    assert tier.get_stats()["resident_bytes"] == 160
    tier.hold(second, lambda plan: plan.derived["mine"])
    assert first.derived["mine"] == {} and tier.get_stats()["resident_bytes"] == 80


@pytest.mark.parametrize("numel", [0, 1, 7])
def test_a_plan_is_resident_from_its_first_byte_on(numel):
    """And not without one."""
    tier, plan = DeviceTier(), plan_of(8)
    tier.hold(plan, lambda plan: {"mine": torch.zeros(numel, dtype=torch.uint8)})
    stats = tier.get_stats()
    assert (stats["resident_bytes"], stats["resident_plans"]) == (numel, int(numel > 0))


def test_tensors_go_with_their_plan():
    """The tier keeps no plan alive."""
    tier, plan = DeviceTier(), plan_of(20)
    tier.resident(plan)
    del plan
    gc.collect()
    assert tier.get_stats() == {
        "resident_bytes": 0,
        "resident_plans": 0,
        "resident_max_bytes": None,
        "resident_evictions": 0,
    }


def test_no_bytes_keep_nothing():
    """And a bad limit is named."""
    tier, plan = DeviceTier(max_bytes=0), plan_of(20)
    assert tier.resident(plan).indices.numel() and tier.get_stats()["resident_bytes"] == 0
    with pytest.raises(ValueError, match="max_bytes must be an integer >= 0, got -1"):
        DeviceTier(-1)
