"""`PagePool`: memory of keys and values in pages that streams take, share and give back, so that it does not fragment."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt
import torch

from longattn.attention.streaming.slot_buffer import SlotBuffer, Storage
from longattn.attention.validate import check_size
from longattn.kernels.interface import PagedCache

Pages = npt.NDArray[np.int32]

PAGE_SIZE = 64
"""Slots of a page, where nothing else is asked for."""


class PagePool:
    """Pages of slots for the keys and values of one kv head each, and how many streams hold each page.

    `StreamingAttention.new_pool` makes one. A page is free, or held by one stream or, after `fork` and `admit`, by several, who copy it before they
    write. Free pages are taken lowest first.

    Args:
        widths: of keys and of values. dtype, device, storage: of what is written, as in `StreamingAttention`.
        pages: how many there are, all at once. Default None: as many as are needed, more when none is free.
        page_size: slots of a page, a power of two. Default 64.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """

    def __init__(
        self,
        widths: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        storage: Storage | None,
        pages: int | None = None,
        page_size: int = PAGE_SIZE,
    ) -> None:
        if check_size("page_size", page_size) & (page_size - 1):
            raise ValueError(f"page_size must be a power of two, got {page_size}")
        self.widths, self.dtype, self.device, self.page_size = widths, dtype, device, page_size
        self.storage: Storage | None = storage
        self.limit = None if pages is None else check_size("pages", pages)
        self.keys: SlotBuffer = SlotBuffer((0, page_size, widths[0]), dtype, device, storage)
        self.values: SlotBuffer = SlotBuffer((0, page_size, widths[1]), dtype, device, storage)
        self._holders = np.zeros(0, np.int32)
        self._free: list[int] = []
        self._grow(self.limit or 0)

    def __repr__(self) -> str:
        most = "" if self.limit is None else f" of {self.limit}"
        return f"PagePool({self.pages_held}{most} pages held, page_size={self.page_size}, dtype={self.dtype}, device='{self.device}')"

    @property
    def pages_held(self) -> int:
        """Pages that some stream holds, each counted once."""
        return len(self._holders) - len(self._free)

    @property
    def page_nbytes(self) -> int:
        """Bytes of a page: its keys, values and scales."""
        parts = [part for buffer in (self.keys, self.values) for part in buffer.parts.values()]
        return self.page_size * sum(part.shape[2] * part.element_size() for part in parts)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, free ones included."""
        return self.keys.nbytes + self.values.nbytes

    def holders(self, pages: Pages) -> npt.NDArray[np.int32]:
        """How many streams hold each of some pages."""
        return self._holders[pages]

    def ensure(self, count: int) -> None:
        """See that so many pages are free.

        Raises:
            MemoryError: the pool has a number of pages, and fewer are free. Nothing has changed.
        """
        if count <= len(self._free):
            return
        if self.limit is not None:
            raise MemoryError(
                f"the pool of pages has {len(self._free)} free of {self.limit} pages where {count} are needed: end streams "
                f"(state.clear), or make a pool of more pages"
            )
        there = len(self._holders)
        needed = there + count - len(self._free)
        self._grow(max(needed, min(2 * there, needed + needed // 8)))

    def take(self, count: int) -> Pages:
        """So many pages, now held once."""
        self.ensure(count)
        pages = np.array([heapq.heappop(self._free) for _ in range(count)], np.int32)
        self._holders[pages] = 1
        return pages

    def share(self, pages: Pages) -> None:
        """One more stream holds each of these."""
        np.add.at(self._holders, pages, 1)

    def release(self, pages: Pages) -> None:
        """One stream less holds each of these; those that nobody holds are free."""
        np.subtract.at(self._holders, pages, 1)
        for page in np.unique(pages[self._holders[pages] == 0]).tolist():
            heapq.heappush(self._free, page)

    def copy(self, pages: Pages, source: PagePool | None = None) -> Pages:
        """Pages with what lies in these ones of `source`, default this pool; now held once."""
        taken = self.take(len(pages))
        here, there = (torch.as_tensor(x, dtype=torch.int64, device=self.device) for x in (taken, pages))
        for name in ("keys", "values"):
            buffer: SlotBuffer = getattr(self, name)
            buffer.copy_from(getattr(source or self, name), here, there)
        return taken

    def move(self, device: torch.device) -> None:
        """Bring all pages to another device. The memory they had is the global pool's again."""
        if device != self.keys.numbers.device:
            self.keys, self.values = (x.grown(len(x.numbers), device) for x in (self.keys, self.values))

    def cache(self) -> PagedCache:
        """The pages, as kernels take them."""
        scales = (None if x.scales is None else x.scales.flatten(1) for x in (self.keys, self.values))
        return PagedCache(self.keys.stored, self.values.stored, *scales)

    def _grow(self, pages: int) -> None:
        there = len(self._holders)
        self.keys, self.values = self.keys.grown(pages), self.values.grown(pages)
        self._holders = np.pad(self._holders, (0, pages - there))
        for page in range(there, pages):
            heapq.heappush(self._free, page)
