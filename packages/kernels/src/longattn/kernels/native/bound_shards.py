"""Many rectangles of one q, k and v in one call of the library: shards of query rows, whose keys come in steps, and whose states merge.

Each rectangle is some rows of q, k and v as they lie, so that addresses of all of them follow from those of the three. As for
`BoundForward`, everything but these and scratch is in place.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longattn.kernels.dispatch.call import Call
from longattn.kernels.dispatch.environment import ScratchAllocator
from longattn.kernels.native import building
from longattn.kernels.native.bound import address
from longattn.kernels.native.structures import TYPES, CallArgument, PackedJobs, TensorArgument

_FEW, _PARTIAL, _CONTINUES = 1, 2, 4
_LINE = 64
_WORD = 8
_int, _pointer = ctypes.c_int64, ctypes.c_void_p


class ShardArgument(ctypes.Structure):
    """`Shard` of shards.h."""

    _fields_ = [("out", TensorArgument), ("lse", TensorArgument), ("first", _int), ("count", _int)]


class Step(NamedTuple):
    """A call of the library for one phase of a rectangle.

    Attributes:
        call: the rectangle. argument: the library's, its jobs in place. jobs: what it points to.
        few: whether it is a short call. complete: whether it writes every row. continues: whether it is a later phase.
        floats: of scratch.
    """

    call: Call
    argument: CallArgument
    jobs: PackedJobs
    few: bool
    complete: bool
    continues: bool
    floats: int


def _word(name: str, kind: type[ctypes.Structure] = CallArgument) -> int:
    return getattr(kind, name).offset // _WORD


_INPUTS = slice(_word("q"), _word("out"), _word("k") - _word("q"))
_OUT, _LSE, _SCRATCH = _word("out"), _word("lse"), _word("scratch")
_SHARD_OUT, _SHARD_LSE = _word("out", ShardArgument), _word("lse", ShardArgument)


class BoundShards:
    """(q, k, v, allocator) -> (out, lse), of tensors laid out like those that it was made for.

    Args:
        q, k, v: whole. shards: of each shard, its rows of out, (first, length, step), and its steps; every query row in one of them.
        out_dtype: of out.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shards: Sequence[tuple[tuple[int, int, int], Sequence[Step]]],
        out_dtype: torch.dtype,
    ) -> None:
        self._out_shape, self._out_dtype, self._device = (*q.shape[:3], v.shape[3]), out_dtype, q.device
        steps = [step for _, some in shards for step in some]
        self._jobs = [weakref.ref(step.jobs) for step in steps]
        self._arguments = np.stack([np.frombuffer(bytes(step.argument), np.int64) for step in steps])
        self._flags = np.array([s.few * _FEW | (not s.complete) * _PARTIAL | s.continues * _CONTINUES for s in steps])
        self._arguments[:, _INPUTS] -= np.array([[x.data_ptr() for x in (q, k, v)]])
        # Scratch of any call, then the states of one shard after the other.
        at = out = lse = -(-max((s.floats for s in steps), default=0) * 4 // _LINE) * _LINE
        for words, step in zip(self._arguments, steps, strict=True):
            rows = q.shape[0] * step.call.q.shape[1] * q.shape[2]
            if not step.continues:
                out, lse = at, at + 4 * rows * v.shape[3]
                at = -(-(lse + 4 * rows) // _LINE) * _LINE
            words[_OUT], words[_LSE], words[_SCRATCH] = out, lse, 0
        self._floats = (at // 4 + _LINE // 4,)
        self._shards = np.stack([np.frombuffer(bytes(each), np.int64) for each in self._outputs(shards)])
        entry: Any = building.library().longattn_attend_shards
        entry.restype, entry.argtypes = None, (_pointer, _pointer, _pointer, _int)
        self._entry = entry

    def _outputs(self, shards: Sequence[tuple[tuple[int, int, int], Sequence[Step]]]) -> list[ShardArgument]:
        """Where each shard's state goes, as offsets from out and lse."""
        _, nq, heads, dim = self._out_shape
        size, arguments, first = self._out_dtype.itemsize, [], 0
        for (start, _, step), steps in shards:
            wide = TensorArgument(
                start * heads * dim * size, nq * heads * dim, step * heads * dim, dim, TYPES[self._out_dtype]
            )
            lse = TensorArgument(start * heads * 4, nq * heads, step * heads, 1, TYPES[torch.float32])
            arguments.append(ShardArgument(wide, lse, first, len(steps)))
            first += len(steps)
        return arguments

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, allocator: ScratchAllocator) -> tuple[Tensor, Tensor] | None:
        """Compute; out and lse are the allocator's. None once jobs are gone with their plans."""
        if any(jobs() is None for jobs in self._jobs):
            return None
        out = allocator.empty(self._out_shape, self._out_dtype, self._device, "output")
        lse = allocator.empty(self._out_shape[:3], torch.float32, self._device, "temp")
        scratch = allocator.empty(self._floats, torch.float32, self._device, "temp")
        base = -(-scratch.data_ptr() // _LINE) * _LINE
        # Copies: another thread may compute at the same time.
        arguments, shards = self._arguments.copy(), self._shards.copy()
        arguments[:, _INPUTS] += (address(q), address(k), address(v))
        for word in (_OUT, _LSE, _SCRATCH):
            arguments[:, word] += base
        shards[:, _SHARD_OUT] += address(out)
        shards[:, _SHARD_LSE] += address(lse)
        self._entry(arguments.ctypes.data, self._flags.ctypes.data, shards.ctypes.data, len(shards))
        allocator.release(scratch, "temp")
        return out, lse
