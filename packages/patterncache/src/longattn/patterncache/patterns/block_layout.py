"""`BlockLayout`: a rule for a block mask of any length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from longattn.patterncache.canonical import fields_of
from longattn.patterncache.pattern import Pattern, check_causal
from longattn.patterncache.patterns.block_sparse import BlockSparse
from longattn.patterncache.plan import Branch, Counts
from longattn.patterncache.spans import MOST, Rectangle, Rows, Span, check_int, shortened

LAYOUTS = ("dilated_sparse", "local_window", "bigbird")

Shown = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class BlockLayout(Pattern, name="block_layout"):
    """Query block a sees key block b by a rule on (a, b); position i is in block i // block_size. It is `BlockSparse` for any length.

    A rule knows no length, so shards, prefixes and continuations of a sequence agree about every pair.

    | layout | b is seen by a iff |
    | --- | --- |
    | "dilated_sparse" | a - b is a multiple of round(1 / ratio), so about the share `ratio` of all blocks |
    | "local_window" | abs(a - b) * block_size <= window |
    | "bigbird" | as in "local_window", or either holds one of the first `num_global` positions, or a seeded draw of probability `ratio` |

    Args:
        layout: one of the three.
        block_size: positions of a block, >= 1. Default 128.
        ratio: in (0, 1]. Default 0.1.
        window: positions to each side, >= 0. Default 512.
        num_global: positions from 0 that see all and are seen by all, rounded up to blocks, >= 0. Default 64.
        seed: of the draw, from 0 to 2 ** 64 - 1. Default 0.
        causal: hide j > i, on positions. Default False.

    Raises:
        TypeError, ValueError: an argument is not such a value, by name.
    """

    layout: str = "dilated_sparse"
    block_size: int = 128
    ratio: float = 0.1
    window: int = 512
    num_global: int = 64
    seed: int = 0
    causal: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.layout, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"layout must be one of {LAYOUTS}, got {shortened(self.layout)} ({type(self.layout).__name__})"
            )
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {LAYOUTS}, got {shortened(self.layout)}")
        for name, least in (("block_size", 1), ("window", 0), ("num_global", 0), ("seed", 0)):
            most = 2**64 - 1 if name == "seed" else MOST
            object.__setattr__(self, name, check_int(name, getattr(self, name), minimum=least, maximum=most))
        object.__setattr__(self, "ratio", _check_ratio(self.ratio))
        check_causal(self.causal)

    @property
    def binary(self) -> bool:
        """Always: a block is seen or not."""
        return True

    @property
    def filters(self) -> bool:
        """Always: any branch can be cut into blocks."""
        return True

    @property
    def listing(self) -> bool:
        """Always: the mask of a long rectangle has blocks x blocks cells."""
        return True

    def shown(self, a: Rows, b: Rows) -> Shown:
        """Whether query blocks a see key blocks b, elementwise, before `causal`."""
        if self.layout == "dilated_sparse":
            return (a - b) % round(1 / self.ratio) == 0
        near = abs(a - b) * self.block_size <= self.window
        if self.layout == "local_window":
            return near
        first = -(-self.num_global // self.block_size)
        return near | (a < first) | (b < first) | (_draw(a, b, self.seed) < self.ratio)

    def mask(self, q_blocks: int, k_blocks: int) -> Shown:
        """The block mask of the first blocks: (q_blocks, k_blocks) bool."""
        return self.shown(np.arange(q_blocks, dtype=np.int64)[:, None], np.arange(k_blocks, dtype=np.int64)[None])

    def count(self, h: Rows, i: Rows, j: Rows, num_heads: int) -> Counts:
        """shown(i // block_size, j // block_size), and j <= i if causal."""
        shown = self.shown(i // self.block_size, j // self.block_size) & (h >= 0)
        return (shown & (j <= i) if self.causal else shown).astype(np.int64)

    def branches(self, rectangle: Rectangle) -> Iterator[Branch]:
        """Those of the block mask that reaches as far as the rectangle."""
        return self._reaching(rectangle).branches(rectangle)

    def within(self, branch: Branch, rectangle: Rectangle) -> Iterator[Branch]:
        """`branch` within that block mask."""
        return self._reaching(rectangle).within(branch, rectangle)

    @property
    def complements(self) -> bool:
        """Always: what a mask hides is a mask."""
        return True

    def without(self, branch: Branch, rectangle: Rectangle) -> Iterator[Branch]:
        """`branch` without that block mask."""
        return self._reaching(rectangle).without(branch, rectangle)

    def _reaching(self, rectangle: Rectangle) -> BlockSparse:
        return _block_sparse(self, *(_blocks(spans, self.block_size) for spans in (rectangle.queries, rectangle.keys)))

    def with_causal(self, causal: bool) -> BlockLayout:
        """The same with `causal` replaced."""
        return replace(self, causal=causal)

    def to_spec(self) -> dict[str, Any]:
        """All fields by name."""
        return fields_of(self)

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> BlockLayout:
        """From `to_spec`."""
        return cls(**spec)


# Restrict asks once per branch of the other pattern. Few: the mask of a million positions is tens of megabytes.
@lru_cache(maxsize=4)
def _block_sparse(layout: BlockLayout, q_blocks: int, k_blocks: int) -> BlockSparse:
    return BlockSparse(layout.block_size, layout.mask(q_blocks, k_blocks), layout.causal)


def _blocks(spans: tuple[Span, ...], block_size: int) -> int:
    """How many blocks from 0 reach the last position; at least one."""
    return max((span.last // block_size + 1 for span in spans if span.length), default=1)


def _draw(a: Rows, b: Rows, seed: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for every (seed, a, b), always the same: splitmix64's finaliser, wrapping."""
    word = np.array(seed, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in (a, b):
            word = word + part.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            word = word ^ (word >> np.uint64(31))
    return (word >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _check_ratio(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"ratio must be a number in (0, 1], got {shortened(value)} ({type(value).__name__})")
    # A constant also where torch.compile traces a symbolic number: see `spec_text`.
    if not 0 < value <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {shortened(value)}")
    ratio = float.fromhex(value.hex()) if isinstance(value, float) else float(value)
    if 1 / ratio > MOST:
        raise ValueError(f"ratio must be at least 1 / {MOST}, got {ratio}")
    return ratio
