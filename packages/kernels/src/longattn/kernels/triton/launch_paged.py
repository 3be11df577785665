"""Launches the kernel of decode steps over pages, and the merge of its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longattn.kernels.triton.availability import INTERPRETED
from longattn.kernels.triton.configurations import PAGED, padded
from longattn.kernels.triton.launching import precision, programs, run
from longattn.kernels.triton.merge_kernel import merge_kernel
from longattn.kernels.triton.paged_kernel import paged_kernel

if TYPE_CHECKING:
    from longattn.kernels.pages import PagedCache


def attend_pages(
    q: Tensor, cache: PagedCache, pages: Tensor, held: int, scale: float, added: Tensor, out: Tensor, lse: Tensor
) -> None:
    """See `row.attend_pages`."""
    batch, heads, group, dim = q.shape
    rows, value_dim = batch * heads, cache.widths[1]
    added = added if added.stride(3) == 1 or held == 1 else added.contiguous()
    tile = PAGED[q.element_size()]
    tiles = -(-held // tile.streamed)
    parts = min(tiles, max(1, -(-programs(q.device) // rows)))
    each = -(-tiles // parts) * tile.streamed
    parts = -(-held // each)
    part_out = torch.empty((parts, rows, group, value_dim), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((parts, rows, group), dtype=torch.float32, device=q.device)
    float8 = cache.keys.dtype == torch.float8_e4m3fn
    keys, values = (x.view(torch.int8) if float8 else x for x in (cache.keys, cache.values))
    block = min(tile.owned, max(16, padded(group)))
    run(
        paged_kernel, (rows, parts, -(-group // block)),
        q, keys, values, *cache.scales, pages, added, part_out, part_lse,
        heads, group, held, pages.shape[2], each, *added.stride()[:3], scale, rows,
        PAGE=cache.page_size, HEAD_DIM=dim, VALUE_DIM=value_dim, BLOCK_D=padded(dim), BLOCK_V=padded(value_dim), BLOCK_G=block,
        BLOCK_N=tile.streamed, FLOAT8=float8, UNIT=256.0 if float8 else 1.0, PRECISION=precision(q.dtype),
        UPCAST=INTERPRETED and q.dtype == torch.bfloat16, device=q.device, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    run(
        merge_kernel, (-(-rows * group // 16),),
        part_out, part_lse, None, None, out, lse, rows * group, rows * group * value_dim, rows * group,
        PARTS=parts, HEAD_DIM=value_dim, BLOCK_D=padded(value_dim), ROWS=16, device=q.device, num_warps=4,
    )  # fmt: skip
