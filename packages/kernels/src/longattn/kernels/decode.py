"""Decode: one query row for each head against cached rows that lie in any order.

softmax(scale * q k^T) v does not care in which order keys lie, so a ring is read as it lies: no rotation, no gather, no plan. Two
products over contiguous rows are all that there is to read, and a step costs what reading the cache costs. Rows of a cache are
(batch * kv_heads, slots, head_dim), `group` query heads to each; the last stride of keys and values is 1. In float16 and bfloat16 scores
and weights are rounded to that type, which is what torch's products of these types on CPU return.
"""

from __future__ import annotations

import torch
from torch import Tensor

STREAM_BYTES = 8 << 20
"""Keys, or values, of so many bytes are streamed from memory; what is smaller stays in a processor's cache, and a plain product is quicker."""


class Bags:
    """The rows of a full cache as bags to be summed with weights: torch's embedding_bag, which streams them.

    A product with one row on the left runs at half of the memory's bandwidth in bfloat16, and at three quarters in float32.

    Args:
        values: (rows, slots, row) contiguous on the CPU; row may be longer than head_dim.
    """

    def __init__(self, values: Tensor) -> None:
        rows, slots, width = values.shape
        kind = torch.int32 if rows * slots < 2**31 else torch.int64
        self.table = values.view(rows * slots, width)
        # Made once, and as long as the cache: four bytes beside each of its rows.
        self.index = torch.arange(rows * slots, dtype=kind)
        self.first = torch.arange(0, rows * slots, slots, dtype=kind)

    @staticmethod
    def serve(values: Tensor) -> bool:
        """Whether bags are the quicker way for these values (rows, slots, row), with one query head to each row."""
        if values.device.type != "cpu" or values.nbytes < STREAM_BYTES or not values.is_contiguous():
            return False
        # On one thread in float32 the product streams as well.
        return values.dtype == torch.bfloat16 or (values.dtype == torch.float32 and torch.get_num_threads() > 1)

    def sum(self, weights: Tensor) -> Tensor:
        """(rows, slots) of weights to (rows, 1, row). Needs no_grad."""
        return torch.embedding_bag(self.table, self.index, self.first, False, 0, False, weights.view(-1))[0].unsqueeze(
            1
        )


def decode_scores(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """scale * q k^T for q (rows, group, head_dim) and keys (rows, n, head_dim): (rows, group, n), in their dtype."""
    unread = _UNREAD.get((q.dtype, q.device))
    if unread is None:
        unread = _UNREAD[q.dtype, q.device] = _never_read(q)
    rows, group, _ = q.shape
    if group == 1 and q.dtype == torch.float32 and keys.nbytes >= STREAM_BYTES:
        # Rows of keys as the left factor: torch's product streams them better than their transpose. A view (rows, head_dim, 1) of q
        # in place of its transpose, with strides that say the same, takes six times as long.
        scores = torch.baddbmm(unread, keys, q.transpose(1, 2), beta=0, alpha=scale)
        return scores.view(rows, 1, keys.shape[1])
    return torch.baddbmm(unread, q, keys.transpose(1, 2), beta=0, alpha=scale)


_UNREAD: dict[tuple[torch.dtype, torch.device], Tensor] = {}
"""What beta=0 multiplies, and torch does not read, for each dtype and device."""


def _never_read(q: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(1, dtype=q.dtype, device=q.device)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    *,
    hidden: Tensor | None = None,
    first: Tensor | None = None,
    sink_logits: Tensor | None = None,
    bags: Bags | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v over cached rows in any order.

    Differentiable where `bags` is None.

    Args:
        q: (rows, group, head_dim), contiguous. keys, values: (rows, n, head_dim), same dtype and device. Not checked: this is inside a public edge.
        hidden: bool, broadcastable to (rows, group, n), True = not seen. Values there must be finite. A row that sees nothing gives zero.
        first: (rows, group, m), scaled scores that replace those of the first m keys.
        sink_logits: (rows, group, 1), a learned sink: joins the softmax as a key of that score and value zero.
        bags: `values` as bags, where they hold exactly these n rows.

    Returns:
        (rows, group, head_dim) in q's dtype.
    """
    scores = decode_scores(q, keys, scale)
    if first is not None:
        scores = torch.cat([first, scores[..., first.shape[-1] :]], -1)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    if sink_logits is not None:
        wide = scores if scores.dtype == torch.float64 else scores.float()
        weights = torch.softmax(torch.cat([wide, sink_logits.to(wide.dtype).expand(*wide.shape[:-1], 1)], -1), -1)
        weights = weights[..., :-1].to(q.dtype)
    else:
        weights = torch.softmax(scores, -1)
    if hidden is not None:
        # Where nothing is seen the softmax is 0 / 0.
        weights = weights.masked_fill(hidden.all(-1, keepdim=True), 0)
    if bags is not None:
        return bags.sum(weights)[..., : q.shape[-1]]
    return torch.bmm(weights, values)
