"""Steps that are learned: what is predicted, what is ready then, and that a manager is as it was afterwards."""

import copy
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch

from longattn.bufmgr import AttentionBufferManager, BufferConfig, BufferType, ExpectedRequest, MemoryPool, StepLearner

TEMP, SCORES = BufferType.TEMP, BufferType.SCORES


def learn(steps: Sequence[Sequence[int]], manager: AttentionBufferManager) -> tuple[StepLearner, list[int]]:
    """Run steps that each hold float32 buffers of so many elements at once; return the misses of each."""
    learner, misses = StepLearner(manager), list[int]()
    for step in steps:
        before = learner.get_stats()["misses"]
        with learner.step():
            held = [manager.allocate(TEMP, (size,), torch.float32) for size in step]
            del held
        misses.append(int(learner.get_stats()["misses"] - before))
    return learner, misses


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([[10, 20]], [10, 20]),
        ([[10, 20], [10, 20]], [10, 20]),
        ([[10, 20], [30, 40], [10, 20]], [30, 40]),  # in turns
        ([[100, 7], [120, 7], [140, 7]], [160, 7]),  # growing
        ([[100], [200], [50]], []),  # as nothing before
    ],
)
def test_rules_predict_the_next_step(steps: list[list[int]], expected: list[int]):
    learner, _ = learn(steps, AttentionBufferManager(upstream=MemoryPool()))
    assert [(request.kind, request.nbytes) for request in learner.predict()] == [(TEMP, 4 * size) for size in expected]


def test_what_grows_is_ready_before_it_is_asked_for():
    """Without the learner each step's larger buffer is new memory."""
    steps = [[524288 + 1024 * number] for number in range(10)]
    manager = AttentionBufferManager(upstream=MemoryPool())
    learner, misses = learn(steps, manager)
    assert misses == [1, 1, 1] + [0] * 7
    assert learner.get_stats() == {"steps": 10, "requests": 10, "misses": 3, "readied": 8, "accuracy": 7 / 9}
    manager.check_valid()


def test_as_many_are_ready_as_were_in_use_at_once():
    """More than the type's limit: the limit rises, at most four times, and goes back."""
    manager = AttentionBufferManager({TEMP: BufferConfig(max_cached_buffers=3)}, upstream=MemoryPool())
    learner, misses = learn([[1000] * 10] * 3, manager)
    assert [request.in_use for request in learner.predict()] == list(range(1, 11))
    assert misses == [10, 0, 0]
    assert manager.get_stats()["types"]["temp"]["max_buffers"] == 10
    _, misses = learn([[1000] * 20] * 3, manager)
    assert manager.get_stats()["types"]["temp"]["max_buffers"] == 12
    assert misses[1:] == [8, 8]
    manager.check_valid()
    manager._book.shrink_caches()
    assert manager.get_stats()["types"]["temp"]["max_buffers"] == 3


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda learner: pickle.loads(pickle.dumps(learner))])
def test_a_copy_has_a_manager_of_its_own_and_what_was_learned(twin_of: Callable[[StepLearner], StepLearner]):
    learner, _ = learn([[1000, 2000]] * 2, AttentionBufferManager())
    twin = twin_of(learner)
    assert (twin.predict(), twin.get_stats()) == (learner.predict(), learner.get_stats())
    assert twin._manager is not learner._manager
    with twin.step():
        assert twin._manager.allocate(TEMP, (1000,), torch.float32).numel() == 1000
    assert (twin._manager.get_stats()["cache_hits"], learner._manager.get_stats()["cache_hits"]) == (1, 2)


def test_a_step_changes_no_buffer_and_ends_with_its_context():
    """Also when it raises: hits are fast again, and the next step is another one."""
    manager = AttentionBufferManager(upstream=MemoryPool())
    learner = StepLearner(manager)
    kept: list[torch.Tensor] = []

    def fail() -> None:
        with learner.step():
            kept.append(manager.allocate(SCORES, (8, 8)).fill_(3.0))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert learner.predict() == (ExpectedRequest(SCORES, 256, 1),)
    with learner.step(), pytest.raises(RuntimeError, match="step must be closed"), StepLearner(manager).step():
        pass
    assert bool((kept[0] == 3.0).all())
    manager.allocate(TEMP, (8,))
    slow = manager.get_stats()["slow_requests"]
    manager.allocate(TEMP, (8,))
    assert manager.get_stats()["slow_requests"] == slow
    assert learner.get_stats()["steps"] == 2
    with pytest.raises(TypeError, match="manager must be an AttentionBufferManager"):
        StepLearner(None)  # pyright: ignore[reportArgumentType]
