"""`to_block_mask`: a pattern as FlexAttention takes it. Torch is imported only here, when asked.

Which blocks are seen, and which wholly, follows from the plan's strides, tile by tile; what is left inside a block is decided by a
mask_mod of a few integer operations per branch (a table of blocks where a branch lists them). No mask of tokens stands anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from longattn.patterncache.analysis.propagation import square
from longattn.patterncache.interop.csr import as_device, head_classes
from longattn.patterncache.interop.pair_counts import pair_counts
from longattn.patterncache.pattern import Pattern
from longattn.patterncache.plan import Branch, Plan
from longattn.patterncache.planning.block_runs import covered_and_missed, cut_runs
from longattn.patterncache.spans import check_int

Shown = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class FlexMask:
    """What `flex_attention(q, k, v, block_mask=, score_mod=)` takes for a pattern.

    Attributes:
        block_mask: `torch.nn.attention.flex_attention.BlockMask`, one batch entry, one head or all.
        score_mod: adds log(count) to a score where a key counts more than once; None where none does.
    """

    block_mask: Any
    score_mod: Callable[..., Any] | None


def to_block_mask(
    pattern: Pattern, length: int, num_heads: int, *, block_size: int = 128, device: Any = "cpu"
) -> FlexMask:
    """`pattern` over `length` tokens for FlexAttention.

    Args:
        pattern: any pattern, its multiplicities included.
        length: tokens, at least 1: queries and keys.
        num_heads: query heads, at least 1.
        block_size: positions of a FlexAttention block, at least 1. Default 128.
        device: of the lists. Default "cpu".

    Raises:
        TypeError, ValueError: an argument is not such a value; or the pattern lists single rows, and its table of pairs would have
            more than 2 ** 26 entries.
    """
    length, num_heads = check_int("N", length, minimum=1), check_int("num_heads", num_heads, minimum=1)
    block_size, device = check_int("block_size", block_size, minimum=1), as_device(device)
    plan = pattern.plan(square(length, num_heads))
    counted = pair_counts(plan, device)
    classes, members = head_classes(plan)
    some, whole = (
        np.stack(side)
        for side in zip(
            *(_blocks([plan.branches[b] for b in each], length, block_size) for each in members), strict=True
        )
    )
    # One head in the mask serves all; else each head has its own lists, as FlexAttention wants them.
    of_head = classes if len(members) > 1 else classes[:1]
    lists = [*_ordered((some & ~whole)[of_head], device), *_ordered(whole[of_head], device)]
    block_mask = import_module("torch.nn.attention.flex_attention").BlockMask.from_kv_blocks(
        *lists,
        BLOCK_SIZE=block_size,
        mask_mod=_mask_mod(counted),
        seq_lengths=(length, length),
    )
    return FlexMask(block_mask, _score_mod(counted) if _repeats(pattern, plan) else None)


def _mask_mod(counted: Callable[..., Any]) -> Callable[..., Any]:
    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return counted(h, q, k) > 0

    return mask_mod


def _score_mod(counted: Callable[..., Any]) -> Callable[..., Any]:
    def score_mod(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return score + counted(h, q, k).to(score.dtype).log()

    return score_mod


def _repeats(pattern: Pattern, plan: Plan) -> bool:
    """Whether a key may count more than once."""
    return not pattern.binary and (plan.listed or len(plan.branches) > 1)


def _blocks(branches: list[Branch], length: int, size: int) -> tuple[Shown, Shown]:
    """((blocks, blocks) seen at all, seen wholly) by any one of some branches."""
    blocks = -(-length // size)
    some, whole = np.zeros((blocks, blocks), bool), np.zeros((blocks, blocks), bool)
    for branch in branches:
        (q, q_block), (k, k_block) = (
            cut_runs(index, at, size) for index, at in ((branch.q, branch.q_at), (branch.k, branch.k_at))
        )
        # A run is the whole of its block where it has as many positions: the last block may be short.
        q_full, k_full = (
            runs.count == np.minimum(size, length - block * size) for runs, block in ((q, q_block), (k, k_block))
        )
        tiles = np.arange(branch.q.tiles + 1)
        q_begin, k_begin = np.searchsorted(q.tile, tiles), np.searchsorted(k.tile, tiles)
        q_ends = q.position, q.position + (q.count - 1) * branch.steps[0]
        k_ends = k.position, k.position + (k.count - 1) * branch.steps[1]
        for t in range(branch.q.tiles):
            a, b = slice(q_begin[t], q_begin[t + 1]), slice(k_begin[t], k_begin[t + 1])
            at = q_block[a][:, None], k_block[b][None]
            shown = np.ones((len(at[0]), at[1].shape[1]), bool)
            full = q_full[a][:, None] & k_full[b][None]
            if branch.band is not None:
                nearest = q_ends[0][a][:, None] - k_ends[1][b][None]
                farthest = q_ends[1][a][:, None] - k_ends[0][b][None]
                covered, missed = covered_and_missed(branch.band, nearest, farthest)
                full, shown = full & covered, ~missed
            # Two runs of a tile may lie in one block.
            np.logical_or.at(some, at, shown)
            np.logical_or.at(whole, at, full)
    return some, whole


def _ordered(shown: Shown, device: Any) -> tuple[Any, Any]:
    """(1, heads, query blocks) and (1, heads, query blocks, key blocks) int32 tensors: how many key blocks, and those first."""
    torch = import_module("torch")
    order = np.argsort(~shown, axis=-1, kind="stable").astype(np.int32)
    number = shown.sum(axis=-1, dtype=np.int32)
    return torch.from_numpy(number)[None].to(device), torch.from_numpy(order)[None].to(device)
