"""Decode over pages: keys and values lie in pages of a pool, as they are or in 8 bits, and a table says which pages are a row's.

What each query adds to the score of each slot comes with the call, so that slots may hold keys in any order, counted any number of times
(log counts) or not at all (-inf). On CPUs the native library reads pages as they lie, on GPUs a Triton kernel; elsewhere torch gathers them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longattn.kernels.native import paged as native
from longattn.kernels.pages import PagedCache
from longattn.kernels.state import AttentionState, state_dtype
from longattn.kernels.triton import row as triton


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
