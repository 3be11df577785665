"""A decode step over pages through the library."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longattn.kernels.native import building
from longattn.kernels.native.decode import MOST_WIDE
from longattn.kernels.native.structures import TYPES, TensorArgument

if TYPE_CHECKING:
    from longattn.kernels.pages import PagedCache

STORED = TYPES | {torch.int8: 3, torch.float8_e4m3fn: 4}
"""How keys may lie: `Type` and `EightBits` of the library."""

_int, _pointer = ctypes.c_int64, ctypes.c_void_p


class PagedArgument(ctypes.Structure):
    """`Paged` of paged.h."""

    _fields_ = [
        ("k", TensorArgument),
        ("v", TensorArgument),
        *((name, _pointer) for name in ("k_scale", "v_scale", "pages")),
        *((name, _int) for name in ("pages_row", "shift", "rows", "heads", "dim", "value_dim")),
        *((name, _pointer) for name in ("q", "out", "lse")),
        *((name, _int) for name in ("type", "out_type", "group", "keys")),
        ("added", _pointer),
        *((name, _int) for name in ("added_batch", "added_head", "added_query")),
        ("scale", ctypes.c_double),
        ("threads", _int),
        ("scratch", _pointer),
    ]


def refusals(cache: PagedCache, q: Tensor) -> list[str]:
    """Why the library does not take steps over such a cache; empty where it does."""
    reasons: list[str] = []
    if (refused := building.refusal(_part(cache))) is not None:
        reasons.append(refused)
    if cache.keys.device.type != "cpu":
        reasons.append(f"device {cache.keys.device.type} is not cpu")
    if cache.keys.dtype not in STORED or q.dtype not in TYPES:
        reasons.append(f"dtype {q.dtype} over {cache.keys.dtype} is not among those that it reads")
    if max(cache.widths) > MOST_WIDE:
        reasons.append(f"head_dim {max(cache.widths)} is larger than {MOST_WIDE}")
    return reasons


def _part(cache: PagedCache) -> str:
    """The part of the library that reads such pages."""
    return "decode" if cache.keys.dtype in TYPES else "quantized"


def attend_pages(
    q: Tensor, cache: PagedCache, pages: Tensor, held: int, scale: float, added: Tensor, out: Tensor, lse: Tensor
) -> bool:
    """Fill out and lse, as `paged_attention` says, from arguments that it checked; False where there is no library."""
    loaded = building.loaded(_part(cache))
    if loaded is None:
        return False
    size = int(loaded.longattn_sizes(_int(0)))
    if size != ctypes.sizeof(PagedArgument):
        raise RuntimeError(f"the native library's Paged must have size {ctypes.sizeof(PagedArgument)}, got {size}")
    loaded.longattn_paged_scratch.restype, loaded.longattn_paged_scratch.argtypes = _int, (_pointer,)
    loaded.longattn_decode_paged.restype, loaded.longattn_decode_paged.argtypes = None, (_pointer,)
    batch, heads, group, dim = q.shape
    k, v = (TensorArgument(x.data_ptr(), 0, x.stride(1), 0, STORED[x.dtype]) for x in (cache.keys, cache.values))
    scales = (None if x is None else x.data_ptr() for x in cache.scales)
    argument = PagedArgument(
        k, v, *scales, pages.data_ptr(), pages.shape[2], cache.page_size.bit_length() - 1, batch * heads, heads, dim, cache.widths[1],
        q.data_ptr(), out.data_ptr(), lse.data_ptr(), TYPES[q.dtype], TYPES[out.dtype], group, held, added.data_ptr(),
        *added.stride()[:3], scale, torch.get_num_threads(), None,
    )  # fmt: skip
    floats = loaded.longattn_paged_scratch(ctypes.addressof(argument))
    if floats:
        scratch = torch.empty(floats, dtype=torch.float32)
        argument.scratch = scratch.data_ptr()
    loaded.longattn_decode_paged(ctypes.addressof(argument))
    return True
