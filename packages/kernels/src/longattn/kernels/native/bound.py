"""Calls of the native row that are bound once: the library's argument with everything in place but pointers and seed.

Only plain calls have such a form: no mask, bias, key padding or prior, one phase, and results in their own dtype. What was checked when
the argument was made holds for every call of the same signature; that tensors still have memory is checked at each.
"""

from __future__ import annotations

import ctypes
import weakref
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from longattn.kernels.dispatch.call import Call, GradientPart
from longattn.kernels.dispatch.environment import ScratchAllocator
from longattn.kernels.native import building
from longattn.kernels.native.structures import TYPES, CallArgument, PackedJobs, TensorArgument
from longattn.kernels.ops.arguments import Cotangents, OpTensors

_Bytes = ctypes.c_char * ctypes.sizeof(CallArgument)
_write = Struct("=Q").pack_into
_LINE = 64
_DATA = TensorArgument.data.offset
_PLACES = {
    name: getattr(CallArgument, name).offset + _DATA
    for name in ("q", "k", "v", "out", "lse", "grad_out", "grad_lse", "dq", "dk", "dv")
}
_Q, _K, _V, _OUT, _LSE = (_PLACES[name] for name in ("q", "k", "v", "out", "lse"))
_SEED, _SCRATCH = CallArgument.seed.offset, CallArgument.scratch.offset


def is_plain(call: Call) -> bool:
    """Whether the library reads q, k and v as they lie, and nothing beside them."""
    extra = (call.mask, call.bias, call.by_distance, call.key_padding, call.prior)
    return all(x is None for x in extra) and all(x.stride(3) == 1 and x.numel() for x in (call.q, call.k, call.v))


class BoundForward:
    """(q, k, v, seed, allocator) -> (out, lse), for tensors laid out like those of the call that it was made from.

    Args:
        argument: the library's argument of that call.
        jobs: what it points to. They live as long as the plan; a call after their end returns None.
        entry: name of the library's function.
        floats: of scratch.
        complete: every row of the result is written.
    """

    __slots__ = ("_call", "_complete", "_device", "_floats", "_jobs", "_lse_shape", "_out_dtype", "_shape", "_template")

    def __init__(
        self, call: Call, argument: CallArgument, jobs: PackedJobs, entry: str, floats: int, complete: bool
    ) -> None:
        self._jobs = weakref.ref(jobs)
        self._template = bytes(argument)
        self._call: Any = getattr(building.library(), entry)
        self._floats = (floats + _LINE // 4,)
        self._shape = (*call.q.shape[:3], call.v.shape[3])
        self._lse_shape = self._shape[:3]
        self._out_dtype, self._complete, self._device = call.out_dtype, complete, call.q.device

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, allocator: ScratchAllocator
    ) -> tuple[Tensor, Tensor] | None:
        """Compute; out and lse are the allocator's."""
        jobs = self._jobs()
        if jobs is None:
            return None
        device, empty = self._device, allocator.empty
        out = empty(self._shape, self._out_dtype, device, "output")
        lse = empty(self._lse_shape, torch.float32, device, "temp")
        if not self._complete:
            out.zero_()
            lse.fill_(-torch.inf)
        argument = bytearray(self._template)
        # Written out: a loop takes half as long again.
        at = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr()
        if not all(at):
            for x in (q, k, v, out, lse):
                address(x)
        _write(argument, _Q, at[0])
        _write(argument, _K, at[1])
        _write(argument, _V, at[2])
        _write(argument, _OUT, at[3])
        _write(argument, _LSE, at[4])
        if seed is not None:
            _write(argument, _SEED, int(seed) & (2**64 - 1))
        scratch = empty(self._floats, torch.float32, device, "temp")
        _write(argument, _SCRATCH, -(-scratch.data_ptr() // _LINE) * _LINE)
        self._call(_Bytes.from_buffer(argument))
        allocator.release(scratch, "temp")
        return out, lse


class BoundBackward:
    """(cotangents, tensors, allocator) -> (dq, dk, dv, None), for gradients laid out as they were.

    Args:
        argument: the library's argument of that backward.
        jobs: what it points to, as for `BoundForward`.
        floats: of scratch.
        complete: whether every row of dq, and of dk and dv, is written.
    """

    __slots__ = ("_call", "_complete", "_device", "_floats", "_jobs", "_shapes", "_template", "_types")

    def __init__(
        self, call: Call, argument: CallArgument, jobs: PackedJobs, floats: int, complete: tuple[bool, bool]
    ) -> None:
        self._jobs = weakref.ref(jobs)
        self._template = bytes(argument)
        self._call: Any = building.library().longattn_attend_backward
        self._floats = (floats + _LINE // 4,)
        self._shapes = (call.q.shape, call.k.shape, call.v.shape)
        self._types = call.gradient_dtypes
        self._complete, self._device = complete, call.q.device

    def __call__(
        self,
        cotangents: Cotangents,
        tensors: OpTensors,
        allocator: ScratchAllocator,
        part: GradientPart | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, None] | None:
        """Compute; gradients are contiguous and torch's own memory. part: with what the call had that was bound."""
        jobs = self._jobs()
        if jobs is None:
            return None
        grad_out, grad_lse, out, lse = cotangents
        q, k, v, seed = tensors.q, tensors.k, tensors.v, tensors.seed
        make_queries, make_keys = (torch.empty if written else torch.zeros for written in self._complete)
        shapes, types = self._shapes, self._types
        dq = make_queries(shapes[0], dtype=types[0]) if part is None or part.dq is None else part.dq
        dk, dv = make_keys(shapes[1], dtype=types[1]), make_keys(shapes[2], dtype=types[2])
        argument = bytearray(self._template)
        given = {"q": q, "k": k, "v": v, "lse": lse, "grad_out": grad_out, "dq": dq, "dk": dk, "dv": dv}
        if part is not None:
            given["grad_lse"] = part.minus_delta
        else:
            given["out"] = out
            if grad_lse is not None:
                given["grad_lse"] = grad_lse
        for name, x in given.items():
            _write(argument, _PLACES[name], address(x))
        if seed is not None:
            _write(argument, _SEED, int(seed) & (2**64 - 1))
        scratch = allocator.empty(self._floats, torch.float32, self._device, "temp")
        _write(argument, _SCRATCH, -(-scratch.data_ptr() // _LINE) * _LINE)
        self._call(_Bytes.from_buffer(argument))
        allocator.release(scratch, "temp")
        return dq, dk, dv, None


def readable_as_it_lies(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the library reads a gradient or a result beside q of `dtype` without a copy."""
    return x.dtype in (dtype, torch.float32) and x.dtype in TYPES and (x.dim() < 4 or x.stride(3) == 1)


def address(x: Tensor) -> int:
    """Where a tensor's numbers begin.

    Raises:
        ValueError: its storage was freed.
    """
    where = x.data_ptr()
    if not where:
        raise ValueError(f"tensor must have memory, got one of shape {tuple(x.shape)} whose storage was freed")
    return where
