"""The kernel of decode steps over pages checks itself on a device as the others do; see `self_check`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longattn.kernels.dispatch.capability import ROUNDED_WITHIN
from longattn.kernels.pages import PagedCache
from longattn.kernels.reference import reference_attention
from longattn.kernels.triton.self_check import describe, keep, known

_ROWS, _GROUP, _HELD, _PAGE = 3, 5, 300, 16


class PagedForm(NamedTuple):
    """What compiled kernels differ by: the dtype of queries, how pages lie, and the widths of keys and values."""

    dtype: torch.dtype
    stored: torch.dtype
    width: int
    value_width: int

    def __str__(self) -> str:
        names = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.stored))
        return " over pages of ".join(names) + f" D{self.width} DV{self.value_width}"


Launcher = Callable[[Tensor, PagedCache, Tensor, int, float, Tensor, Tensor, Tensor], None]
"""`row.attend_pages`."""


def passed(cache: PagedCache, q: Tensor, attend_pages: Launcher) -> bool:
    """Whether the kernel was right on the device of a cache, checked now where it was not yet; True where nothing is compiled or checks are off."""
    if q.device.type != "cuda" or os.environ.get("LONGATTN_SELF_CHECK") == "0":
        return True
    form, where = PagedForm(q.dtype, cache.keys.dtype, *cache.widths), describe(q.device)
    outcome = known(form, where)
    if outcome is None and not torch.cuda.is_current_stream_capturing():
        outcome = keep(form, where, wrong(form, q.device, attend_pages))
    return not outcome


def wrong(form: PagedForm, device: torch.device, attend_pages: Launcher) -> str:
    """What a form computes wrongly on a device, or ""."""
    random = torch.Generator().manual_seed(1)
    pages = -(-_HELD // _PAGE)
    lies: list[Tensor] = []
    scales: list[Tensor | None] = []
    for width in (form.width, form.value_width):
        x = torch.randn((_ROWS * pages, _PAGE, width), generator=random)
        most = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}.get(form.stored)
        scale = None if most is None else x.abs().amax(-1) / most
        number = x if scale is None else x / scale[..., None]
        lies.append((number.round() if form.stored == torch.int8 else number).to(form.stored))
        scales.append(scale)
    table = torch.randperm(_ROWS * pages, generator=random).reshape(1, _ROWS, pages).int()
    q = torch.randn((1, _ROWS, _GROUP, form.width), generator=random).to(form.dtype)
    added = torch.randn((1, _ROWS, _GROUP, _HELD), generator=random)
    added[:, 0, :, 7:40] = -torch.inf
    exact = PagedCache(lies[0], lies[1], scales[0], scales[1]).gathered(table, _HELD, torch.float64)
    keys, values = (x[0].unsqueeze(2) for x in exact)
    bias, counts = added[0].double()[:, :, None], torch.ones(_ROWS, _GROUP, 1, _HELD)
    want = reference_attention(q[0].double()[:, None], keys, values, counts, 0.3, bias=bias)
    moved = PagedCache(*(None if x is None else x.to(device) for x in (*lies, *scales)))  # type: ignore[arg-type]
    out = torch.empty((1, _ROWS, _GROUP, form.value_width), dtype=torch.float32, device=device)
    lse = torch.empty((1, _ROWS, _GROUP), dtype=torch.float32, device=device)
    attend_pages(q.to(device), moved, table.to(device), _HELD, 0.3, added.to(device), out, lse)
    atol, rtol = ROUNDED_WITHIN[form.dtype]
    for name, got, expected in (("out", out, want.out[:, 0][None]), ("lse", lse, want.lse[:, 0][None])):
        error = (got.double().cpu() - expected).abs().nan_to_num(torch.inf)
        if float(error.max()) > atol + rtol * max(1.0, float(expected.abs().max())):
            return f"{form}: {name} is {float(error.max()):.2g} off the float64 oracle"
    return ""
