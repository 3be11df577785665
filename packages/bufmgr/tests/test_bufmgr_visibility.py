"""Who sees a buffer: whoever it is, the memory is not lent again, and nothing that it sees changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from longattn.bufmgr import AttentionBufferManager, BufferType
from longattn.bufmgr.leasing.guard import fresh_counts

TEMP = BufferType.TEMP
SHAPE = (4, 8)


def test_counts_can_be_trusted_here():
    """Python 3.11 to 3.13 with a GIL and torch 2.11 and newer: the guard is calibrated and on."""
    assert fresh_counts() is not None


def saved_input(tensor: torch.Tensor) -> torch.Tensor:
    return torch.ones(SHAPE, requires_grad=True) * tensor


def saved_output(tensor: torch.Tensor) -> Any:
    return Exponential.apply(torch.ones(SHAPE, requires_grad=True), tensor)


def saved_by_hook(tensor: torch.Tensor) -> Any:
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        return torch.ones(SHAPE, requires_grad=True) * tensor


class Exponential(torch.autograd.Function):
    """Writes its output into the buffer and saves it, as kernels do."""

    @staticmethod
    def forward(ctx, x, buffer):
        out = buffer.detach()
        ctx.save_for_backward(out)
        return x + 1

    @staticmethod
    def backward(ctx, *grads):
        (out,) = ctx.saved_tensors
        return grads[0] * out, None


class Keeps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, buffer):
        ctx.save_for_backward(buffer)
        return x + 1

    @staticmethod
    def backward(ctx, *grads):
        (buffer,) = ctx.saved_tensors
        return grads[0] * buffer, None


def saved_for_backward(tensor: torch.Tensor) -> Any:
    return Keeps.apply(torch.ones(SHAPE, requires_grad=True), tensor)


WATCHERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "name": lambda tensor: tensor,
    "list": lambda tensor: [tensor],
    "closure": lambda tensor: lambda: tensor,
    "view": lambda tensor: tensor.view(-1),
    "slice": lambda tensor: tensor[1:2, 3:],
    "empty slice": lambda tensor: tensor[:0],
    "transpose": lambda tensor: tensor.mT,
    "view of view": lambda tensor: tensor[1:].flatten()[2:],
    "view as another dtype": lambda tensor: tensor.view(torch.uint8),
    "detach": lambda tensor: tensor.detach(),
    "data": lambda tensor: tensor.data,
    "parameter": lambda tensor: torch.nn.Parameter(tensor),
    "storage": lambda tensor: tensor.untyped_storage(),
    "dlpack": lambda tensor: tensor.__dlpack__(),
    "tensor from dlpack": lambda tensor: torch.from_dlpack(tensor),
    "saved input": saved_input,
    "saved output": saved_output,
    "saved by a hook": saved_by_hook,
    "save_for_backward": saved_for_backward,
}


def outstanding(manager: AttentionBufferManager) -> int:
    return manager.get_stats()["outstanding"]


@pytest.mark.parametrize("leading", [(), (4096,)], ids=["small", "large"])
@pytest.mark.parametrize("watch", WATCHERS.values(), ids=WATCHERS.keys())
def test_release_touches_nothing_that_somebody_sees(watch: Callable[[torch.Tensor], Any], leading: tuple[int, ...]):
    """deallocate leaves the handle as it is; the memory comes back when handle and watcher are gone."""
    manager = AttentionBufferManager()
    tensor = manager.allocate(TEMP, leading + SHAPE)
    tensor.fill_(3.0)
    address, shape = tensor.data_ptr(), tensor.shape
    watcher = watch(tensor)
    manager.deallocate(tensor, TEMP)
    assert tensor.shape == shape
    with pytest.raises(ValueError, match="released before"):
        manager.deallocate(tensor, TEMP)
    other = manager.allocate(TEMP, shape).fill_(9.0)
    assert other.data_ptr() != address
    content = tensor.clone()
    del tensor
    assert outstanding(manager) == 2, "the watcher alone keeps it"
    other.fill_(8.0)
    if isinstance(watcher, torch.Tensor) and watcher.shape == content.shape and not watcher.requires_grad:
        assert torch.equal(watcher, content)
    del watcher
    assert outstanding(manager) == 1
    assert manager.allocate(TEMP, shape).data_ptr() == address
    manager.check_valid()


@pytest.mark.parametrize("watch", WATCHERS.values(), ids=WATCHERS.keys())
def test_dropping_without_release_returns_the_memory(watch: Callable[[torch.Tensor], Any]):
    """The last owner returns the block, whoever it is; a deallocate is not needed."""
    manager = AttentionBufferManager()
    tensor = manager.allocate(TEMP, SHAPE).fill_(2.0)
    watcher = watch(tensor)
    del tensor
    assert outstanding(manager) == 1
    del watcher
    assert outstanding(manager) == 0
    assert manager.get_stats()["cached_buffers"] == 1


@pytest.mark.parametrize("watch", WATCHERS.values(), ids=WATCHERS.keys())
def test_a_watcher_that_is_gone_leaves_no_trace(watch: Callable[[torch.Tensor], Any]):
    """After the watcher died, deallocate empties the handle as if it had never been."""
    manager = AttentionBufferManager()
    tensor = manager.allocate(TEMP, SHAPE).fill_(2.0)
    watch(tensor)
    manager.deallocate(tensor, TEMP)
    assert (tensor.shape, outstanding(manager)) == ((0,), 0)


def test_numpy_and_memoryview():
    numpy = pytest.importorskip("numpy")
    manager = AttentionBufferManager()
    for watch in (lambda t: t.numpy(), lambda t: memoryview(t.numpy()), lambda t: t.numpy()[1:], numpy.from_dlpack):
        tensor = manager.allocate(TEMP, SHAPE).fill_(2.0)
        watcher = watch(tensor)
        manager.deallocate(tensor, TEMP)
        assert (tensor.shape, outstanding(manager)) == (SHAPE, 1)
        del tensor
        assert outstanding(manager) == 1
        assert numpy.asarray(watcher).min() == 2.0
        del watcher
        assert outstanding(manager) == 0


def test_gradients_are_right_under_reuse():
    """The original overwrote buffers saved for backward; here every step's saved buffers stay its own."""
    manager = AttentionBufferManager()
    w = torch.full(SHAPE, 2.0, requires_grad=True)

    def step(factor: int) -> torch.Tensor:
        scale = manager.allocate(TEMP, SHAPE).fill_(float(factor))
        loss = (w * scale).sum()
        manager.deallocate(scale, TEMP)  # saved for backward: not touched
        scratch = manager.allocate(TEMP, SHAPE).fill_(-100.0)
        manager.deallocate(scratch, TEMP)
        return loss

    losses = [step(factor) for factor in range(6)]
    for factor in range(6):
        (gradient,) = torch.autograd.grad(losses[factor], w)
        assert torch.equal(gradient, torch.full(SHAPE, float(factor)))
    losses.clear()
    stats = manager.get_stats()
    assert stats["outstanding"] == 0
    assert stats["cache_hits"] == 5, "each step's scale takes the memory of the scratch before"


def test_buffers_do_not_share_a_version_counter():
    """Writing one buffer raises no false autograd error for another."""
    manager = AttentionBufferManager()
    first, second = manager.allocate(TEMP, SHAPE), manager.allocate(TEMP, SHAPE)
    x = torch.ones(SHAPE, requires_grad=True)
    y = (x * first.fill_(1.5)).sum()
    second.fill_(0.0)
    y.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full(SHAPE, 1.5))


def test_a_leaf_that_was_trained_can_be_released():
    manager = AttentionBufferManager()
    tensor = manager.allocate(TEMP, SHAPE).fill_(1.0).requires_grad_()
    tensor.square().sum().backward()
    manager.deallocate(tensor, TEMP)
    assert outstanding(manager) == 0 or tensor.shape == SHAPE
    del tensor
    assert outstanding(manager) == 0


@pytest.mark.parametrize("make_view", [lambda t: t[:], lambda t: t.detach(), lambda t: t.view(-1), lambda t: t[:0]])
def test_releasing_another_tensor_over_the_memory_raises(make_view: Callable[[torch.Tensor], torch.Tensor]):
    manager = AttentionBufferManager()
    tensor = manager.allocate(TEMP, SHAPE)
    view = make_view(tensor)
    with pytest.raises(ValueError, match="release the tensor that allocate returned"):
        manager.deallocate(view, TEMP)
    del view
    manager.deallocate(tensor, TEMP)
    assert outstanding(manager) == 0


def test_releasing_the_view_of_a_dead_handle_raises():
    manager = AttentionBufferManager()
    view = manager.allocate(TEMP, SHAPE)[1:]
    with pytest.raises(ValueError, match="release the tensor that allocate returned"):
        manager.deallocate(view, TEMP)


def test_foreign_tensors_raise():
    manager, other = AttentionBufferManager(), AttentionBufferManager()
    for tensor in (torch.ones(3), torch.empty(0, 2), torch.ones(3, device="meta"), other.allocate(TEMP, (3,))):
        with pytest.raises(ValueError, match="from elsewhere"):
            manager.deallocate(tensor, TEMP)


def test_a_guard_that_cannot_count_empties_nothing(monkeypatch: pytest.MonkeyPatch):
    """Where calibration failed, memory still comes back, by the death of the last reference alone."""
    monkeypatch.setattr("longattn.bufmgr.leasing.guard.fresh_counts", lambda: None)
    manager = AttentionBufferManager()
    tensor = manager.allocate(TEMP, SHAPE)
    manager.deallocate(tensor, TEMP)
    assert (tensor.shape, outstanding(manager)) == (SHAPE, 1)
    with pytest.raises(ValueError, match="released before"):
        manager.deallocate(tensor, TEMP)
    del tensor
    assert outstanding(manager) == 0


def test_a_frame_evaluator_changes_neither_answer():
    """torch.compile sets a PEP 523 evaluator, under which every call holds its arguments once more."""
    set_eval_frame = torch._C._dynamo.eval_frame.set_eval_frame
    manager = AttentionBufferManager()
    alone, seen = manager.allocate(TEMP, SHAPE), manager.allocate(TEMP, SHAPE)
    alias = seen
    previous = set_eval_frame(False)  # set, and no frame is compiled
    try:
        manager.deallocate(alone, TEMP)
        manager.deallocate(seen, TEMP)
    finally:
        set_eval_frame(previous)
    assert (alone.shape, alias.shape) == ((0,), SHAPE)


def test_calibration_steps_aside(monkeypatch: pytest.MonkeyPatch):
    """Without a GIL, without torch's counters, or with counters that see nothing, there are no counts to trust."""
    calibrate = fresh_counts.__wrapped__
    assert calibrate() == fresh_counts()
    monkeypatch.setattr("sys._is_gil_enabled", lambda: False, raising=False)
    assert calibrate() is None
    monkeypatch.undo()
    monkeypatch.setattr("torch._C._storage_Use_Count", lambda _: 1)
    assert calibrate() is None
    monkeypatch.delattr("torch._C._storage_Use_Count")
    assert calibrate() is None
