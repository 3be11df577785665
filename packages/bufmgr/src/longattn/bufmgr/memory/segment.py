"""One large private mapping: which of its pages are free, and which of the free ones were written to.

Free pieces are kept in order of address. Neighbouring pieces of one kind, clean or dirty, are joined; neighbours of
different kinds form a run. The bytes that are in no piece are in use.
"""

from __future__ import annotations

import bisect
import mmap
import sys
from dataclasses import dataclass
from typing import Any

PAGE = 4096

DROPS_PAGES = sys.platform == "linux"
"""Whether MADV_DONTNEED gives pages back at once and makes them zero. Other systems have the name, but keep the content."""


@dataclass(eq=False)
class Piece:
    """Free bytes [start, end). dirty: they may have been written to; else they are zero and take no memory."""

    start: int
    end: int
    dirty: bool


def round_to_pages(nbytes: int) -> int:
    """Return the bytes of the pages that hold `nbytes`."""
    return -(-nbytes // PAGE) * PAGE


class Segment:
    """A mapping and its free pieces. All offsets and sizes are multiples of a page, except in `view`."""

    def __init__(self, mapping: mmap.mmap, nbytes: int, huge_pages: bool | None = None) -> None:
        self.nbytes = nbytes
        self.dirty = 0
        self.in_use = 0
        self._mapping = mapping
        self._pieces = [Piece(0, nbytes, dirty=False)]
        advice = {True: "MADV_HUGEPAGE", False: "MADV_NOHUGEPAGE"}
        if huge_pages is not None and hasattr(mmap, advice[huge_pages]):
            mapping.madvise(getattr(mmap, advice[huge_pages]))

    def view(self, start: int, nbytes: int) -> memoryview:
        """Return the bytes [start, start + nbytes)."""
        return memoryview(self._mapping)[start : start + nbytes]

    def fit(self, size: int) -> tuple[int, int, int] | None:
        """Return (clean bytes it takes, length of the run, offset) of the best place for `size` bytes, or None."""
        best: tuple[int, int, int] | None = None
        for run in self._runs():
            start, end = run[0].start, run[-1].end
            if end - start < size:
                continue
            for offset in {start, end - size}:
                dirty = sum(_overlap(piece, offset, offset + size) for piece in run if piece.dirty)
                place = (size - dirty, end - start, offset)
                best = place if best is None else min(best, place)
        return best

    def take(self, start: int, size: int) -> bool:
        """Take [start, start + size) out of the free pieces; return whether every byte of it is zero."""
        end = start + size
        zero = True
        remaining: list[Piece] = []
        for piece in self._pieces:
            shared = _overlap(piece, start, end)
            if not shared:
                remaining.append(piece)
                continue
            if piece.dirty:
                zero = False
                self.dirty -= shared
            if piece.start < start:
                remaining.append(Piece(piece.start, start, piece.dirty))
            if piece.end > end:
                remaining.append(Piece(end, piece.end, piece.dirty))
        self._pieces = remaining
        self.in_use += size
        return zero

    def give(self, start: int, size: int) -> None:
        """Make [start, start + size) free and dirty."""
        self.in_use -= size
        self.dirty += size
        bisect.insort(self._pieces, Piece(start, start + size, dirty=True), key=lambda piece: piece.start)
        self._join()

    def clean(self, nbytes: int) -> int:
        """Give dirty free pages back to the system, up to `nbytes`; return their bytes."""
        if not DROPS_PAGES:
            return 0
        freed = 0
        # The largest first: that takes the fewest calls, and small holes between blocks stay resident.
        for piece in sorted((piece for piece in self._pieces if piece.dirty), key=lambda p: p.start - p.end):
            if freed >= nbytes:
                break
            size = min(piece.end - piece.start, round_to_pages(nbytes - freed))
            start = piece.end - size
            self._mapping.madvise(mmap.MADV_DONTNEED, start, size)
            bisect.insort(self._pieces, Piece(start, piece.end, dirty=False), key=lambda piece: piece.start)
            piece.end = start
            if not start > piece.start:
                self._pieces.remove(piece)
            freed += size
        self.dirty -= freed
        self._join()
        return freed

    def snapshot(self) -> dict[str, Any]:
        """Return the segment in the form of torch.cuda.memory_snapshot; neighbouring blocks in use are one entry."""
        blocks: list[dict[str, Any]] = []
        position = 0
        for piece in [*self._pieces, Piece(self.nbytes, self.nbytes, dirty=False)]:
            if piece.start > position:
                blocks.append({"offset": position, "size": piece.start - position, "state": "active_allocated"})
            if piece.end > piece.start:
                state = "inactive" if piece.dirty else "unmapped"
                blocks.append({"offset": piece.start, "size": piece.end - piece.start, "state": state})
            position = piece.end
        return {"total_size": self.nbytes, "allocated_size": self.in_use, "dirty_size": self.dirty, "blocks": blocks}

    def _runs(self) -> list[list[Piece]]:
        runs: list[list[Piece]] = []
        for piece in self._pieces:
            if runs and runs[-1][-1].end == piece.start:
                runs[-1].append(piece)
            else:
                runs.append([piece])
        return runs

    def _join(self) -> None:
        joined: list[Piece] = []
        for piece in self._pieces:
            last = joined[-1] if joined else None
            if last is not None and last.end == piece.start and last.dirty == piece.dirty:
                last.end = piece.end
            else:
                joined.append(piece)
        self._pieces = joined

    def check_valid(self) -> None:
        """Assert the invariants: pieces are in order, apart and joined, and the sums are right."""
        for left, right in zip(self._pieces, self._pieces[1:], strict=False):
            assert left.end <= right.start
            assert left.end < right.start or left.dirty != right.dirty
        assert all(0 <= piece.start < piece.end <= self.nbytes for piece in self._pieces)
        assert self.dirty == sum(piece.end - piece.start for piece in self._pieces if piece.dirty)
        assert self.in_use == self.nbytes - sum(piece.end - piece.start for piece in self._pieces)


def _overlap(piece: Piece, start: int, end: int) -> int:
    return max(0, min(piece.end, end) - max(piece.start, start))
