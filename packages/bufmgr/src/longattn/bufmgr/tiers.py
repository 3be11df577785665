"""Two tiers for tensors of which few are in use at a time: a device, within a budget, and host memory for what is idle."""

# The two classes here share their state.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import math
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from longattn.bufmgr.checks import check_kind, check_whole, describe
from longattn.bufmgr.manager import AttentionBufferManager
from longattn.bufmgr.spec import BufferType


class TieredBuffers:
    """Keeps tensors on their device up to `max_device_bytes`; over it, the idle ones used longest ago wait in host memory.

    Args:
        max_device_bytes: of all tensors held, idle or in use. Those in use stay in any case.
        manager: lends COMM buffers for what moved out, page-locked where there is CUDA, and CACHE buffers for what comes back. Default a
            new one.

    For key-value caches of conversations that pause, say::

        tiers = TieredBuffers(max_device_bytes=2 * 2**30)
        keys = tiers.hold(torch.randn(1, 32768, 8, 64))   # keep no other reference to it
        with keys.use() as tensor:                        # on its device until the block ends
            tensor.mul_(2)

    Copies to and from page-locked memory are ordered by the current stream and do not wait. Safe to use from any thread. Raises TypeError
    or ValueError naming the parameter. On CUDA this was never run; tests use the CPU as the device, where moving gains nothing.
    """

    def __init__(self, max_device_bytes: int, manager: AttentionBufferManager | None = None) -> None:
        self._budget = check_whole("max_device_bytes", max_device_bytes)
        if manager is not None:
            check_kind("manager", manager, AttentionBufferManager, "an AttentionBufferManager or None")
        self._manager = AttentionBufferManager() if manager is None else manager
        self._lock = threading.RLock()
        self._held: dict[TieredBuffer, None] = {}  # the one used longest ago first
        self._moved_out = self._moved_back = 0

    def hold(self, tensor: torch.Tensor) -> TieredBuffer:
        """Take over a contiguous tensor; the caller drops its own reference, or the memory stays on the device with it.

        Raises TypeError for no tensor, ValueError for one that is not contiguous, or whose gradient is recorded.
        """
        check_kind("tensor", tensor, torch.Tensor, "a tensor")
        if tensor.layout is not torch.strided or not tensor.is_contiguous() or tensor.requires_grad:
            raise ValueError(
                f"tensor must be contiguous and without gradient, got {describe(tensor)}, {tensor.layout}, requires_grad={tensor.requires_grad}"
            )
        buffer = TieredBuffer(self, tensor)
        with self._lock:
            self._held[buffer] = None
            self._make_room()
        return buffer

    def get_stats(self) -> dict[str, Any]:
        """`device_bytes host_bytes held in_use moved_out moved_back max_device_bytes`; moved_* count tensors."""
        with self._lock:
            return {
                "device_bytes": sum(buffer.nbytes for buffer in self._held if buffer.on_device),
                "host_bytes": sum(buffer.nbytes for buffer in self._held if not buffer.on_device),
                "held": len(self._held),
                "in_use": sum(buffer._users > 0 for buffer in self._held),
                "moved_out": self._moved_out,
                "moved_back": self._moved_back,
                "max_device_bytes": self._budget,
            }

    def move_out_idle(self) -> int:
        """Move every idle tensor to host memory; return how many bytes of devices that frees."""
        with self._lock:
            return self._make_room(budget=0)

    def _make_room(self, budget: int | None = None) -> int:
        over = sum(buffer.nbytes for buffer in self._held if buffer.on_device)
        over -= self._budget if budget is None else budget
        freed = 0
        for buffer in [buffer for buffer in self._held if buffer.on_device]:
            if freed >= over:
                break
            if buffer._move_out():
                freed += buffer.nbytes
                self._moved_out += 1
        return freed

    def _take(self, buffer: TieredBuffer) -> torch.Tensor:
        with self._lock:
            if buffer not in self._held:
                raise ValueError("buffer must be held, got one that was dropped")
            self._held[buffer] = self._held.pop(buffer)  # the latest used is the last
            if not buffer.on_device:
                try:
                    tensor = buffer._move_back()
                except torch.OutOfMemoryError:
                    self._make_room(budget=0)
                    tensor = buffer._move_back()
                self._moved_back += 1
            else:
                tensor = buffer._tensor
            assert tensor is not None
            buffer._users += 1
            self._make_room()
            return tensor

    def _give_back(self, buffer: TieredBuffer) -> None:
        with self._lock:
            buffer._users -= 1
            self._make_room()

    def _drop(self, buffer: TieredBuffer) -> None:
        with self._lock:
            self._held.pop(buffer, None)


class TieredBuffer:
    """A tensor that `TieredBuffers.hold` took over. shape, dtype, device: the tensor's; nbytes: its bytes."""

    def __init__(self, tiers: TieredBuffers, tensor: torch.Tensor) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.nbytes = math.prod(tensor.shape) * tensor.element_size()
        self._tiers = tiers
        self._tensor: torch.Tensor | None = tensor
        self._host: torch.Tensor | None = None
        self._copied: Any = None  # the CUDA event after the copy to host memory
        self._users = 0

    @property
    def on_device(self) -> bool:
        """Whether it is on its device now."""
        return self._tensor is not None

    @contextmanager
    def use(self) -> Generator[torch.Tensor]:
        """A context that gives the tensor, on its device, where it stays until the context ends. What is written to it is kept.

        Raises ValueError after `drop`; MemoryError or torch.OutOfMemoryError where the device has no room even with every idle tensor moved out.
        """
        tensor = self._tiers._take(self)
        try:
            yield tensor
        finally:
            del tensor
            self._tiers._give_back(self)

    def drop(self) -> None:
        """Give its memory back; a context that is open keeps the tensor until it ends."""
        self._tiers._drop(self)
        self._tensor = self._host = None

    def _move_out(self) -> bool:
        tensor = self._tensor
        if tensor is None or self._users:
            return False
        host = self._tiers._manager.allocate(BufferType.COMM, self.shape, self.dtype, "cpu", zero_init=False)
        overlapped = tensor.is_cuda and host.is_pinned()
        host.copy_(tensor, non_blocking=overlapped)
        if overlapped:
            stream = torch.cuda.current_stream(tensor.device)
            tensor.record_stream(
                stream
            )  # its memory may belong to another stream, which must not reuse it before the copy
            self._copied = stream.record_event()
        self._host, self._tensor = host, None
        return True

    def _move_back(self) -> torch.Tensor:
        host = self._host
        assert host is not None
        tensor = self._tiers._manager.allocate(BufferType.CACHE, self.shape, self.dtype, self.device, zero_init=False)
        if self._copied is not None:
            self._copied.wait(torch.cuda.current_stream(tensor.device))
            self._copied = None
        tensor.copy_(host, non_blocking=tensor.is_cuda and host.is_pinned())
        self._tensor, self._host = tensor, None
        return tensor
