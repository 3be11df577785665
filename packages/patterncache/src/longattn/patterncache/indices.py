"""The two index forms, `Affine` and `Listed`: which rows of a tensor a branch uses.

An index names rows tile by tile: `Affine` in five integers, `Listed` in an array of run starts. Neither holds anything per element
unless asked (`rows()`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from longattn.patterncache.spans import Rows


@dataclass(frozen=True, slots=True)
class Affine:
    """rows[t, i] = start + t * tile_step + i * step, for t < tiles and i < count. Five integers, no array."""

    start: int
    tiles: int
    tile_step: int
    count: int
    step: int

    def rows(self) -> Rows:
        """(tiles, count) int64."""
        tiles = np.arange(self.tiles, dtype=np.int64)[:, None] * self.tile_step
        return self.start + tiles + np.arange(self.count, dtype=np.int64)[None] * self.step

    def narrow(self, first: int, count: int) -> Affine:
        """Members first .. first + count of every tile."""
        return Affine(self.start + first * self.step, self.tiles, self.tile_step, count, self.step)

    def tile_range(self, first: int, tiles: int) -> Affine:
        """Tiles first .. first + tiles."""
        return Affine(self.start + first * self.tile_step, tiles, self.tile_step, self.count, self.step)

    @property
    def distinct(self) -> bool:
        """No row stands in two tiles, judged from the strides alone (tiles follow one another, or interleave)."""
        if self.tiles <= 1 or self.count == 0:
            return True
        apart = self.tile_step > (self.count - 1) * self.step
        woven = self.tile_step > 0 and self.step % self.tile_step == 0 and self.tiles * self.tile_step <= self.step
        return apart or woven

    @property
    def nbytes(self) -> int:
        """Bytes of index data held: none."""
        return 0

    @property
    def wide_nbytes(self) -> int:
        """None either."""
        return 0


@dataclass(frozen=True, eq=False)
class Listed:
    """rows[t, r * run + i] = starts[t, r] + i * step: explicit run starts, each `run` rows long.

    With run = 1 it is a plain list of rows; a block-sparse row of blocks is one start per block.
    """

    starts: Rows
    run: int
    step: int

    def __post_init__(self) -> None:
        starts = np.ascontiguousarray(self.starts, dtype=np.int64)
        # Plans are shared, so they do not keep an array that the caller can still write to.
        if starts.flags.writeable and np.may_share_memory(starts, self.starts):
            starts = starts.copy()
        starts.flags.writeable = False
        object.__setattr__(self, "starts", starts)

    @property
    def tiles(self) -> int:
        """How many tiles."""
        return self.starts.shape[0]

    @property
    def count(self) -> int:
        """Rows per tile."""
        return self.starts.shape[1] * self.run

    def rows(self) -> Rows:
        """(tiles, count) int64."""
        offsets = np.arange(self.run, dtype=np.int64) * self.step
        return (self.starts[:, :, None] + offsets).reshape(self.tiles, self.count)

    def narrow(self, first: int, count: int) -> Listed:
        """Members first .. first + count of every tile."""
        if self.starts.shape[1] == 1:
            return Listed(self.starts + first * self.step, count, self.step)
        if first % self.run == 0 and count % self.run == 0:
            return Listed(self.starts[:, first // self.run : (first + count) // self.run], self.run, self.step)
        return Listed(self.rows()[:, first : first + count], 1, 1)

    def tile_range(self, first: int, tiles: int) -> Listed:
        """Tiles first .. first + tiles."""
        return Listed(self.starts[first : first + tiles], self.run, self.step)

    @cached_property
    def distinct(self) -> bool:
        """No row stands in two tiles."""
        rows = self.rows().ravel()
        return len(np.unique(rows)) == len(rows)

    @property
    def nbytes(self) -> int:
        """Bytes of index data held."""
        return self.starts.nbytes

    @property
    def wide_nbytes(self) -> int:
        """Bytes that the starts take unpacked."""
        return self.nbytes


Index = Affine | Listed


def index_of(starts: Rows, count: int, step: int) -> Index:
    """Tiles that begin at `starts` (T,), each `count` rows `step` apart: affine where the starts are evenly spaced, forwards."""
    if len(starts) == 1:
        return Affine(int(starts[0]), 1, 0, count, step)
    spacing = np.diff(starts)
    if len(spacing) == 0 or (spacing[0] >= 0 and (spacing == spacing[0]).all()):
        return Affine(int(starts[0]), len(starts), int(spacing[0]) if len(spacing) else 0, count, step)
    return Listed(starts[:, None], count, step)
