"""Where buffers are: defaults, forms of one device, devices where torch recycles, modes in which a manager steps aside."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longattn.bufmgr import AttentionBufferManager, BufferType
from longattn.bufmgr.leasing import release
from longattn.bufmgr.request import resolve_device

Q, TEMP = BufferType.QUERY, BufferType.TEMP


def used_bytes(manager: AttentionBufferManager) -> tuple[int, int]:
    stats = manager.get_stats()
    return stats["outstanding"], stats["cached_bytes"]


def test_defaults_follow_torch():
    """dtype None is torch's default dtype; device None is the current device context, else CPU."""
    manager = AttentionBufferManager()
    assert (manager.allocate(Q, (2,)).dtype, manager.allocate(Q, (2,)).device.type) == (torch.float32, "cpu")
    with torch.device("meta"):
        assert manager.allocate(Q, (2,)).is_meta
        assert manager.allocate(Q, (2,), device="cpu").device.type == "cpu"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert manager.allocate(Q, (2,)).dtype == torch.float64
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0), None])
def test_device_forms_are_one_key(device: Any):
    manager = AttentionBufferManager()
    manager.deallocate(manager.allocate(Q, (8,), device=torch.device("cpu")), Q)
    manager.allocate(Q, (8,), device=device)
    assert manager.get_stats()["cache_hits"] == 1


def test_accelerator_forms_are_one_device(monkeypatch: pytest.MonkeyPatch):
    """The name alone is the current device; an index beyond the last and another kind of accelerator are refused.

    The machine is faked: two devices, the second one current.
    """
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.current_device_index", lambda: 1)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    for form in ("cuda", "cuda:1", torch.device("cuda"), torch.device("cuda", 1)):
        assert resolve_device(form) == torch.device("cuda", 1)
    assert resolve_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(ValueError, match="device must have an index below 2 for cuda, got 'cuda:2'"):
        resolve_device("cuda:2")
    with pytest.raises(ValueError, match="device must be 'cpu' or 'meta' or 'cuda' on this machine, got 'xpu'"):
        resolve_device("xpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_buffers_have_the_same_rules():
    manager = AttentionBufferManager()
    tensor = manager.allocate(BufferType.OUTPUT, (64, 64), device="cuda")
    view = tensor[0]
    manager.deallocate(tensor, BufferType.OUTPUT)
    assert (tensor.any().item(), tensor.shape, used_bytes(manager)) == (False, (64, 64), (1, 0))
    del tensor, view
    assert used_bytes(manager) == (0, 0)
    other = manager.allocate(Q, (64,), device="cuda:0")
    manager.deallocate(other, Q)
    assert other.shape == (0,)
    pinned = manager.allocate(BufferType.COMM, (64,), device="cpu")
    assert pinned.is_pinned()
    manager.deallocate(pinned, BufferType.COMM)
    assert manager.get_stats()["types"]["comm"]["from_torch"] == 1


def test_a_release_tells_torch_which_stream_may_still_read(monkeypatch: pytest.MonkeyPatch):
    """The device is faked: its allocator hears of the stream that is current where the buffer is released, before the memory is dropped."""
    heard: list[object] = []
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: f"stream of {device}")
    release.note_stream(SimpleNamespace(is_cuda=True, device="cuda:1", record_stream=heard.append))  # pyright: ignore[reportArgumentType]
    assert heard == ["stream of cuda:1"]
    sizes: list[int] = []
    monkeypatch.setattr(release, "note_stream", lambda tensor: sizes.append(tensor.numel()))
    manager = AttentionBufferManager()
    manager.deallocate(manager.allocate(Q, (8,)), Q)
    assert sizes == [8]


@pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="no two accelerators here")
def test_two_devices_keep_their_buffers_apart():
    manager = AttentionBufferManager()
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    for index in (0, 1):
        tensor = manager.allocate(Q, (64,), device=torch.device(kind.type, index))
        assert tensor.device.index == index
        manager.deallocate(tensor, Q)


@pytest.mark.parametrize("shape", [(0,), (4, 0, 2)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_zero_size(shape: tuple[int, ...], device: str):
    manager = AttentionBufferManager()
    tensor = manager.allocate(BufferType.OUTPUT, shape, device=device)
    assert (tensor.shape, tensor.device.type, used_bytes(manager)) == (shape, device, (1, 0))
    manager.deallocate(tensor, BufferType.OUTPUT)
    assert used_bytes(manager) == (0, 0)
    with pytest.raises(ValueError, match="tensor must be a buffer leased here"):
        manager.deallocate(tensor, BufferType.OUTPUT)


def test_meta_buffers_have_the_same_rules():
    manager = AttentionBufferManager()
    tensor = manager.allocate(BufferType.OUTPUT, (1 << 30, 1 << 20), device="meta")
    view = tensor[0]
    with pytest.raises(ValueError, match="a view"):
        manager.deallocate(view, BufferType.OUTPUT)
    manager.deallocate(tensor, BufferType.OUTPUT)
    assert (tensor.shape, used_bytes(manager)) == ((1 << 30, 1 << 20), (1, 0))
    del tensor, view
    assert used_bytes(manager) == (0, 0)


def test_inference_mode_makes_ordinary_buffers():
    """A buffer from inside inference mode can be written with autograd and emptied outside."""
    manager = AttentionBufferManager()
    with torch.inference_mode():
        tensor = manager.allocate(BufferType.OUTPUT, (4,))
        inner = manager.allocate(TEMP, (4,))
        manager.deallocate(inner, TEMP)
    assert not tensor.is_inference()
    assert not tensor.requires_grad
    manager.deallocate(tensor, BufferType.OUTPUT)
    assert used_bytes(manager) == (0, 128)


@pytest.mark.slow
@pytest.mark.parametrize("before", [0, 2], ids=["cold", "warm"])
def test_steps_aside_in_compiled_graphs(before: int):
    """A graph takes its own memory, also where slots wait for just these requests."""
    manager = AttentionBufferManager()
    prepared = manager.prepare(TEMP, (3,), torch.float32)
    zeros = manager.prepare(TEMP, (3,), torch.float32, zero_init=True)
    for _ in range(before):
        manager.allocate(BufferType.OUTPUT, (3,))
        manager.empty((3,), torch.float32, torch.device("cpu"), "temp")
        prepared.acquire()
        zeros.acquire()
    seen = (used_bytes(manager), manager.get_stats()["cache_hits"], manager.get_stats()["cache_misses"])

    @torch.compile(fullgraph=True, backend="eager")
    def add_one(x: torch.Tensor) -> torch.Tensor:
        out = manager.allocate(BufferType.OUTPUT, (3,))
        scratch = manager.empty((3,), torch.float32, torch.device("cpu"), "temp")
        scratch.copy_(x)
        more = prepared.acquire().fill_(1.0)
        out += scratch + more + zeros.acquire()
        manager.release(scratch, "temp")
        manager.deallocate(more, TEMP)
        return out

    for _ in range(2):
        assert add_one(torch.ones(3)).tolist() == [2.0] * 3
    assert (used_bytes(manager), manager.get_stats()["cache_hits"], manager.get_stats()["cache_misses"]) == seen
