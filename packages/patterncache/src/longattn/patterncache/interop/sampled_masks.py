"""Masks of long sequences, believed after samples: as many questions as tokens, times a constant, and not times tokens.

A pattern that a mask may be is compared with it where patterns end: around the diagonal, at the first and last keys, at corners of blocks,
and at seeded random keys of each query. What the samples miss stays unseen, so this is for a caller who says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from longattn.patterncache.pattern import Pattern
from longattn.patterncache.patterns.block_sparse import BlockSparse
from longattn.patterncache.spans import Rows

Sees = Callable[[int, Rows, Rows, Rows], npt.NDArray[np.bool_]]
"""Whether queries see keys: (batch entry, heads, queries, keys), which broadcast."""

SAMPLES = 64
"""Random keys that each query is asked about."""

_NEAR = 8
"""Distances to either side of the diagonal, and keys from either end."""

_ROWS = 1 << 14
"""Queries that are asked at once."""

_SIZES = (128, 64, 32, 16)
_MOST_BLOCKS = 1 << 24


def agrees(sees: Sees, pattern: Pattern, heads: int, batch: int, length: int, borders: tuple[Rows, ...] = ()) -> bool:
    """Whether a mask is the pattern wherever it was asked; `borders` are further keys to ask each query about, (length,) each."""
    random, h = np.random.default_rng(0), np.arange(heads, dtype=np.int64).reshape(-1, 1, 1)
    ends = np.concatenate([np.arange(_NEAR), length - 1 - np.arange(_NEAR)])
    for first in range(0, length, _ROWS):
        q = np.arange(first, min(first + _ROWS, length), dtype=np.int64)[:, None]
        near = q + np.arange(-_NEAR, _NEAR + 1, dtype=np.int64)
        keys = [near, np.broadcast_to(ends, (len(q), 2 * _NEAR)), random.integers(0, length, (len(q), SAMPLES))]
        keys += [border[q] + by for border in borders for by in (-1, 0, 1)]
        k = np.clip(np.concatenate(keys, 1), 0, length - 1)
        expected = pattern.count(h, q[None], k[None], heads) > 0
        if any((sees(entry, h, q[None], k[None]) != expected).any() for entry in range(batch)):
            return False
    return True


def blocks_of(sees: Sees, heads: int, batch: int, length: int, by_head: bool) -> BlockSparse | None:
    """The mask in the largest blocks, 128 to 16, that it agrees with; None where there are none, or too many."""
    h = np.arange(heads, dtype=np.int64).reshape(-1, 1, 1)
    for size in _SIZES:
        begin = np.arange(0, length, size, dtype=np.int64)
        if heads * len(begin) ** 2 > _MOST_BLOCKS:
            return None
        end = np.minimum(begin + size, length) - 1
        # A block's last query sees its first key, whether the mask is causal or not.
        shown = np.broadcast_to(sees(0, h, end[None, :, None], begin[None, None]), (heads, len(begin), len(begin)))
        for pattern in _candidates(shown if by_head else shown[0], size):
            corners = all(
                (
                    sees(0, h, q[None, :, None], k[None, None])
                    == (pattern.count(h, q[None, :, None], k[None, None], heads) > 0)
                ).all()
                for q in (begin, end)
                for k in (begin, end)
            )
            if corners and agrees(sees, pattern, heads, batch, length):
                return pattern
    return None


def _candidates(shown: npt.NDArray[np.bool_], size: int) -> Iterator[BlockSparse]:
    if not shown.any():
        return
    yield BlockSparse(size, shown)
    if not np.triu(shown, 1).any():
        yield BlockSparse(size, shown, causal=True)
