"""The pattern of a mask that stands in memory whole: in the largest blocks, or as runs that repeat along the diagonal."""

from __future__ import annotations

import numpy as np

from longattn.patterncache.interop.mask_answers import Shown
from longattn.patterncache.patterns.block_sparse import BlockSparse
from longattn.patterncache.patterns.periodic import Periodic, Run

_MOST_PERIOD, _MOST_RUNS = 64, 4096

_BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128)


def coarsest_blocks(shown: Shown) -> BlockSparse:
    """The same mask in the largest blocks that say it, with `causal` where that lets blocks be larger."""
    future = ~np.tri(*shown.shape[-2:], dtype=bool)
    some, every, causal = shown, shown, not (shown & future).any()
    # Hidden only because it is the future: whole blocks of the past, triangles on the diagonal.
    past = shown | future if causal else shown
    coarsest: tuple[int, Shown, bool] = (1, shown, False)
    # Blocks that say a mask are made of smaller ones that do, so the first size that fails is the last to try.
    for size in _BLOCKS[1:]:
        some, every = _halved(np.logical_or, some), _halved(np.logical_and, every)
        past = _halved(np.logical_and, past) if causal else every
        if np.array_equal(some, every):
            coarsest = (size, some, False)
        elif causal and (past >= some).all():
            coarsest = (size, some, True)
        else:
            break
    return BlockSparse(*coarsest)


def repeating(shown: Shown) -> Periodic:
    """A mask that is the same one period further on, in the fewest runs."""
    if (shown[1:] != shown[:1]).any():
        raise ValueError(
            "mask_mod must be the same for all heads where a compact plan is demanded, got heads that differ"
        )
    mask = shown[0]
    candidates = [
        Periodic(period, runs, len(mask))
        for period in range(1, min(_MOST_PERIOD, (len(mask) + 1) // 2) + 1)
        if np.array_equal(mask[period:, period:], mask[:-period, :-period])
        and (runs := _runs(mask, period)) is not None
    ]
    if not candidates:
        raise ValueError(
            f"mask_mod must repeat along its diagonal, with a period of at most {_MOST_PERIOD} in at most {_MOST_RUNS} runs, where a "
            f"compact plan is demanded, got a mask of {len(mask)} tokens that does not"
        )
    return min(candidates, key=lambda pattern: len(pattern.runs))


def _runs(mask: Shown, period: int) -> list[Run] | None:
    """The runs of a periodic mask; None where they are too many."""
    runs: list[Run] = []
    for a in range(period):
        last = a + (len(mask) - 1 - a) // period * period
        # The first row of a residue says what lies ahead, the last one what lies behind.
        shown = np.concatenate([mask[a, :a:-1], mask[last, last::-1]])
        distance = np.concatenate([np.arange(a + 1 - len(mask), 0), np.arange(last + 1)])
        for b in range(period):
            some = np.flatnonzero((a - distance) % period == b)
            flags = np.concatenate([[False], shown[some], [False]]).astype(np.int8)
            starts, ends = np.flatnonzero(np.diff(flags) == 1), np.flatnonzero(np.diff(flags) == -1) - 1
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                low = None if start == 0 else int(distance[some[start]])
                runs.append((a, b, low, None if end == len(some) - 1 else int(distance[some[end]])))
            if len(runs) > _MOST_RUNS:
                return None
    return runs


def _halved(how: np.ufunc, blocks: Shown) -> Shown:
    """Blocks of twice the size: two by two of them, and at the end what is left."""
    for axis in (-2, -1):
        pairs = np.moveaxis(blocks, axis, 0)
        joined = pairs[::2].copy()
        how(joined[: len(pairs) // 2], pairs[1::2], out=joined[: len(pairs) // 2])
        blocks = np.moveaxis(joined, 0, axis)
    return blocks
