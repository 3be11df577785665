"""`ScoredBlocks`: block masks that follow from data, as lists on the device where the scores are. Torch is imported only here, when asked.

No step looks at a value on the host, so nothing waits for the device; shapes depend on the shape of the scores alone. What is chosen
changes with every call: it is cached nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

from longattn.patterncache.pattern import check_causal
from longattn.patterncache.patterns.block_sparse import BlockSparse
from longattn.patterncache.spans import check_flag, check_int, shortened


@dataclass(frozen=True, eq=False)
class ScoredBlocks:
    """The key blocks that each query block chose. Tensors, on the device of the scores.

    Attributes:
        block_size: positions of a block.
        mask: (heads, q_blocks, k_blocks) bool, or (q_blocks, k_blocks).
        causal: j > i is hidden, on positions.
    """

    block_size: int
    mask: Any
    causal: bool

    @cached_property
    def forward_lists(self) -> tuple[Any, Any]:
        """(number, indices), int32: number[..., a] key blocks for query block a, ascending, at the head of indices[..., a, :]."""
        return _ordered(self.mask)

    @cached_property
    def transposed_lists(self) -> tuple[Any, Any]:
        """(number, indices), int32: the query blocks of each key block, for a backward over keys."""
        return _ordered(self.mask.mT)

    def pattern(self) -> BlockSparse:
        """As a pattern, for `attend` and plans. This waits for the device, and copies the mask to the host."""
        return BlockSparse(self.block_size, self.mask, self.causal)

    def to_block_mask(self, length: int) -> Any:
        """As FlexAttention's BlockMask for `length` tokens, on the device, without a wait.

        Raises:
            TypeError, ValueError: length is not an integer >= 1 that ends in the last block.
        """
        length, blocks = check_int("N", length, minimum=1), self.mask.shape[-2:]
        if any(-(-length // self.block_size) != many for many in blocks):
            raise ValueError(f"N must end in the last of {tuple(blocks)} blocks of {self.block_size}, got {length}")
        # (batch, heads, ...), both 1 where they are missing.
        number, indices = ((x if self.mask.ndim == 3 else x[None])[None] for x in self.forward_lists)
        return import_module("torch.nn.attention.flex_attention").BlockMask.from_kv_blocks(
            number,
            indices,
            BLOCK_SIZE=self.block_size,
            mask_mod=_mask_mod(self.causal),
            seq_lengths=(length, length),
        )


def _mask_mod(causal: bool) -> Callable[..., Any]:
    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) if causal else (q >= 0) & (k >= 0)

    return mask_mod


def choose_blocks(
    scores: Any, block_size: int, topk: int | None, topp: float | None, causal: bool, keep_diagonal: bool
) -> ScoredBlocks:
    """See `BlockSparse.from_scores`."""
    torch = import_module("torch")
    block_size = check_int("block_size", block_size, minimum=1)
    check_causal(causal)
    check_flag("keep_diagonal", keep_diagonal)
    plain = isinstance(scores, torch.Tensor) and scores.layout == torch.strided
    if not plain or not scores.is_floating_point():
        raise TypeError(f"scores must be a floating tensor of (heads, q_blocks, k_blocks), got {type(scores).__name__}")
    if scores.ndim not in (2, 3) or not scores.numel():
        raise ValueError(
            f"scores must be (q_blocks, k_blocks) or (heads, q_blocks, k_blocks), got {tuple(scores.shape)}"
        )
    if (topk is None) == (topp is None):
        raise ValueError(
            f"topk (or topp) must be given, and not both, got topk={shortened(topk)} and topp={shortened(topp)}"
        )
    scores = scores.detach()
    q_blocks, k_blocks = scores.shape[-2:]
    own = torch.arange(q_blocks, device=scores.device)[:, None]
    other = torch.arange(k_blocks, device=scores.device)[None]
    legal = torch.isneginf(scores).logical_not()
    if causal:
        legal = legal & (other <= own)
    ranked = scores.masked_fill(~legal, -torch.inf)
    mask = _best(ranked, topk) if topk is not None else _nucleus(ranked, _check_share(topp))
    mask = mask & legal
    return ScoredBlocks(block_size, mask | (other == own) if keep_diagonal else mask, causal)


def _best(scores: Any, topk: object) -> Any:
    """The best `topk` of each row."""
    torch = import_module("torch")
    many = min(check_int("topk", topk, minimum=1), scores.shape[-1])
    best = scores.topk(many, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


def _nucleus(scores: Any, topp: float) -> Any:
    """The fewest of each row whose softmax adds up to at least `topp`."""
    torch = import_module("torch")
    ordered, order = scores.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
    # What came before says whether one more is needed; so the best is always taken.
    taken = ordered.cumsum(-1) - ordered < topp
    return torch.zeros_like(taken).scatter(-1, order, taken)


def _ordered(mask: Any) -> tuple[Any, Any]:
    torch = import_module("torch")
    order = (~mask).to(torch.int8).argsort(dim=-1, stable=True)
    return mask.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _check_share(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"topp must be a number in (0, 1], got {shortened(value)} ({type(value).__name__})")
    if not 0 < value <= 1:
        raise ValueError(f"topp must be in (0, 1], got {shortened(value)}")
    return float(value)
