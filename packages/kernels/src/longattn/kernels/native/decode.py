"""A decoder step through the library. A cache is checked and described once; each step passes little more than two addresses."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from longattn.kernels.dispatch.capability import Capability
from longattn.kernels.native import building
from longattn.kernels.native.structures import TYPES, TensorArgument, check_memory

MOST_WIDE = 256
"""The largest head_dim that the library streams."""

CAPABILITY = Capability(
    devices=("cpu",),
    dtypes={"cpu": tuple(TYPES)},
    tolerance={torch.float32: (2e-5, 2e-5), torch.float16: (4e-3, 4e-3), torch.bfloat16: (3e-2, 3e-2)},
    max_head_dim=MOST_WIDE,
    decode=True,
    bias=False,
    backward=False,
    softcap=True,
    by_distance=True,
)

_int, _pointer = ctypes.c_int64, ctypes.c_void_p


class CacheArgument(ctypes.Structure):
    """`Cache` of decode.h."""

    _fields_ = [
        ("k", TensorArgument),
        ("v", TensorArgument),
        *((name, _int) for name in ("rows", "slots", "dim", "value_dim")),
    ]


class ApartArgument(ctypes.Structure):
    """`Apart` of decode.h."""

    _fields_ = [
        ("first_q", _pointer),
        ("first", _int),
        ("hidden", _pointer),
        ("hidden_row", _int),
        ("hidden_step", _int),
        ("sinks", _pointer),
        ("added", _pointer),
        ("added_row", _int),
        ("softcap", ctypes.c_double),
    ]


def result_shape(q: Tensor, dim: int, value_dim: int) -> tuple[int, ...]:
    """The shape of what is attended for q: its own, with v's head_dim in place of k's.

    Raises:
        ValueError: they differ, and the last axis of q is not the head_dim.
    """
    if dim != value_dim and q.shape[-1] != dim:
        raise ValueError(
            f"q must have k's head_dim, {dim}, as its last axis where v has another, {value_dim}, got {tuple(q.shape)}"
        )
    return tuple(q.shape) if dim == value_dim else (*q.shape[:-1], value_dim)


class StreamedCache:
    """Keys and values of one cache, as the library reads them.

    Args:
        keys, values: (rows, slots, head_dim), each with its own head_dim, float32, bfloat16 or float16, both of one dtype, on the CPU,
            last stride 1.

    Raises:
        ValueError: they are not, or have strides that leave their memory.
    """

    __slots__ = ("_argument", "_kept", "_library", "address", "dim", "dtype", "rows", "slots", "value_dim")

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        if (
            not self.serves(keys)
            or not self.serves(values)
            or keys.shape[:2] != values.shape[:2]
            or keys.dtype != values.dtype
        ):
            raise ValueError(
                f"keys and values must be (rows, slots, head_dim) CPU tensors of one dtype and as many rows and slots with a last stride of 1, got "
                f"{tuple(keys.shape)}, {keys.dtype}, {keys.stride()} and {tuple(values.shape)}, {values.dtype}, {values.stride()}"
            )
        arguments = []
        for name, x in (("keys", keys), ("values", values)):
            check_memory(name, x)
            arguments.append(TensorArgument(x.data_ptr(), x.stride(0), x.stride(1), 0, TYPES[x.dtype]))
        self._kept = (keys, values)
        self.rows, self.slots, self.dim = keys.shape
        self.value_dim = values.shape[2]
        self.dtype = keys.dtype
        self._argument = CacheArgument(*arguments, self.rows, self.slots, self.dim, self.value_dim)
        self.address = ctypes.addressof(self._argument)
        self._library: tuple[Any, Any, int] = (None, None, 0)

    @staticmethod
    def serves(x: Tensor) -> bool:
        """Whether the library streams tensors like these keys or values."""
        if x.device.type != "cpu" or x.dtype not in TYPES or x.layout != torch.strided or x.dim() != 3:
            return False
        return 0 < x.shape[2] <= MOST_WIDE and (x.stride(2) == 1 or x.shape[2] == 1)

    def attend(
        self,
        q: Tensor,
        held: int,
        scale: float,
        *,
        hidden: Tensor | None = None,
        first: tuple[Tensor, int] | None = None,
        sink_logits: Tensor | None = None,
        softcap: float = 0.0,
        added: Tensor | None = None,
    ) -> Tensor | None:
        """See `decode_attention`; None where there is no library.

        Raises:
            ValueError: a tensor that does not fit the cache.
        """
        loaded = building.loaded("decode")
        if loaded is None:
            return None
        if self._library[0] is not loaded:
            self._library = (loaded, *_entry(loaded))
        if not q.is_contiguous():
            q = q.contiguous()
        row = self.rows * self.dim
        group = q.numel() // row if row else 0
        if q.dtype is not self.dtype or not q.is_cpu or q.numel() != group * row or not 0 <= held <= self.slots:
            raise ValueError(
                f"q must be {self.dtype} on the CPU with {self.dim} numbers for each of some heads of {self.rows} rows, over at most "
                f"{self.slots} slots, got {tuple(q.shape)}, {q.dtype}, on {q.device}, over {held}"
            )
        out = (
            torch.empty_like(q)
            if self.dim == self.value_dim
            else q.new_empty(result_shape(q, self.dim, self.value_dim))
        )
        if not group:
            return out
        apart, first_keys = None, 0
        if softcap or any(x is not None for x in (first, hidden, sink_logits, added)):
            apart = _Apart(self, q, group, held, hidden, first, sink_logits, softcap, added)
            first_keys = apart.argument.first
        _, step, one_range = self._library
        scratch = None
        if held > one_range or first_keys:
            floats = loaded.longattn_decode_scratch(self.address, group, held, first_keys)
            scratch = torch.empty(floats, dtype=torch.float32)
        step(
            self.address,
            q.data_ptr(),
            out.data_ptr(),
            group,
            held,
            scale,
            torch.get_num_threads(),
            None if scratch is None else scratch.data_ptr(),
            None if apart is None else ctypes.addressof(apart.argument),
        )
        return out


class _Apart:
    """The arguments of a step beside the cache, checked; holds the tensors that they point to."""

    def __init__(
        self,
        cache: StreamedCache,
        q: Tensor,
        group: int,
        held: int,
        hidden: Tensor | None,
        first: tuple[Tensor, int] | None,
        sink_logits: Tensor | None,
        softcap: float,
        added: Tensor | None,
    ) -> None:
        self.argument, self._kept = ApartArgument(softcap=softcap), []
        if added is not None:
            if added.shape != (cache.rows, group, held) or not added.is_cpu:
                raise ValueError(
                    f"added must be {(cache.rows, group, held)} on the CPU, got {tuple(added.shape)}, on {added.device}"
                )
            self.argument.added, self.argument.added_row = self._keep(added.to(torch.float32).contiguous()), held
        if first is not None:
            turned, count = first
            if turned.shape != q.shape or turned.dtype != q.dtype or not turned.is_cpu or not 0 <= count <= held:
                raise ValueError(
                    f"first must be other queries like q {tuple(q.shape)}, {q.dtype}, for at most {held} keys, got "
                    f"{tuple(turned.shape)}, {turned.dtype}, for {count}"
                )
            self.argument.first_q, self.argument.first = self._keep(turned.contiguous()), count
        if hidden is not None:
            if hidden.dtype != torch.bool or not hidden.is_cpu:
                raise ValueError(f"hidden must be bool on the CPU, got {hidden.dtype} on {hidden.device}")
            seen = torch.broadcast_to(hidden, (cache.rows, 1, held))
            check_memory("hidden", seen)
            self.argument.hidden = self._keep(seen)
            self.argument.hidden_row, self.argument.hidden_step = seen.stride(0), seen.stride(2)
        if sink_logits is not None:
            if not sink_logits.is_cpu:
                raise ValueError(f"sink_logits must be on the CPU, got {sink_logits.device}")
            sinks = torch.broadcast_to(sink_logits, (cache.rows, group, 1)).to(torch.float32)
            self.argument.sinks = self._keep(sinks.contiguous())

    def _keep(self, x: Tensor) -> int:
        self._kept.append(x)
        return x.data_ptr()


def _entry(loaded: ctypes.CDLL) -> tuple[Any, int]:
    """The library's decode step with the types of its arguments, and how many keys it takes without scratch."""
    *sizes, one_range = (loaded.longattn_sizes(_int(i)) for i in range(1, 4))
    expected = (ctypes.sizeof(CacheArgument), ctypes.sizeof(ApartArgument))
    if (*sizes,) != expected:
        raise RuntimeError(f"the native library's structures must have sizes {expected}, got {(*sizes,)}")
    loaded.longattn_decode_scratch.restype = _int
    loaded.longattn_decode_scratch.argtypes = (_pointer, _int, _int, _int)
    entry = loaded.longattn_decode
    entry.restype = None
    entry.argtypes = (_pointer, _pointer, _pointer, _int, _int, ctypes.c_double, _int, _pointer, _pointer)
    return entry, one_range
