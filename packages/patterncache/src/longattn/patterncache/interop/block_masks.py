"""`from_block_mask`: the pattern of FlexAttention's BlockMask. Torch is imported only where one is handed over."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from longattn.patterncache.interop.dense_masks import coarsest_blocks
from longattn.patterncache.interop.mask_answers import MaskMod, Shown, check_cells
from longattn.patterncache.patterns.block_sparse import BlockSparse
from longattn.patterncache.spans import Rows


def from_block_mask(block_mask: Any) -> BlockSparse:
    """The pattern of a FlexAttention BlockMask: its full blocks, and what its mask_mod leaves of the partial ones.

    Args:
        block_mask: a `torch.nn.attention.flex_attention.BlockMask` with one batch entry and one or more heads.

    Raises:
        TypeError, ValueError: it is no BlockMask, has several batch entries, or is above 2 ** 28 (head, query, key) triples.
    """
    names = (
        "kv_num_blocks",
        "kv_indices",
        "full_kv_num_blocks",
        "full_kv_indices",
        "mask_mod",
        "BLOCK_SIZE",
        "seq_lengths",
    )
    missing = [name for name in names if not hasattr(block_mask, name)]
    if missing:
        raise TypeError(
            f"block_mask must be a FlexAttention BlockMask, got {type(block_mask).__name__} without {missing}"
        )
    batch, heads = block_mask.kv_num_blocks.shape[:2]
    if batch != 1:
        raise ValueError(f"block_mask must have one batch entry, for a pattern has none, got {batch}")
    partial = _listed_blocks(block_mask.kv_num_blocks, block_mask.kv_indices)
    full = np.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None:
        full = _listed_blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    shape = (heads, *block_mask.seq_lengths)
    check_cells(shape)
    answer = MaskMod(block_mask.mask_mod, import_module("torch").from_numpy).whole(0, shape)
    (queries, keys), (q_size, k_size) = block_mask.seq_lengths, block_mask.BLOCK_SIZE
    i, j = np.arange(int(queries)) // int(q_size), np.arange(int(keys)) // int(k_size)
    shown: Shown = full[:, i[:, None], j] | (partial[:, i[:, None], j] & answer)
    return coarsest_blocks(shown if heads > 1 else shown[0])


def _listed_blocks(number: Any, indices: Any) -> Shown:
    """(heads, query blocks, key blocks) from BlockMask's lists: the first `number` of each row of `indices`."""
    counts: Rows = number[0].cpu().numpy()
    listed: Rows = indices[0].cpu().numpy()
    shown = np.zeros(listed.shape, bool)
    head, row, at = np.nonzero(np.arange(listed.shape[-1]) < counts[..., None])  # pyright: ignore[reportUnknownArgumentType]
    shown[head, row, listed[head, row, at]] = True
    return shown
