"""Decode over pages: keys and values lie in pages of a pool, as they are or in 8 bits, and a table says which pages are a row's.

What each query adds to the score of each slot comes with the call, so that slots may hold keys in any order, counted any number of times
(log counts) or not at all (-inf). On CPUs the native library reads pages as they lie, on GPUs a Triton kernel; elsewhere torch gathers them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longattn.kernels.native import paged as native
from longattn.kernels.state import AttentionState, state_dtype
from longattn.kernels.triton import row as triton


class PagedCache:
    """Pages of keys and values, described once for all steps over them.

    Args:
        keys, values: (pages, page_size, head_dim), each with its own head_dim, contiguous; page_size a power of two. In 8 bits, int8 or
            float8_e4m3fn, a number is what is stored times its slot's scale.
        key_scales, value_scales: float32 (pages, page_size), contiguous, for 8 bits; else None.

    Raises:
        ValueError: tensors that are not such.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, key_scales: Tensor | None = None, value_scales: Tensor | None = None
    ) -> None:
        self.keys, self.values, self.scales = keys, values, (key_scales, value_scales)
        self.page_size = keys.shape[1]
        self.widths = (keys.shape[2], values.shape[2])
        eight_bits = keys.dtype in (torch.int8, torch.float8_e4m3fn)
        scaled = (("keys", keys, "key_scales", key_scales), ("values", values, "value_scales", value_scales))
        for name, x, scales_name, scales in scaled:
            if x.shape[:2] != keys.shape[:2] or x.dtype != keys.dtype or not x.is_contiguous() or x.dim() != 3:
                raise ValueError(
                    f"{name} must be contiguous (pages, page_size, head_dim) like keys, got {tuple(x.shape)}, {x.dtype}"
                )
            if eight_bits != (scales is not None):
                raise ValueError(
                    f"{scales_name} must be a tensor for 8 bits and None else, got {type(scales).__name__} for {x.dtype}"
                )
            if scales is None:
                continue
            if scales.shape != x.shape[:2] or scales.dtype != torch.float32 or not scales.is_contiguous():
                raise ValueError(
                    f"{scales_name} must be contiguous float32 {tuple(x.shape[:2])}, got {tuple(scales.shape)}, {scales.dtype}"
                )
        if not self.page_size or self.page_size & (self.page_size - 1):
            raise ValueError(f"keys must have pages of a power of two slots, got {self.page_size}")

    def gathered(self, pages: Tensor, held: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `held` slots of each row of `pages` (..., n), (..., held, head_dim), in `dtype`."""
        pages = pages[..., : -(-held // self.page_size)].clamp(min=0).long()
        both: list[Tensor] = []
        for x, scales in zip((self.keys, self.values), self.scales, strict=True):
            if scales is None:
                read = x[pages]
            else:
                # Torch indexes no float8.
                stored = x.view(torch.int8)[pages].view(x.dtype)
                read = stored.to(torch.float32) * scales[pages].unsqueeze(-1)
            both.append(read.flatten(-3, -2)[..., :held, :].to(dtype))
        return both[0], both[1]


def paged_attention(
    q: Tensor,
    cache: PagedCache,
    pages: Tensor,
    held: int,
    scale: float,
    added: Tensor,
    out_dtype: torch.dtype | None = None,
) -> AttentionState:
    """softmax(scale * q k^T + added) v over the first `held` slots of each row of pages. No gradients.

    Args:
        q: (batch, kv_heads, group, head_dim), in the cache's dtype, or any floating one over 8 bits.
        pages: int32 (batch, kv_heads, n), of the cache's device: slot s of a row is in page pages[s // page_size]. A page of slots that
            no query sees may be -1.
        held: at most n * page_size.
        added: float32 (float64 where q is), broadcastable to (batch, kv_heads, group, held); -inf hides a slot, which is then not read as a number.
        out_dtype: of out. Default q's.

    Returns:
        out (batch, kv_heads, group, values' head_dim), lse (batch, kv_heads, group); a query that sees nothing has zero and -inf.

    Raises:
        ValueError: tensors that do not fit.
    """
    batch, kv_heads, group, dim = q.shape
    if dim != cache.widths[0] or pages.shape[:2] != (batch, kv_heads) or pages.dtype != torch.int32:
        raise ValueError(
            f"pages must be int32 with the batch and kv_heads of q, {(batch, kv_heads)}, and q have head_dim {cache.widths[0]}, got "
            f"{tuple(pages.shape)}, {pages.dtype} and {tuple(q.shape)}"
        )
    if not 0 <= held <= pages.shape[2] * cache.page_size:
        raise ValueError(f"held must be from 0 to {pages.shape[2] * cache.page_size}, the slots of pages, got {held}")
    wide = state_dtype(q.dtype)
    if added.dtype != wide or added.device != q.device:
        raise ValueError(f"added must be {wide} on {q.device}, got {added.dtype} on {added.device}")
    added = added.expand(batch, kv_heads, group, held)
    out_dtype = q.dtype if out_dtype is None else out_dtype
    out = torch.empty((batch, kv_heads, group, cache.widths[1]), dtype=out_dtype, device=q.device)
    lse = torch.empty((batch, kv_heads, group), dtype=wide, device=q.device)
    if not native.refusals(cache, q):
        q, pages = q.contiguous(), pages.contiguous()
        added = added if added.stride(3) == 1 or held <= 1 else added.contiguous()
        if native.attend_pages(q, cache, pages, held, scale, added, out, lse):
            return AttentionState(out, lse)
    if held and triton.serves_pages(cache, q):
        triton.attend_pages(q.contiguous(), cache, pages.contiguous(), held, scale, added, out, lse)
        return AttentionState(out, lse)
    keys, values = cache.gathered(pages, held, wide)
    hidden = added == -torch.inf
    scores = torch.matmul(q.to(wide), keys.mT) * scale + added
    # What nobody sees may be NaN, and is no number of a sum.
    scores = scores.masked_fill(hidden, -torch.inf)
    unseen = hidden.all(dim=2)
    lse = torch.logsumexp(scores, -1)
    weights = torch.where(lse[..., None] == -torch.inf, 0.0, (scores - lse[..., None]).exp()).masked_fill(hidden, 0)
    return AttentionState((weights @ values.masked_fill(unseen[..., None], 0)).to(out_dtype), lse)
