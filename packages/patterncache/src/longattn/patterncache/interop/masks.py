"""`from_mask_mod`: the pattern of FlexAttention's mask_mod, exactly, or a refusal."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from longattn.patterncache.analysis.propagation import MOST_TOKENS
from longattn.patterncache.interop.dense_masks import coarsest_blocks, repeating
from longattn.patterncache.interop.intervals_of_masks import pattern_of_intervals, strips
from longattn.patterncache.interop.mask_answers import BYTES_PER_CELL, STRIP_CELLS, MaskMod, check_allowed
from longattn.patterncache.interop.sampled_masks import agrees, blocks_of
from longattn.patterncache.pattern import Pattern
from longattn.patterncache.planning.limits import check_listed
from longattn.patterncache.progress import progress
from longattn.patterncache.spans import check_flag, check_int, shortened

logger = logging.getLogger("longattn.patterncache")

VERIFY = ("every", "samples")

MOST_BATCH = 1 << 16
"""Batch entries that are asked one after the other."""


def from_mask_mod(
    mask_mod: Callable[..., Any],
    N: int,
    num_heads: int | None = None,
    batch: int = 1,
    *,
    as_tensor: Callable[[npt.NDArray[np.int64]], Any] = np.asarray,
    compact: bool = False,
    listed: str | None = None,
    verify: str = "every",
) -> Pattern:
    """The pattern of a FlexAttention mask_mod over `N` tokens, exactly: every pair is looked at, unless `verify` says otherwise.

    Causal masks, windows and bands become `Full`, `Window` and `Periodic`, those of packed documents `Documents`; all other masks, and
    where heads differ, block masks of the largest blocks, 128 to 1, that say the same.

    With `compact`, a `Periodic` whose plans hold no index data: for masks that repeat along their diagonal.

    Args:
        mask_mod: (b, h, q, k) -> whether q sees k; elementwise over broadcast int64 arrays, True or False each.
        N: tokens, >= 1: queries and keys.
        num_heads: heads to ask about, which are the heads of the result; None (default): heads do not differ, and 0 is asked.
        batch: how many batch entries to ask, up to 65536; a pattern has none, so they must agree. Default 1.
        as_tensor: makes what mask_mod takes of an int64 array; `torch.from_numpy` for one written with torch functions.
        compact: demand a `Periodic`. Default False.
        listed: what happens where batch * num_heads * N * N is above 2 ** 28. "limit": an error that says what comparing every pair would
            cost, and whether the mask looks like a band or documents, which need no memory for it; "allow": pairs are compared.
            Default None: as `LONGATTN_LISTED` in the environment says, else "limit".
        verify: "every" (default): all pairs. "samples": a band, documents or blocks of 16 to 128 are believed after about 130 pairs of each
            query, which are around the diagonal, at both ends, at borders and at random: time and memory linear in N, and no proof. A mask
            that is none of these is refused. Not with `compact`.

    Raises:
        TypeError, ValueError: an argument is not such a value; mask_mod does not return booleans of the broadcast shape; batch
            entries differ; too many pairs; or `compact` is demanded of a mask that differs by head, or does not repeat with a period
            of at most 64 in few runs.
    """
    if not callable(mask_mod):
        raise TypeError(f"mask_mod must be callable as mask_mod(b, h, q, k), got {shortened(mask_mod)}")
    length, batch = check_int("N", N, minimum=1), check_int("batch", batch, minimum=1)
    heads = 1 if num_heads is None else check_int("num_heads", num_heads, minimum=1)
    check_flag("compact", compact)
    if listed is not None:
        check_listed("listed", listed)
    if verify not in VERIFY:
        raise ValueError(f"verify must be one of {VERIFY}, got {shortened(verify)}")
    if batch > MOST_BATCH:
        raise ValueError(f"batch must be at most {MOST_BATCH} entries, each of which is asked, got {batch}")
    if length > MOST_TOKENS:
        raise ValueError(f"N must be at most {MOST_TOKENS} tokens, each of which is asked about, got {length}")
    mask, shape = MaskMod(mask_mod, as_tensor), (heads, length, length)
    looked_at = "samples" if verify == "samples" else "every pair"
    with progress(
        f"importing a mask of {length} tokens, {looked_at} of {heads} heads and {batch} batch entries", logger
    ):
        if verify == "samples":
            return _believed(mask, batch, shape, num_heads is not None, compact)
        return _exactly(mask, batch, shape, num_heads is not None, compact, listed)


def _exactly(
    mask: MaskMod, batch: int, shape: tuple[int, int, int], by_head: bool, compact: bool, listed: str | None
) -> Pattern:
    """The pattern after a look at every pair."""
    named = None if compact else _named(mask, batch, shape, listed)
    if named is not None:
        return named
    check_allowed(shape, batch, listed, "an arbitrary mask", BYTES_PER_CELL)
    shown = mask.whole(0, shape)
    for entry in range(1, batch):
        if not np.array_equal(shown, mask.whole(entry, shape)):
            raise ValueError(f"mask_mod must say the same for all of batch={batch}, got another mask for entry {entry}")
    if compact:
        return repeating(shown)
    return coarsest_blocks(shown if by_head else shown[0])


def _named(mask: MaskMod, batch: int, shape: tuple[int, int, int], listed: str | None) -> Pattern | None:
    """The band, or documents of bands, that a mask is for all heads and batch entries; None where it is none."""
    heads, length, _ = shape
    named = pattern_of_intervals(mask.of_first_head, length)
    if named is None:
        return None
    pattern, begin, end = named
    check_allowed(shape, batch, listed, f"what looks like {shortened(pattern)}", 0)
    every_head, keys = np.arange(heads, dtype=np.int64), np.arange(length, dtype=np.int64).reshape(1, 1, -1)
    for first, expected in strips(begin, end, max(1, STRIP_CELLS // (heads * length))):
        q = np.arange(first, first + len(expected), dtype=np.int64).reshape(1, -1, 1)
        for entry in range(batch):
            shown = mask.sees(entry, every_head.reshape(-1, 1, 1), q, keys)
            if shown.shape[-2:] != expected.shape or (shown != expected).any():
                return None
    return pattern


def _believed(mask: MaskMod, batch: int, shape: tuple[int, int, int], by_head: bool, compact: bool) -> Pattern:
    """The band, documents of bands, or blocks that a mask is as far as samples say.

    Raises:
        ValueError: it is none of these, or `compact` is demanded.
    """
    if compact:
        raise ValueError("verify must be 'every' where a compact plan is demanded, got 'samples'")
    heads, length, _ = shape
    named = pattern_of_intervals(mask.of_first_head, length)
    if named is not None and agrees(mask.sees, named[0], heads, batch, length, (named[1], named[2])):
        return named[0]
    blocks = blocks_of(mask.sees, heads, batch, length, by_head)
    if blocks is None:
        raise ValueError(
            f"mask_mod must be a band, documents of bands, or blocks of 16 to 128 where verify='samples', got a mask of {length} tokens "
            f"that is none of them; verify='every' looks at all pairs"
        )
    return blocks
