"""A manager as a machine against a model: whatever is done in whatever order, no live tensor ever changes."""

import contextlib
import gc
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from longattn.bufmgr import AttentionBufferManager, BufferType, MemoryReading
from longattn.bufmgr.testing import FailingAllocator, ManagerModel, buffer_types, configs, dtypes, shapes


class ManagerMachine(RuleBasedStateMachine):
    @initialize(
        custom=st.dictionaries(st.sampled_from([BufferType.TEMP, BufferType.OUTPUT]), configs(), max_size=2),
        enable_reuse=st.sampled_from([True, True, True, False]),
    )
    def start(self, custom: dict[BufferType, Any], enable_reuse: bool) -> None:
        self.upstream = FailingAllocator()
        self.manager = AttentionBufferManager(custom, enable_reuse, upstream=self.upstream)
        self.model = ManagerModel(self.manager)

    @staticmethod
    def draw_index(data: st.DataObject, items: list[Any]) -> int:
        """Draw a place, not the item: Hypothesis would go on referring to a tensor that it drew."""
        return data.draw(st.integers(0, len(items) - 1))

    @rule(
        kind=st.sampled_from([BufferType.TEMP, BufferType.OUTPUT, BufferType.CACHE]),
        shape=shapes(),
        dtype=dtypes(),
        zero_init=st.sampled_from([None, None, True, False]),
    )
    def allocate(self, kind: BufferType, shape: tuple[int, ...], dtype: torch.dtype, zero_init: bool | None) -> None:
        self.model.allocate(kind, shape, dtype, zero_init)

    @rule(kind=buffer_types(), shape=shapes(), refusals=st.integers(1, 3))
    def allocate_while_memory_is_refused(self, kind: BufferType, shape: tuple[int, ...], refusals: int) -> None:
        """The n-th upstream call fails: either the request is served all the same, or nothing is leased."""
        self.upstream.refusals_left = refusals
        with contextlib.suppress(MemoryError):
            self.model.allocate(kind, shape, torch.float32)
        self.upstream.refusals_left = 0

    @precondition(lambda self: self.model.owned)
    @rule(data=st.data(), take=st.sampled_from(["view", "detach", "alias"]))
    def look(self, data: st.DataObject, take: str) -> None:
        """Somebody else begins to look at a buffer."""
        tensor, _, value = self.model.owned[self.draw_index(data, self.model.owned)]
        other = {"view": tensor.view(-1), "detach": tensor.detach(), "alias": tensor}[take]
        self.model.seen.append((other, value))

    @precondition(lambda self: self.model.seen)
    @rule(data=st.data())
    def look_away(self, data: st.DataObject) -> None:
        del self.model.seen[self.draw_index(data, self.model.seen)]

    @precondition(lambda self: self.model.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Released: empty where nobody looked, untouched where somebody did, refused the second time."""
        index = self.draw_index(data, self.model.owned)
        storages = [seen.untyped_storage()._cdata for seen, _ in self.model.seen]
        tensor, kind, value = self.model.owned.pop(index)
        shape, looked_at = tensor.shape, tensor.untyped_storage()._cdata in storages
        wrong = BufferType.MASK if kind is not BufferType.MASK else BufferType.COMM
        with pytest.raises(ValueError, match="type must be .*, which this buffer was leased as"):
            self.manager.deallocate(tensor, wrong)
        self.manager.deallocate(tensor, kind)
        assert tensor.shape == (shape if looked_at else (0,))
        with pytest.raises(ValueError, match="released before"):
            self.manager.deallocate(tensor, kind)
        if looked_at:
            self.model.seen.append((tensor, value))

    @precondition(lambda self: self.model.owned)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """A buffer is forgotten without being released."""
        del self.model.owned[self.draw_index(data, self.model.owned)]

    @precondition(lambda self: self.model.seen)
    @rule(data=st.data())
    def release_what_was_not_leased(self, data: st.DataObject) -> None:
        tensor, _ = self.model.seen[self.draw_index(data, self.model.seen)]
        with pytest.raises(ValueError, match="tensor must be a buffer leased here"):
            self.manager.deallocate(tensor[None], BufferType.TEMP)

    @rule(kind=st.sampled_from([BufferType.TEMP, BufferType.CACHE]))
    def take_on_the_short_way(self, kind: BufferType) -> None:
        """One shape again and again: a slot's memory, never that of a buffer that somebody looks at."""
        for _ in range(2):
            self.model.allocate(kind, (64,), torch.float32)

    @rule()
    def memory_is_short(self) -> None:
        """A reading of 99 % in use: the next miss gives free memory back, and nothing else."""
        with pytest.MonkeyPatch.context() as patch:
            reading = MemoryReading(100, 1, "machine")
            patch.setattr("longattn.bufmgr.memory.pressure.read_host_memory", lambda: reading)
            self.manager._gauge._next_reading = 0.0
            self.model.allocate(BufferType.COMM, (8,), torch.float32)
            self.manager._gauge._next_reading = float("inf")

    @rule()
    def a_scope(self) -> None:
        """What a scope allocated is empty after it; what it kept is not."""
        with self.manager.scope() as scope:
            inside = self.manager.allocate(BufferType.MASK, (16,))
            kept = self.manager.allocate(BufferType.MASK, (16,))
            scope.keep(kept)
        assert (inside.shape, kept.shape) == ((0,), (16,))
        self.model.requests += 2

    @rule(kind=st.sampled_from([None, *BufferType]))
    def clear(self, kind: BufferType | None) -> None:
        self.manager.clear_cache(kind)
        if kind is None:
            assert self.manager.get_stats()["cached_buffers"] == 0

    @rule(sizes=st.tuples(*[st.integers(0, 4)] * 4), refusals=st.sampled_from([0, 0, 1]))
    def preallocate(self, sizes: tuple[int, int, int, int], refusals: int) -> None:
        self.upstream.refusals_left = refusals
        try:
            ready = self.manager.preallocate_buffers(*sizes)
        except MemoryError:
            ready = 0
        self.upstream.refusals_left = 0
        if ready == 4:
            hits = self.manager.get_stats()["cache_hits"]
            self.model.allocate(BufferType.KEY, sizes, torch.float32)
            assert self.manager.get_stats()["cache_hits"] == hits + 1

    @invariant()
    def nothing_changed_under_a_living_tensor(self) -> None:
        if hasattr(self, "model"):
            self.model.check()

    def teardown(self) -> None:
        """Leak nothing: when the last tensor and the manager are gone, the upstream has every block back."""
        if hasattr(self, "model"):
            self.model.owned.clear()
            self.model.seen.clear()
            assert self.manager.get_stats()["outstanding"] == 0
            self.manager.clear_cache()
            assert self.upstream.held_bytes == 0


TestManagerMachine = ManagerMachine.TestCase
TestManagerMachine.settings = settings(stateful_step_count=30)


def test_leak_none_find_none():
    """Five hundred leases that end in every way leave no lease and no byte behind."""
    upstream = FailingAllocator()
    manager = AttentionBufferManager(upstream=upstream)

    def one_turn(manager: AttentionBufferManager, turn: int) -> None:
        tensor = manager.allocate(BufferType.SCORES, (turn % 7 + 1, 64))
        view = tensor[0] if turn % 3 else None
        if turn % 2:
            manager.deallocate(tensor, BufferType.SCORES)
            assert tensor.shape == ((0,) if view is None else (turn % 7 + 1, 64))

    for turn in range(500):
        one_turn(manager, turn)
    assert manager.get_stats()["outstanding"] == 0
    del manager
    gc.collect()
    assert upstream.held_bytes == 0
