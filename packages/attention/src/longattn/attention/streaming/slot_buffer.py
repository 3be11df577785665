"""`SlotBuffer`: keys or values in pages of slots, as they are or as numbers of 8 bits with a scale for each slot and head.

Rounding, where A > 0 is the largest abs(x) of a row of one head:

* "int8": x is stored as round(127 x / A), and is off by at most A / 254.
* "fp8": 448 x / A is stored as float8_e4m3fn, three bits after the point, and x is off by at most max(abs(x) / 16, A / (448 * 1024)).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from longattn.bufmgr import get_global_memory_pool

Storage = Literal["int8", "fp8"]

LARGEST: dict[str, float] = {"int8": 127.0, "fp8": 448.0}
"""What the largest number of a row is stored as."""


class SlotBuffer:
    """(pages, page_size, width) numbers.

    Args:
        shape: of it. dtype: what is written and read. storage: how it lies; None: in that dtype.
    """

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, storage: Storage | None
    ) -> None:
        self.dtype = dtype
        self.storage: Storage | None = storage
        self.numbers = _zeros(shape, dtype if storage is None else torch.int8, device)
        self.scales = None if storage is None else _zeros((*shape[:2], 1), torch.float32, device)

    @property
    def parts(self) -> dict[str, Tensor]:
        """Its tensors, by name."""
        return {"numbers": self.numbers} | ({} if self.scales is None else {"scales": self.scales})

    @property
    def nbytes(self) -> int:
        """Bytes of numbers and scales."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def stored(self) -> Tensor:
        """The numbers in the dtype that they are stored in."""
        return self.numbers.view(torch.float8_e4m3fn) if self.storage == "fp8" else self.numbers

    def grown(self, pages: int, device: torch.device | None = None) -> SlotBuffer:
        """One of so many pages, with what this one holds in the first of them; on another device, if one is given."""
        device = self.numbers.device if device is None else device
        _, page_size, width = self.numbers.shape
        larger = SlotBuffer((pages, page_size, width), self.dtype, device, self.storage)
        for name, part in self.parts.items():
            larger.parts[name][: len(part)] = part
        return larger

    def copy_from(self, other: SlotBuffer, here: Tensor, there: Tensor) -> None:
        """The pages `there` of another of this storage go to the pages `here`."""
        for name, part in self.parts.items():
            part[here] = other.parts[name][there]

    def put(self, slots: Tensor, rows: Tensor) -> None:
        """Write rows (..., width) into slots (...), numbered through all pages."""
        numbers = self.numbers.flatten(0, 1)
        if self.storage is None:
            numbers[slots] = rows
            return
        assert self.scales is not None
        rows = rows.float()
        scales = rows.abs().amax(-1, keepdim=True) / LARGEST[self.storage]
        stored = rows / torch.where(scales == 0, 1.0, scales)
        if self.storage == "int8":
            numbers[slots] = stored.round().to(torch.int8)
        else:
            numbers[slots] = stored.to(torch.float8_e4m3fn).view(torch.int8)
        self.scales.flatten(0, 1)[slots] = scales

    def read(self, slots: Tensor) -> Tensor:
        """What lies in slots (...), numbered through all pages: (..., width), a copy in `dtype`."""
        numbers = self.numbers.flatten(0, 1)[slots]
        if self.scales is None:
            return numbers
        numbers = numbers.view(torch.float8_e4m3fn) if self.storage == "fp8" else numbers
        return (numbers.float() * self.scales.flatten(0, 1)[slots]).to(self.dtype)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Of type CACHE. Slots that hold nothing are read, and 0 * NaN is NaN."""
    # A state outlives the mode it was made in; an inference tensor could not be written elsewhere.
    with torch.inference_mode(False):
        return get_global_memory_pool().empty(shape, dtype, device, "cache").zero_()
