"""Tiers: contents survive every move, the budget holds for what is idle, and what is in use stays. The CPU plays the device."""

import threading

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from longattn.bufmgr import AttentionBufferManager, TieredBuffers

LINE = 64


def numbers(n: int, value: int = 0) -> torch.Tensor:
    return torch.full((LINE // 4 * n,), value, dtype=torch.int32)


def test_the_idle_one_used_longest_ago_moves_out():
    tiers = TieredBuffers(3 * LINE)
    a, b, c = (tiers.hold(numbers(1, value)) for value in (1, 2, 3))
    with a.use() as tensor:
        assert tensor[0] == 1
    d = tiers.hold(numbers(1, 4))
    assert [x.on_device for x in (a, b, c, d)] == [True, False, True, True]
    with b.use() as tensor:
        assert (tensor == 2).all() and [x.on_device for x in (a, b, c, d)] == [True, True, False, True]
        tensor += 40
    with c.use():
        pass
    assert tiers.get_stats() == {
        "device_bytes": 3 * LINE, "host_bytes": LINE, "held": 4, "in_use": 0, "moved_out": 3, "moved_back": 2, "max_device_bytes": 3 * LINE,
    }  # fmt: skip
    tiers.move_out_idle()
    with b.use() as tensor:
        assert (tensor == 42).all()


def test_what_is_in_use_stays_though_it_is_over_the_budget():
    tiers = TieredBuffers(LINE)
    a, b = tiers.hold(numbers(1)), tiers.hold(numbers(1))
    with a.use(), b.use():
        assert a.on_device and b.on_device and tiers.move_out_idle() == 0
        assert tiers.get_stats()["device_bytes"] == 2 * LINE
    assert tiers.get_stats()["device_bytes"] == LINE


def test_host_memory_comes_from_the_managers_buffers_and_goes_back():
    manager = AttentionBufferManager()
    tiers = TieredBuffers(0, manager)
    buffer = tiers.hold(numbers(4, 7))
    assert not buffer.on_device and manager.get_stats()["outstanding"] == 1
    with buffer.use() as tensor:
        assert (tensor == 7).all()
    del tensor
    buffer.drop()
    assert manager.get_stats()["outstanding"] == 0 and tiers.get_stats()["held"] == 0
    with pytest.raises(ValueError, match="buffer must be held, got one that was dropped"), buffer.use():
        pass


def test_a_full_device_moves_the_idle_ones_out_and_tries_again(monkeypatch: pytest.MonkeyPatch):
    manager = AttentionBufferManager()
    tiers = TieredBuffers(2 * LINE, manager)
    a, b = tiers.hold(numbers(1, 1)), tiers.hold(numbers(1, 2))
    tiers.move_out_idle()
    with b.use():
        pass
    allocate, refusals = manager.allocate, [1]

    def refuse_once(kind, *arguments, **options):
        if kind.value == "cache" and refusals:
            refusals.pop()
            raise torch.OutOfMemoryError("full")
        return allocate(kind, *arguments, **options)

    monkeypatch.setattr(manager, "allocate", refuse_once)
    with a.use() as tensor:
        assert (tensor == 1).all() and not b.on_device


def test_threads_see_their_own_numbers():
    tiers = TieredBuffers(2 * LINE)
    buffers = [tiers.hold(numbers(1, value)) for value in range(8)]
    wrong: list[int] = []

    def work(first: int) -> None:
        for turn in range(200):
            value = (first + turn * 3) % 8
            with buffers[value].use() as tensor:
                if not (tensor == value).all():
                    wrong.append(value)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and tiers.get_stats()["device_bytes"] <= 2 * LINE


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        ([1.0], TypeError, "tensor must be a tensor"),
        (torch.zeros(4, 4).T, ValueError, "tensor must be contiguous"),
        (torch.zeros(4, requires_grad=True), ValueError, "requires_grad=True"),
        (torch.zeros(4, 4).to_sparse(), ValueError, "torch.sparse_coo"),
    ],
)
def test_what_cannot_be_held(tensor, error, message):
    with pytest.raises(error, match=message):
        TieredBuffers(100).hold(tensor)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="max_device_bytes must be a whole number of 0 or more"):
        TieredBuffers(-1)
    with pytest.raises(TypeError, match="manager must be an AttentionBufferManager or None"):
        TieredBuffers(1, manager=object())  # pyright: ignore[reportArgumentType]


class Tiers(RuleBasedStateMachine):
    """Any order of holding, using, writing and dropping, beside a list of what each buffer should contain."""

    def __init__(self) -> None:
        super().__init__()
        self.tiers = TieredBuffers(3 * LINE)
        self.model: list[tuple] = []

    @rule(size=st.integers(1, 4), value=st.integers(0, 99))
    def hold(self, size: int, value: int) -> None:
        self.model.append((self.tiers.hold(numbers(size, value)), [value]))

    @rule(at=st.integers(0, 20), value=st.integers(0, 99))
    def write(self, at: int, value: int) -> None:
        if self.model:
            buffer, content = self.model[at % len(self.model)]
            with buffer.use() as tensor:
                assert (tensor == content[0]).all()
                tensor.fill_(value)
            content[0] = value

    @rule(at=st.integers(0, 20))
    def drop(self, at: int) -> None:
        if self.model:
            self.model.pop(at % len(self.model))[0].drop()

    @invariant()
    def idle_ones_fit(self) -> None:
        stats = self.tiers.get_stats()
        total = sum(buffer.nbytes for buffer, _ in self.model)
        assert stats["device_bytes"] <= 3 * LINE and stats["device_bytes"] + stats["host_bytes"] == total


Tiers.TestCase.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
test_any_order = Tiers.TestCase
