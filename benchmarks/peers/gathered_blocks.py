"""Block-sparse attention by hand: gather every query block's key blocks into a dense batch, and call SDPA on it.

What one writes without a library. Query blocks that see equally many key blocks share one SDPA call; which block goes
where is worked out once for a length and kept, so that a timed call only gathers, attends and writes.
"""

import functools

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Gathers = tuple[tuple[Tensor, Tensor], ...]


class GatheredBlocks:
    """Attention by a mask of blocks, without causality, on a sequence of whole blocks; differentiable.

    Args:
        block_size: positions of a block.
        mask: bool, (q_blocks, k_blocks) or (heads, q_blocks, k_blocks): which key blocks a query block sees. A longer
            mask than the sequence is cut.
    """

    def __init__(self, block_size: int, mask: npt.NDArray[np.bool_]) -> None:
        self.block_size = block_size
        self._mask = torch.tensor(mask)
        self._gathers = functools.cache(self._gathers_of)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(batch, seq, heads, head_dim) each -> the same; zero where a query block sees nothing."""
        heads, blocks = q.shape[2], q.shape[1] // self.block_size
        # (batch, heads * blocks, block, head_dim): one row of the gathers' tables is a head's block.
        q, k, v = (x.transpose(1, 2).unflatten(2, (blocks, -1)).flatten(1, 2) for x in (q, k, v))
        out = torch.zeros_like(q)
        for rows, columns in self._gathers(heads, blocks):
            keys, values = (x[:, columns].flatten(2, 3) for x in (k, v))
            out[:, rows] = F.scaled_dot_product_attention(q[:, rows], keys, values)
        return out.unflatten(1, (heads, blocks)).flatten(2, 3).transpose(1, 2)

    def _gathers_of(self, heads: int, blocks: int) -> Gathers:
        """For each number of key blocks that occurs: query rows (m,), and the key rows of each (m, number)."""
        mask = self._mask[..., :blocks, :blocks].expand(heads, -1, -1)
        counts = mask.sum(-1).flatten()
        parts = []
        for number in counts.unique().tolist():
            rows = (counts == number).nonzero().flatten()
            if number:
                columns = mask.flatten(0, 1)[rows].nonzero()[:, 1].view(-1, number)
                parts.append((rows, columns + (rows // blocks * blocks).unsqueeze(1)))
        return tuple(parts)
