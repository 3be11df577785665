"""What travels: exactly what the receiver sees, packed and put back; and what `choose` says of it."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longattn.attention import AllGather, Local, Ring, Ulysses, choose, shard_sequence, unshard_sequence
from longattn.attention.schedules.layouts import LAYOUTS, count_rows
from longattn.attention.schedules.packing import packing_of, visible_key_rows
from longattn.attention.schedules.traffic import (
    ScheduledCall,
    full_ring_bytes,
    gather_traffic,
    ring_traffic,
    ulysses_traffic,
)
from longattn.kernels import attend
from longattn.patterncache import Dilated, Full, Rectangle, Window
from longattn.patterncache.testing import patterns

LONGNET = Dilated((2048, 8192, 32768), (1, 4, 16))


def shards(data, length):
    """Rows of two ranks of some ring."""
    layout = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))](length, data.draw(st.integers(1, 5)))
    rows = layout.rows()
    return data.draw(st.sampled_from(rows)), data.draw(st.sampled_from(rows))


@given(st.data(), patterns(), st.integers(0, 40), st.sampled_from([(1, 1), (2, 2), (2, 1), (3, 2)]))
def test_what_travels_is_what_is_seen(data, pattern, length, heads):
    """A (key row, kv head) pair is packed if and only if some query of some head of its group sees it."""
    group, kv_heads = heads
    queries, keys = shards(data, length)
    rectangle = Rectangle(group * kv_heads, queries, keys)
    counts = pattern.counts(rectangle)
    seen = (counts.reshape(kv_heads, group, *counts.shape[1:]) > 0).any((1, 2)).T
    assert np.array_equal(visible_key_rows(pattern.plan(rectangle), kv_heads), seen)


@given(st.data(), patterns(), st.integers(1, 40))
def test_packed_keys_serve_as_the_whole_shard_does(data, pattern, length):
    """Unpacked rows are in their place, the others zero, and attention over the rectangle is the same."""
    queries, keys = shards(data, length)
    nq, nk = count_rows(queries), count_rows(keys)
    packing = packing_of(pattern.plan(Rectangle(4, queries, keys)), 2)
    q, k, v = (torch.randn(2, n, h, 4, dtype=torch.float64) for n, h in ((nq, 4), (nk, 2), (nk, 2)))
    came = []
    for x in (k, v):
        packed = packing.pack(x, x.new_empty)
        assert packed.shape == packing.shape(2, 4)
        came.append(packing.unpack(packed, partial(x.new_full, fill_value=torch.nan)))
        total = torch.zeros_like(x)
        packing.add(total, packed)
        assert torch.equal(total, came[-1])
    options = {"q_spans": queries, "k_spans": keys}
    expected, found = (attend(q, *kv, pattern, **options) for kv in ((k, v), came))
    torch.testing.assert_close((found.out, found.lse), (expected.out, expected.lse))


def test_a_long_ring_sends_little():
    """64K tokens on 4 ranks: nothing where segments end with shards; a forty-eighth of a full ring for 1 / 4 / 16."""
    call = ScheduledCall(LONGNET, 65536, 4, 8, 8)
    assert ring_traffic(call).forward * 48 == full_ring_bytes(call) == 2 * 3 * 65536 * 8 * 64 * 2
    assert ring_traffic(call).backward == 3 * ring_traffic(call).forward
    assert ring_traffic(ScheduledCall(Dilated((2048, 4096, 8192), (1, 2, 4)), 65536, 4, 8, 8)).sent == 0
    assert ring_traffic(ScheduledCall(Full(), 65536, 4, 8, 8)).forward == full_ring_bytes(call)


@pytest.mark.parametrize("length", [4096, 4099])
def test_zigzag_and_stripes_balance_causal_work(length):
    """The slowest rank has at most 1.05 of the mean; contiguous, the last has nearly twice."""
    for ranks in (2, 4, 8):
        found = {
            layout: ring_traffic(ScheduledCall(Full(causal=True), length, ranks, 2, 2), layout) for layout in LAYOUTS
        }
        assert found["zigzag"].imbalance <= 1.05 and found["striped"].imbalance <= 1.05
        assert found["contiguous"].imbalance == pytest.approx(2 - 1 / ranks, abs=0.01)
        assert len({sum(one.work) for one in found.values()}) == 1


def test_choose_takes_the_least_bytes_in_balance():
    """And says why the others were not taken."""
    assert choose(4, LONGNET, 65536, 8).engine == "ring contiguous"
    dense = choose(4, Full(causal=True), 65536, 8)
    assert dense.engine == "ulysses" and dense.schedule is None
    assert "over 1.25 x the mean" in dense.reasons["ring contiguous"] and "all_gather" in str(dense)
    few = choose(4, Full(causal=True), 65536, 8, kv_heads=2)
    assert few.engine == "ring zigzag" and few.reasons["ulysses"] == "2 kv heads are fewer than 4 ranks"
    assert "2 kv heads are fewer" in str(few)
    call = ScheduledCall(Window(5), 100, 3, 6, 3)
    gathered, exchanged = gather_traffic(call), ulysses_traffic(call)
    assert exchanged is not None and sum(gathered.work) == sum(exchanged.work) == sum(ring_traffic(call).work)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((0, Full(), 8, 2), ValueError, "group must be an integer >= 1, got 0"),
        ((2.0, Full(), 8, 2), TypeError, "group must be a ProcessGroup"),
        ((2, "full", 8, 2), TypeError, "pattern must be a Pattern"),
        ((2, Full(), 0, 2), ValueError, "length must be an integer >= 1"),
        ((2, Full(), 8, 2, {"kv_heads": 3}), ValueError, "kv_heads must divide num_heads=2, got 3"),
    ],
)
def test_a_bad_question_is_named(arguments, error, words):
    options = arguments[4] if len(arguments) > 4 else {}
    with pytest.raises(error, match=words):
        choose(*arguments[:4], **options)


def test_bad_engines_and_sequences_are_named():
    """Messages name the parameter, what was expected and what came."""
    for call, error, words in (
        (lambda: AllGather(None), TypeError, "group must be a ProcessGroup"),
        (lambda: Ulysses("0", inner="ring"), TypeError, "inner must be None or a Schedule"),
        (lambda: AllGather("0", lengths=(3, -1)), ValueError, "lengths must be >= 0"),
        (
            lambda: AllGather("0", lengths="5"),
            TypeError,
            "lengths must be None, the whole length, or one for each rank",
        ),
        (lambda: AllGather("0", "zigzag", (3, 4)), ValueError, "lengths must be None or the whole length"),
        (lambda: shard_sequence([1, 2], Local()), TypeError, "x must be a torch.Tensor"),
        (lambda: unshard_sequence(torch.zeros(1, 2), "ring"), TypeError, "schedule must be None or a Schedule"),
    ):
        with pytest.raises(error, match=words):
            call()


def test_in_one_process_a_sequence_is_whole():
    """Local, and a ring that is played here, hold everything."""
    x = torch.arange(10).reshape(2, 5)
    for schedule in (Local(), Ring(size=3)):
        part, positions = shard_sequence(x, schedule)
        assert torch.equal(part, x) and positions.tolist() == [0, 1, 2, 3, 4]
        assert torch.equal(unshard_sequence(part, schedule), x)
