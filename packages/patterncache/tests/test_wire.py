"""Plans in few bytes, and between processes."""

import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from longattn.patterncache import (
    BlockSparse,
    Dilated,
    Listed,
    PatternCache,
    Window,
    plan_digest,
    plan_from_bytes,
    plan_to_bytes,
)
from longattn.patterncache.analysis.propagation import square
from longattn.patterncache.planning.packed_lists import Narrow, PackedListed, pack_plan
from longattn.patterncache.testing import check_plan, patterns, rectangles


def numbers():
    """Any lists of run starts: of any size, sorted or not."""
    ints = st.integers(0, 2**40) | st.integers(0, 300)
    return hnp.arrays(np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=8), elements=ints)


@given(numbers(), st.integers(1, 64), st.booleans())
def test_narrow_numbers_widen_to_what_they_were(starts, unit, multiples):
    """Whatever is narrower, the numbers or their differences, in whole units or not."""
    starts = starts * unit if multiples else starts
    narrow = Narrow.of(starts, unit)
    np.testing.assert_array_equal(narrow.widen(), starts)
    assert narrow.values.nbytes <= starts.nbytes and narrow.widen().dtype == np.int64


@pytest.mark.parametrize("unit", [2, 3, 16])
def test_multiples_are_kept_in_units(unit):
    """Far apart, they fit a byte each where their unit is known; the smallest unit included."""
    starts = np.array([[0], [255 * unit], [3 * unit]])
    narrow = Narrow.of(starts, unit)
    assert narrow.values.itemsize == 1 and narrow.unit == unit
    np.testing.assert_array_equal(narrow.widen(), starts)


def test_blocks_in_order_take_a_byte_each():
    """4M tokens in blocks of 64: the distances of neighbours fit eight bits, so the ratio is eight."""
    starts = np.sort(np.random.default_rng(0).choice(1 << 16, (16, 4096)), axis=1) * 64
    packed = PackedListed(Listed(starts, 64, 1))
    assert packed.packed.unit == 64 and packed.wide_nbytes / packed.nbytes >= 4
    few = PackedListed(Listed(np.arange(0, 200 * 64, 64)[None], 64, 1))
    assert few.wide_nbytes == 8 * few.nbytes


@given(patterns(), rectangles())
def test_a_packed_plan_is_the_same_plan(pattern, rectangle):
    """It counts the same, cut into pieces too; in memory, pickled, and through bytes; equal bytes, packed or not."""
    plan = pattern.plan(rectangle)
    packed = plan_from_bytes(plan_to_bytes(plan))
    check_plan(packed, pattern)
    assert plan_to_bytes(packed) == plan_to_bytes(plan) == plan_to_bytes(pack_plan(plan))
    assert plan_digest(packed) == plan_digest(pickle.loads(pickle.dumps(packed)))
    assert packed.nbytes <= plan.nbytes == plan.wide_nbytes == packed.wide_nbytes


@pytest.mark.parametrize(("bound", "fits"), [(2**62, True), (-(2**62), True), (2**62 + 1, False), (-(2**63), False)])
def test_numbers_of_which_two_are_no_int64_are_refused(bound, fits):
    """A band of bytes from anywhere is compared with distances, which are sums."""
    data = plan_to_bytes(Window(3).plan(square(8, 1)))
    assert b"[0,2]" in data
    other = data.replace(b"[0,2]", f"[{bound},null]".encode())
    if fits:
        assert plan_from_bytes(other).branches[0].band.low == bound
    else:
        with pytest.raises(ValueError, match="no integer of at most 62 bits"):
            plan_from_bytes(other)


def random_blocks(blocks=64, seed=0):
    return BlockSparse(16, np.random.default_rng(seed).random((blocks, blocks)) < 0.3)


def test_every_use_of_a_packed_index_is_that_of_the_listed_one():
    """Parts of it, and what it says of itself."""
    plan = random_blocks().plan(square(1024, 2))
    pairs = [(a.k, b.k) for a, b in zip(plan.branches, pack_plan(plan).branches, strict=True)]
    assert any(isinstance(b, PackedListed) for _, b in pairs)
    for a, b in pairs:
        np.testing.assert_array_equal(a.rows(), b.rows())
        np.testing.assert_array_equal(a.narrow(0, 16).rows(), b.narrow(0, 16).rows())
        np.testing.assert_array_equal(a.tile_range(0, 1).rows(), b.tile_range(0, 1).rows())
        assert (a.tiles, a.count, a.run, a.step, a.distinct) == (b.tiles, b.count, b.run, b.step, b.distinct)
    with pytest.raises(ValueError, match="read-only"):
        pairs[0][1].starts[0, 0] = 1


def test_a_cache_keeps_plans_packed_and_says_by_how_much():
    """The statistics have the ratio; affine plans have nothing to pack."""
    cache, pattern = PatternCache(), random_blocks()
    plan = cache.get_or_build("blocks", lambda: pattern.plan(square(1024, 2)))
    check_plan(plan, pattern)
    cache.get_or_build("affine", lambda: Dilated((64,), (2,)).plan(square(1024, 2)))
    assert cache.get_stats()["compression"] == plan.wide_nbytes / plan.nbytes > 3
    cache.check_valid()
    assert PatternCache().get_stats()["compression"] == 1.0


@pytest.mark.parametrize(
    "data", [b"", b"plan", b"longattn plan 1\n{}\n", plan_to_bytes(Window(3).plan(square(9, 1))) + b"x"]
)
def test_other_bytes_are_refused(data):
    """The message says what was expected."""
    with pytest.raises(ValueError, match="data must be the bytes of plan_to_bytes"):
        plan_from_bytes(data)


RANK = """
import sys
from dataclasses import replace
import torch.distributed as dist
from longattn.patterncache import PatternCache, Dilated, Window, build_on_one, check_same_plan
from longattn.patterncache.analysis.propagation import square

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
pattern, other = (one.plan(square(40, 2)) for one in (Dilated((8, 16), (1, 2)), Window(3)))

def said(ask):
    cache, built = PatternCache(), []
    try:
        ask(cache, lambda plan=pattern: built.append(rank) or plan)
        print("built", built, "size", len(cache))
    except (ValueError, RuntimeError, OSError) as error:
        print(type(error).__name__, error)

def twice(cache, build):
    for _ in range(2):
        plan = build_on_one(cache, (Dilated((8, 16), (1, 2)), "key"), build, group=dist.new_group([0, 1]))
    print(check_same_plan(plan), end=" ")

def kept_by_one(cache, build):
    if rank == 1:
        cache.get_or_build("key", build)
    build_on_one(cache, "key", build)

def stale(cache, build):
    cache.get_or_build("key", lambda: build([pattern, other][rank]))
    build_on_one(cache, "key", build)

def fails(cache, build):
    def broken():
        raise OSError("no")
    build_on_one(cache, "key", broken)

said(twice)
said(kept_by_one)
said(lambda cache, build: check_same_plan([pattern, other][rank]))
said(stale)
said(lambda cache, build: build_on_one(cache, ("key", rank), build))
said(fails)
dist.destroy_process_group()
"""


def test_two_processes(tmp_path):
    """One builds and the other receives; whoever has it sends it; differences are errors on both that name the ranks."""
    pytest.importorskip("torch")
    children = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [child.communicate(timeout=120)[0].splitlines() for child in children]
    digest, other = (plan_digest(pattern.plan(square(40, 2))) for pattern in (Dilated((8, 16), (1, 2)), Window(3)))
    differ = f"ValueError plan must be the same on all ranks, got digests ranks 0: {digest[:12]}; ranks 1: {other[:12]}"
    for rank, lines in enumerate(said):
        assert lines[:4] == [
            f"{digest} built {[0] if rank == 0 else []} size 1",
            f"built {[1] if rank == 1 else []} size 1",
            differ,
            differ,
        ]
        assert lines[4].startswith("ValueError key must be the same on all ranks, got digests ranks 0: ")
        assert lines[5] == ("OSError no" if rank == 0 else "RuntimeError rank 0 failed to build the plan of 'key'")


def test_lists_travel_in_units_of_their_runs():
    """Starts of blocks are multiples of a block: a byte for each of 200 block columns, where positions up to 12800 need two."""
    mask = np.random.default_rng(0).random((200, 200)) < 0.3
    mask[:, 1::2] = False  # no two blocks in one run
    data = plan_to_bytes(BlockSparse(64, mask).plan(square(200 * 64, 1)))
    assert b'"|u1"' in data and b'"<u' not in data


def test_runs_with_steps_travel_in_units_too():
    """Runs of 4 rows, 2 apart, begin at multiples of 8: a byte for each, where units of the step alone would need two."""
    plan = BlockSparse(4, np.eye(200, dtype=bool)).plan(square(800, 1))
    first, *_ = plan.branches
    strided = Listed(np.random.default_rng(0).permutation(200)[:, None] * 8, 4, 2)
    data = plan_to_bytes(replace(plan, branches=(replace(first, q=strided, k=strided),)))
    assert b'"|u1"' in data and b'"<u' not in data
