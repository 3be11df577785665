"""`SparsePatternConfig`: which blocks a block-sparse preset keeps, in the seeds' words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from longattn.patterncache import BlockLayout, BlockSparse
from longattn.patterncache.patterns.block_layout import LAYOUTS
from longattn.patterncache.spans import check_int, shortened


@dataclass(frozen=True)
class SparsePatternConfig:
    """Which blocks of keys a block of queries sees. Serves every length; see `longattn.patterncache.BlockLayout` for the rules.

    Args:
        pattern_type: "dilated_sparse" (every n-th block), "local_window" (blocks near by) or "bigbird" (those, the first, and a
            seeded draw). Default "dilated_sparse".
        sparsity_ratio: share of blocks kept by "dilated_sparse", and drawn by "bigbird", in (0, 1]. Default 0.1: 90 % are not seen.
        block_size: positions of a block. Default 128.
        local_window_size: positions to each side, for "local_window" and "bigbird". Default 512.
        num_global_tokens: first positions that see all and are seen by all, rounded up to blocks, for "bigbird". Default 64.
        seed: of "bigbird"'s draw. Default 0.

    Raises:
        TypeError, ValueError: a bad field, by name.
    """

    pattern_type: str = "dilated_sparse"
    sparsity_ratio: float = 0.1
    block_size: int = 128
    local_window_size: int = 512
    num_global_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        kind, ratio = cast(object, self.pattern_type), cast(object, self.sparsity_ratio)
        if not isinstance(kind, str):
            raise TypeError(f"pattern_type must be one of {LAYOUTS}, got {shortened(kind)} ({type(kind).__name__})")
        if kind not in LAYOUTS:
            raise ValueError(f"pattern_type must be one of {LAYOUTS}, got {shortened(kind)}")
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
            raise TypeError(
                f"sparsity_ratio must be a number in (0, 1], got {shortened(ratio)} ({type(ratio).__name__})"
            )
        if not 0 < ratio <= 1:
            raise ValueError(f"sparsity_ratio must be in (0, 1], got {shortened(ratio)}")
        for name, least in (("block_size", 1), ("local_window_size", 0), ("num_global_tokens", 0), ("seed", 0)):
            check_int(name, getattr(self, name), minimum=least)

    def layout(self, causal: bool = False) -> BlockLayout:
        """The pattern, for any length."""
        return BlockLayout(
            self.pattern_type,
            self.block_size,
            self.sparsity_ratio,
            self.local_window_size,
            self.num_global_tokens,
            self.seed,
            causal,
        )

    def block_sparse(self, length: int, causal: bool = False) -> BlockSparse:
        """The same for one length, with its mask in the open: (blocks, blocks) bool, True = seen."""
        blocks = -(-check_int("length", length, minimum=1) // self.block_size)
        return BlockSparse(self.block_size, self.layout().mask(blocks, blocks), causal)
