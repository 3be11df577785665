"""`SlotBuffer`: keys or values in slots, as they are or as numbers of 8 bits with a scale for each slot and head.

Rounding, where A > 0 is the largest abs(x) of a row of one head:

* "int8": x is stored as round(127 x / A), and is off by at most A / 254.
* "fp8": 448 x / A is stored as float8_e4m3fn, three bits after the point, and x is off by at most max(abs(x) / 16, A / (448 * 1024)).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from longattn.bufmgr import get_global_memory_pool

Storage = Literal["int8", "fp8"]

LARGEST: dict[str, float] = {"int8": 127.0, "fp8": 448.0}
"""What the largest number of a row is stored as."""


class SlotBuffer:
    """(batch, kv_heads, slots, width) numbers, zero where nothing was written.

    Args:
        shape: of it. dtype: what is written and read. storage: how it lies; None: in that dtype.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, storage: Storage | None
    ) -> None:
        self.dtype = dtype
        self.storage: Storage | None = storage
        self.numbers = _zeros(shape, dtype if storage is None else torch.int8, device)
        self.scales = None if storage is None else _zeros((*shape[:3], 1), torch.float32, device)

    @property
    def parts(self) -> dict[str, Tensor]:
        """Its tensors, by name."""
        return {"numbers": self.numbers} | ({} if self.scales is None else {"scales": self.scales})

    @property
    def nbytes(self) -> int:
        """Bytes of numbers and scales."""
        return sum(part.nbytes for part in self.parts.values())

    def like(self, batch: int, slots: int) -> SlotBuffer:
        """A zero one of another batch and number of slots."""
        _, heads, _, width = self.numbers.shape
        return SlotBuffer((batch, heads, slots, width), self.dtype, self.numbers.device, self.storage)

    def copy_from(self, other: SlotBuffer, here: Any, there: Any) -> None:
        """What `other` has at index `there` goes to index `here`."""
        for name, part in self.parts.items():
            part[here] = other.parts[name][there]

    def put(self, index: Any, rows: Tensor) -> None:
        """Write rows (..., width)."""
        if self.storage is None:
            self.numbers[index] = rows
            return
        assert self.scales is not None
        rows = rows.float()
        scales = rows.abs().amax(-1, keepdim=True) / LARGEST[self.storage]
        stored = rows / torch.where(scales == 0, 1.0, scales)
        if self.storage == "int8":
            self.numbers[index] = stored.round().to(torch.int8)
        else:
            self.numbers[index] = stored.to(torch.float8_e4m3fn).view(torch.int8)
        self.scales[index] = scales

    def read(self, index: Any) -> Tensor:
        """What lies at an index: a view, or where it is stored otherwise, a copy in `dtype`."""
        numbers = self.numbers[index]
        if self.scales is None:
            return numbers
        numbers = numbers.view(torch.float8_e4m3fn) if self.storage == "fp8" else numbers
        return (numbers.float() * self.scales[index]).to(self.dtype)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Of type CACHE. Slots that hold nothing are read, and 0 * NaN is NaN."""
    # A state outlives the mode it was made in; an inference tensor could not be written elsewhere.
    with torch.inference_mode(False):
        return get_global_memory_pool().empty(shape, dtype, device, "cache").zero_()
