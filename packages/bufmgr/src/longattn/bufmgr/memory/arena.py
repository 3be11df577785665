"""Large blocks of host memory: best fit with coalescing, over a few big private mappings.

The life of memory here:
1. A segment is mapped, which takes address space only. Its pages are clean: they are zero and take no memory.
2. `allocate` takes a block from the free run that needs the fewest clean pages, and of those from the smallest.
3. `deallocate` makes the block's pages a dirty free piece, which joins its dirty neighbours. A run is a row of free
   pieces, clean or dirty; a block may lie over several.
4. Dirty free pieces go back to the system (they become clean) when new pages would otherwise raise the bytes held over the
   peak of the bytes in use, and in `trim`, which also unmaps segments that are free as a whole.

So the bytes held (in use + dirty) exceed the peak in use by at most 2 %, however blocks of different sizes are mixed. Before
new pages are touched over that bound, `reclaim` is called for free blocks in caches.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any

from longattn.bufmgr.checks import check_flag, check_whole
from longattn.bufmgr.log import LOGGER
from longattn.bufmgr.memory.allocator import (
    Allocator,
    Block,
    SystemAllocator,
    check_block,
    check_upstream,
    private_mapping,
)
from longattn.bufmgr.memory.forking import Gate
from longattn.bufmgr.memory.segment import DROPS_PAGES, Segment, round_to_pages

LARGE_BYTES = 64 * 1024
"""Blocks of this size and larger come from an arena's segments; smaller ones would waste too much of a page."""

_SLACK = 0.015  # together with rounding to pages under 2 %
_FLOOR_BYTES = 8 << 20
# Clean pages take address space only, where the system can take single pages back.
_SEGMENT_BYTES = 1 << 30 if DROPS_PAGES else 64 << 20


class ArenaBlock(Block):
    """A block that is a part of a segment."""

    __slots__ = ("segment", "start")

    def __init__(self, segment: Segment, start: int, nbytes: int, *, zeroed: bool) -> None:
        super().__init__(segment.view(start, nbytes), zeroed=zeroed)
        self.segment = segment
        self.start = start


class ArenaAllocator:
    """An Allocator for large blocks; small ones come from `upstream`.

    upstream: for blocks under 64 KiB. Default SystemAllocator(). limit_bytes: most bytes in use at once, default no
    limit. floor_bytes: this much may always be held, default 8 MiB. huge_pages: ask for them (True), against them
    (False), or leave it to the system (None, default).
    """

    def __init__(
        self,
        upstream: Allocator | None = None,
        *,
        limit_bytes: int | None = None,
        floor_bytes: int = _FLOOR_BYTES,
        huge_pages: bool | None = None,
    ) -> None:
        if upstream is not None:
            check_upstream(upstream)
        if limit_bytes is not None:
            check_whole("limit_bytes", limit_bytes)
        check_whole("floor_bytes", floor_bytes)
        if huge_pages is not None:
            check_flag("huge_pages", huge_pages)
        self.upstream: Allocator = SystemAllocator() if upstream is None else upstream
        self.limit_bytes = limit_bytes
        self.floor_bytes = floor_bytes
        self.huge_pages = huge_pages
        self.reclaim: Callable[[int], int] = _reclaim_nothing
        self.in_use = 0
        self.peak_in_use = 0
        self._segments: list[Segment] = []
        self._gate = Gate()
        self._pending: deque[ArenaBlock] = deque()

    def __reduce__(self) -> tuple[Callable[..., ArenaAllocator], tuple[Allocator]]:
        # A copy, pickled ones included, is an empty arena with the same limits.
        options = {name: getattr(self, name) for name in ("limit_bytes", "floor_bytes", "huge_pages")}
        return functools.partial(type(self), **options), (self.upstream,)

    @property
    def dirty_bytes(self) -> int:
        """Bytes of free pages that were written to and are still held."""
        return sum(segment.dirty for segment in self._segments)

    @property
    def held_bytes(self) -> int:
        """Bytes in use or dirty: at most this much of the arena is resident."""
        return self.in_use + self.dirty_bytes

    @property
    def mapped_bytes(self) -> int:
        """Bytes of address space."""
        return sum(segment.nbytes for segment in self._segments)

    def allocate(self, nbytes: int) -> Block:
        """Return a block of exactly `nbytes`, on a page of its own from 64 KiB on. Raises MemoryError."""
        check_whole("nbytes", nbytes, 1)
        if nbytes < LARGE_BYTES:
            return self.upstream.allocate(nbytes)
        size = round_to_pages(nbytes)
        if not self._gate.enter(blocking=True):
            # A finaliser called this while the garbage collector ran inside one of the lines below.
            return self.upstream.allocate(nbytes)
        try:
            self._settle()
            block = self._cut(nbytes, size, may_grow=False)
        finally:
            self._gate.leave()
        while block is None:
            came_back = self.reclaim(size)  # outside the gate: it ends in `deallocate`
            if not self._gate.enter(blocking=True):
                return self.upstream.allocate(nbytes)
            try:
                self._settle()
                block = self._cut(nbytes, size, may_grow=not came_back)
            finally:
                self._gate.leave()
        return block

    def deallocate(self, block: Block) -> None:
        """Take a block back. Never waits: if another thread is inside, that thread or the next one moves the block on."""
        check_block(block)
        if not isinstance(block, ArenaBlock):
            self.upstream.deallocate(block)
            return
        block.memory = memoryview(b"")
        self._pending.append(block)
        while self._pending and self._gate.enter(blocking=False):
            try:
                self._settle()
            finally:
                self._gate.leave()

    def trim(self) -> int:
        """Give every free page back to the system and unmap segments that are free; return the bytes given back."""
        if not self._gate.enter(blocking=True):
            return 0
        try:
            self._settle()
            freed = self._clean(self.dirty_bytes)
            self._segments = [segment for segment in self._segments if segment.in_use]
        finally:
            self._gate.leave()
        return freed

    def snapshot(self) -> list[dict[str, Any]]:
        """Return one dict for each segment: total_size, allocated_size, and its blocks by offset, size and state."""
        if not self._gate.enter(blocking=True):
            return []
        try:
            self._settle()
            return [segment.snapshot() for segment in self._segments]
        finally:
            self._gate.leave()

    def _settle(self) -> None:
        while self._pending:
            block = self._pending.popleft()
            size = round_to_pages(block.nbytes)
            block.segment.give(block.start, size)
            self.in_use -= size

    def _cut(self, nbytes: int, size: int, *, may_grow: bool) -> ArenaBlock | None:
        """Return a block, or None if it needs new pages over the bound and `may_grow` is False."""
        if self.limit_bytes is not None and self.in_use + size > self.limit_bytes:
            if may_grow:
                raise MemoryError(f"{size} bytes over {self.in_use} in use would pass the limit of {self.limit_bytes}")
            return None
        places = [(*place, index) for index, segment in enumerate(self._segments) if (place := segment.fit(size))]
        clean, _, start, index = min(places, default=(size, 0, 0, -1))
        bound = max(self.floor_bytes, int(self.peak_in_use * (1 + _SLACK)))
        over = self.held_bytes + clean - bound
        if clean and over > 0 and not may_grow:
            return None
        if index < 0:
            segment, start = self._map(size), 0
            self._segments.append(segment)
        else:
            segment = self._segments[index]
        zeroed = segment.take(start, size)
        if clean and over > 0:
            # Other pages go back before the new ones are touched, so mixed sizes cost time and not memory.
            self._clean(over)
        self.in_use += size
        if may_grow:
            # Caches had no free block left to give, so this is a peak of bytes in use.
            self.peak_in_use = max(self.peak_in_use, self.in_use)
        return ArenaBlock(segment, start, nbytes, zeroed=zeroed)

    def _clean(self, nbytes: int) -> int:
        """Give dirty free pages back to the system, until they are `nbytes` or none is left; return their bytes."""
        freed = 0
        for segment in self._segments:
            if freed < nbytes:
                freed += segment.clean(nbytes - freed)
        return freed

    def _map(self, size: int) -> Segment:
        segment = self._try_map(max(_SEGMENT_BYTES, size)) or self._try_map(size)
        if segment is not None:
            return segment
        # Segments that are free as a whole, and dirty pages, may be what the system lacks.
        freed = self._clean(self.dirty_bytes)
        self._segments = [segment for segment in self._segments if segment.in_use]
        segment = self._try_map(size)
        if segment is None:
            raise MemoryError(f"the system refused {size} bytes ({size / 2**30:.2f} GiB), after giving back {freed}")
        return segment

    def _try_map(self, nbytes: int) -> Segment | None:
        try:
            return Segment(private_mapping(nbytes), nbytes, self.huge_pages)
        except (OSError, OverflowError) as error:
            LOGGER.debug("arena: the system refused to map %d bytes: %s", nbytes, error)
            return None

    def check_valid(self) -> None:
        """Assert the invariants: pieces tile each segment's free part, sums are right, the bound holds."""
        if self._gate.enter(blocking=True):
            try:
                self._settle()
                for segment in self._segments:
                    segment.check_valid()
                assert self.in_use == sum(segment.in_use for segment in self._segments)
            finally:
                self._gate.leave()
        assert self.limit_bytes is None or self.in_use <= self.limit_bytes


def _reclaim_nothing(nbytes: int) -> int:
    return 0
