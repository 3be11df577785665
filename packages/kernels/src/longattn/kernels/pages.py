"""`PagedCache`: keys and values in pages of a pool, as they are or in 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor


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
