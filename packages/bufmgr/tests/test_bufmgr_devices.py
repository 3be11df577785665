"""Where buffers are: defaults, forms of one device, devices where torch recycles, modes in which a manager steps aside."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longattn.bufmgr import AttentionBufferManager, BufferType, MemoryPool
from longattn.bufmgr.leasing import release
from longattn.bufmgr.leasing.lease import Lease
from longattn.bufmgr.request import BufferRequest, resolve_device

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
    manager.deallocate(manager.allocate(Q, (8,)), Q)  # host memory has no stream
    manager.deallocate(manager.allocate(Q, (16,), device="meta"), Q)
    assert sizes == [16]


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with two CUDA devices is faked: their tensors are on the CPU, and requests of 4096 bytes and more are refused on the second.

    Returns what was asked of torch's pools of memory.
    """
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.current_device_index", lambda: 0)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    asked: list[str] = []

    class Pool:
        def __init__(self) -> None:
            self.number = asked.count("a pool")
            asked.append("a pool")

        def snapshot(self) -> list[dict[str, int]]:
            return [{"total_size": 2**21, "allocated_size": 256 * (self.number + 1)}] * 2

    @contextmanager
    def use(pool: Pool, device: torch.device) -> Iterator[None]:
        asked.append(f"pool {pool.number} on {device}")
        yield

    def lend(lease: Lease, request: BufferRequest, *, pinned: bool) -> torch.Tensor:
        if request.device.index == 1 and request.nbytes >= 4096:
            raise torch.OutOfMemoryError("CUDA out of memory")
        tensor = torch.empty(request.shape, dtype=request.dtype)
        lease.start(tensor.untyped_storage(), tensor)
        return tensor

    monkeypatch.setattr("torch.cuda.MemPool", Pool)
    monkeypatch.setattr("torch.cuda.use_mem_pool", use)
    monkeypatch.setattr("longattn.bufmgr.leasing.book.lend_from_torch", lend)
    return asked


def test_two_faked_devices_are_counted_apart(two_gpus: list[str]):
    """Each has its own statistics; a refusal on one changes neither what it holds nor the other."""
    pool = MemoryPool()
    held = [pool.empty((64 * (index + 1),), torch.float32, f"cuda:{index}") for index in (0, 1)]
    again = pool.empty((8,), torch.float32, "cuda")
    devices = pool.get_stats()["devices"]
    assert {name: devices[name]["current_bytes"] for name in ("cuda:0", "cuda:1")} == {"cuda:0": 288, "cuda:1": 512}
    for source in (pool, AttentionBufferManager(upstream=pool)):
        with pytest.raises(torch.OutOfMemoryError) as caught:
            source.empty((1024,), torch.float32, "cuda:1")
        assert "in use: 0.00 MiB in" in caught.value.__notes__[0]
    assert pool.empty((1024,), torch.float32, "cuda:0").numel() == 1024
    pool.release(held[0])
    del held, again
    devices = pool.get_stats()["devices"]
    assert [devices[f"cuda:{index}"]["current_bytes"] for index in (0, 1)] == [0, 0]
    assert [devices[f"cuda:{index}"]["total_count"] for index in (0, 1)] == [3, 1]
    assert two_gpus == []


def test_each_faked_device_has_a_pool_of_torchs(two_gpus: list[str]):
    """Made when first used, and counted; host memory and a manager without the option use none."""
    manager = AttentionBufferManager(device_pools=True)
    held = [manager.allocate(Q, (64,), torch.float32, device) for device in ("cuda:0", "cuda:1", "cuda", "cpu")]
    assert two_gpus == ["a pool", "pool 0 on cuda:0", "a pool", "pool 1 on cuda:1", "pool 0 on cuda:0"]
    sizes = {f"cuda:{n}": {"reserved_bytes": 2**22, "allocated_bytes": 512 * (n + 1)} for n in (0, 1)}
    assert manager.get_stats()["device_pools"] == sizes
    other = AttentionBufferManager()
    other.deallocate(other.allocate(Q, (64,), torch.float32, "cuda:0"), Q)
    assert (len(two_gpus), len(held), other.get_stats()["device_pools"]) == (5, 4, {})


def test_mps_is_torchs_own_memory_where_there_is_any(monkeypatch: pytest.MonkeyPatch):
    """Elsewhere it is refused by name; where it is the accelerator, it is a device like CUDA: one index, no slots, no pool of ours."""
    with pytest.raises(ValueError, match="device must be 'cpu' or 'meta'.* on this machine, got 'mps'"):
        AttentionBufferManager().allocate(Q, (8,), device="mps")
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: torch.device("mps"))
    monkeypatch.setattr("torch.accelerator.current_device_index", lambda: 0)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 1)
    assert resolve_device("mps") == torch.device("mps", 0)


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
