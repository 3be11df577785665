"""`BlockSparse`: a boolean matrix of blocks says who sees whom."""

from __future__ import annotations

import zlib
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from longattn.patterncache.pattern import Pattern, check_causal
from longattn.patterncache.patterns.window import whole_branches
from longattn.patterncache.plan import Band, Branch, Counts
from longattn.patterncache.planning.mask_cuts import Mask, cut_by_mask
from longattn.patterncache.spans import Rectangle, Rows, Span, check_int, shortened

if TYPE_CHECKING:
    from longattn.patterncache.patterns.scored_blocks import ScoredBlocks

MOST_CELLS = 1 << 28
"""Cells of a mask that is read from text: a quarter of a gigabyte of booleans."""


@dataclass(frozen=True, eq=False)
class _Bits:
    """A mask, and the same as text: torch.compile traces `canonical` and `with_causal`, and can read text but no such array.

    Attributes:
        mask: bool. An array over bytes can never be made writable again, which one that owns its memory can.
        shape: its shape.
        packed: its bits packed, deflated and in base64.
    """

    mask: Mask
    shape: tuple[int, ...]
    packed: str

    @classmethod
    def of(cls, mask: Mask) -> _Bits:
        """A copy of a mask."""
        packed = zlib.compress(np.packbits(mask.reshape(-1)).tobytes(), 1)
        own = np.frombuffer(mask.tobytes(), bool).reshape(mask.shape)
        return cls(own, own.shape, b64encode(packed).decode("ascii"))


@dataclass(frozen=True, init=False, eq=False, repr=False)
class BlockSparse(Pattern, name="block_sparse"):
    """Query block a sees key block b iff mask[a, b]; position i is in block i // block_size. The last block may be short.

    Args:
        block_size: positions of a block, >= 1.
        mask: bool, (q_blocks, k_blocks), or (heads, q_blocks, k_blocks) for the global query heads of a module. Any array-like,
            torch tensors of any device included. It is copied; `mask` of the pattern is read-only for good.
        causal: hide j > i, on positions. Default False.

    Raises:
        TypeError, ValueError: block_size is not an integer >= 1, the mask is not bool, empty or of another rank, causal no bool.
        ValueError: later, from plan and counts, where positions lie beyond the mask or its heads are not the rectangle's.
    """

    block_size: int
    causal: bool
    _bits: _Bits

    def __init__(self, block_size: int, mask: npt.ArrayLike, causal: bool = False) -> None:
        object.__setattr__(self, "block_size", check_int("block_size", block_size, minimum=1))
        object.__setattr__(self, "_bits", _Bits.of(_check_mask(mask)))
        object.__setattr__(self, "causal", check_causal(causal))

    @staticmethod
    def from_scores(
        scores: Any,
        block_size: int,
        *,
        topk: int | None = None,
        topp: float | None = None,
        causal: bool = False,
        keep_diagonal: bool = True,
    ) -> ScoredBlocks:
        """Block masks chosen by data: forward and transposed lists on the device of the scores, without a wait; cached nowhere.

        Args:
            scores: floating tensor (heads, q_blocks, k_blocks) or (q_blocks, k_blocks); -inf is never chosen. No gradient flows.
            block_size: positions of a block, >= 1.
            topk: key blocks per query block, >= 1; fewer where fewer are legal.
            topp: in (0, 1]: the fewest best key blocks whose softmax over the row adds up to at least this.
            causal: only blocks up to the query's own are legal, and j > i is hidden. Default False.
            keep_diagonal: a query block sees its own in any case. Default True.

        Raises:
            TypeError, ValueError: an argument is not such a value, or not exactly one of topk and topp is given.
        """
        return import_module("longattn.patterncache.patterns.scored_blocks").choose_blocks(
            scores, block_size, topk, topp, causal, keep_diagonal
        )

    @property
    def mask(self) -> Mask:
        """(q_blocks, k_blocks) or (heads, q_blocks, k_blocks), read-only."""
        return self._bits.mask

    @property
    def binary(self) -> bool:
        """Always: a block is seen or not."""
        return True

    @property
    def filters(self) -> bool:
        """Always: any branch can be cut into blocks."""
        return True

    @property
    def covers(self) -> tuple[int, int]:
        """(queries, keys): how many positions from 0 the mask says something about."""
        return self.mask.shape[-2] * self.block_size, self.mask.shape[-1] * self.block_size

    def check_rectangle(self, rectangle: Rectangle) -> None:
        """Raise ValueError where positions lie beyond the mask, or its heads are not the module's."""
        heads = self.mask.shape[0] if self.mask.ndim == 3 else rectangle.num_heads
        if heads != rectangle.num_heads:
            raise ValueError(f"mask must have one entry per head, num_heads={rectangle.num_heads}, got {heads} heads")
        sides = (("queries", rectangle.queries), ("keys", rectangle.keys))
        for (name, spans), length in zip(sides, self.covers, strict=True):
            last = max((span.last for span in spans if span.length), default=-1)
            if last >= length:
                raise ValueError(
                    f"{name} must lie below {length}, the length that mask {self.mask.shape} covers in blocks of "
                    f"{self.block_size}, got position {last}"
                )

    def count(self, h: Rows, i: Rows, j: Rows, num_heads: int) -> Counts:
        """mask[h, i // block_size, j // block_size], and j <= i if causal."""
        blocks = (i // self.block_size, j // self.block_size)
        shown = self.mask[blocks] & (h >= 0) if self.mask.ndim == 2 else self.mask[(h, *blocks)]
        return (shown & (j <= i) if self.causal else shown).astype(np.int64)

    def branches(self, rectangle: Rectangle) -> Iterator[Branch]:
        """Per query block one list of key blocks; of blocks on the diagonal of a causal mask one more, banded branch."""
        for branch in whole_branches(rectangle):
            yield from self.within(branch, rectangle)

    def within(self, branch: Branch, rectangle: Rectangle) -> Iterator[Branch]:
        """`branch` cut at block borders, without the pairs of blocks that the mask hides."""
        yield from self._cut(branch, rectangle, Band(0, None) if self.causal else Band(), shown=True)

    @property
    def complements(self) -> bool:
        """Always: what a mask hides is a mask."""
        return True

    def without(self, branch: Branch, rectangle: Rectangle) -> Iterator[Branch]:
        """`branch` in the blocks that the mask hides, and, where causal, in the future of those that it shows."""
        yield from self._cut(branch, rectangle, Band(), shown=False)
        if self.causal:
            yield from self._cut(branch, rectangle, Band(None, -1), shown=True)

    def _cut(self, branch: Branch, rectangle: Rectangle, visible: Band, *, shown: bool) -> Iterator[Branch]:
        """`branch` within a band in the blocks that the mask shows, or in those that it hides."""
        band = visible if branch.band is None else branch.band & visible
        band = None if band == Band() else band
        if not (branch.q.tiles and branch.q.count and branch.k.count):
            return
        for heads, mask in self._head_masks(branch.heads, rectangle):
            mask = mask if shown else ~mask
            yield from cut_by_mask(replace(branch, heads=heads, band=band), mask, self.block_size)

    def _head_masks(self, heads: Span, rectangle: Rectangle) -> Iterator[tuple[Span, Mask]]:
        """(rows of the head axis, their mask), heads of equal masks together where they are evenly spaced."""
        if self.mask.ndim == 2:
            yield heads, self.mask
            return
        groups: dict[bytes, list[int]] = {}
        present = rectangle.heads.take(*heads.numbers).positions()
        for row, head in enumerate(present):
            groups.setdefault(self.mask[head].tobytes(), []).append(row)
        for rows in groups.values():
            even = len(set(np.diff(rows))) <= 1
            step = rows[1] - rows[0] if len(rows) > 1 else 1
            for first in rows[:1] if even else rows:
                yield heads.take(first, len(rows) if even else 1, step if even else 1), self.mask[present[first]]

    def with_causal(self, causal: bool) -> BlockSparse:
        """The same with `causal` replaced; the mask and its packed text are shared."""
        twin: BlockSparse = object.__new__(BlockSparse)
        for name, value in (("block_size", self.block_size), ("_bits", self._bits), ("causal", check_causal(causal))):
            object.__setattr__(twin, name, value)
        return twin

    def to_spec(self) -> dict[str, Any]:
        """block_size, causal, and the mask: its shape, and its bits packed, deflated and in base64."""
        bits = self._bits
        return {"block_size": self.block_size, "causal": self.causal, "shape": list(bits.shape), "mask": bits.packed}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> BlockSparse:
        """From `to_spec`.

        Raises:
            ValueError: the text is not one, or holds more or fewer bits than the shape.
        """
        shape, text = tuple(spec["shape"]), spec["mask"]
        cells = prod(check_int(f"shape[{axis}]", length, minimum=0) for axis, length in enumerate(shape))
        if cells > MOST_CELLS:
            raise ValueError(f"shape must have at most {MOST_CELLS} cells, got {cells}")
        try:
            # One byte more than there may be shows that there are too many, without making them all.
            packed = zlib.decompressobj().decompress(b64decode(text, validate=True), -(-cells // 8) + 1)
        except (Base64Error, zlib.error, TypeError, ValueError) as error:
            raise ValueError(f"mask must be packed bits, deflated and in base64, got {shortened(text, 40)}") from error
        if len(packed) != -(-cells // 8):
            raise ValueError(
                f"mask must hold {cells} bits for shape {shape}, got {'more' if len(packed) > -(-cells // 8) else len(packed)} bytes"
            )
        mask = np.unpackbits(np.frombuffer(packed, np.uint8), count=cells).astype(bool).reshape(shape)
        return cls(spec["block_size"], mask, spec["causal"])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockSparse):
            return NotImplemented
        same = (self.block_size, self.causal) == (other.block_size, other.causal)
        return same and (self.mask is other.mask or np.array_equal(self.mask, other.mask))

    def __hash__(self) -> int:
        return hash((self.block_size, self.causal, self._bits.shape, self._bits.packed))

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockSparse.from_spec, (self.to_spec(),)

    def __repr__(self) -> str:
        true = f"{int(self.mask.sum())} of {self.mask.size} True"
        return f"BlockSparse(block_size={self.block_size}, mask=<{self.mask.shape}, {true}>, causal={self.causal})"


def _check_mask(value: Any) -> Mask:
    """`value` as a bool array, or raise TypeError or ValueError that names the mask."""
    try:
        value = value.detach().cpu() if hasattr(value, "detach") and hasattr(value, "cpu") else value
        mask = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"mask must be one array, got rows of different lengths: {shortened(value)}") from error
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"mask must be an array or a plain tensor, got {type(value).__name__}: {error}") from error
    if mask.dtype != np.bool_:
        raise TypeError(f"mask must be bool, got {mask.dtype} ({type(value).__name__})")
    if mask.ndim not in (2, 3) or not mask.size:
        raise ValueError(
            f"mask must be (q_blocks, k_blocks) or (heads, q_blocks, k_blocks), not empty, got {mask.shape}"
        )
    return mask
