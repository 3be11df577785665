"""The C++ side's structures, and what goes into them: every pointer, stride and index is checked here, before the call."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longattn.kernels.native.lowering import Job, Lowered, RowSet
from longattn.kernels.native.progressions import PeriodicRows
from longattn.patterncache.indices import Affine, Index

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FAR = 1 << 60
_BEYOND = 1 << 62

_int, _double, _pointer = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class TensorArgument(ctypes.Structure):
    """A (batch, rows, heads, head_dim) tensor: address, strides in elements, type."""

    _fields_ = [("data", _pointer), ("batch", _int), ("row", _int), ("head", _int), ("type", _int)]


class LookupArgument(ctypes.Structure):
    """A number for each (batch, head, query, key): address, strides in elements, 0 along an axis of length 1, and type."""

    _fields_ = [("data", _pointer), *((name, _int) for name in ("batch", "head", "row", "key", "type"))]


_ROW_SET = (
    "starts", "start", "tile_step", "period", "block", "offsets", "step", "log2_count", "count", "origin", "position_step", "low",
    "high",
)  # fmt: skip
_JOB = ("head", "head_step", "heads", "tiles", *_ROW_SET, "keys", "key_sets", "fresh", "first_key", "later_key")

_TENSORS = ("q", "k", "v", "out", "grad_out", "dq", "dk", "dv", "lse", "grad_lse")


class CallArgument(ctypes.Structure):
    """`Call` of call.h. Tensors that `point_to` and `look_up` were given live as long as it does."""

    _fields_ = [
        *((name, TensorArgument) for name in _TENSORS),
        ("mask", LookupArgument),
        ("bias", LookupArgument),
        ("padding", _pointer),
        ("padding_batch", _int),
        ("padding_row", _int),
        ("jobs", _pointer),
        ("job_count", _int),
        *((name, _int) for name in ("batch", "queries", "keys", "heads", "kv_heads", "dim", "value_dim")),
        ("scale", _double),
        ("drop", _double),
        ("seed", ctypes.c_uint64),
        *((name, _int) for name in ("first_head", "half", "threads", "rows", "key_parts")),
        ("scratch", _pointer),
        ("merges", _int),
        ("softcap", _double),
        ("by_distance", _pointer),
        ("by_distance_columns", _int),
        ("by_distance_grad", _pointer),
    ]

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self._kept: list[Tensor] = []

    def point_to(self, name: str, x: Tensor, shape: tuple[int, ...]) -> None:
        """Set the field `name` to where `x`, a CPU tensor of that shape, lies; to a copy's place where head_dim is not contiguous.

        Raises:
            ValueError: another shape, device or dtype, negative strides, or strides that leave the tensor's memory.
        """
        if tuple(x.shape) != shape or x.device.type != "cpu" or x.dtype not in TYPES or x.layout != torch.strided:
            raise ValueError(
                f"{name} must be a CPU tensor of shape {shape}, got {tuple(x.shape)}, {x.dtype}, on {x.device}"
            )
        if len(shape) == 4 and x.stride(3) != 1:
            x = x.clone(memory_format=torch.contiguous_format)
        check_memory(name, x)
        self._kept.append(x)
        setattr(self, name, TensorArgument(x.data_ptr(), *x.stride()[:3], TYPES[x.dtype]))

    def look_up(self, name: str, x: Tensor, shape: tuple[int, ...]) -> None:
        """Set the field `name` to where a bool or floating tensor lies that is broadcastable to `shape`.

        Raises:
            ValueError: it is not, or has another device or dtype, or strides that leave its memory.
        """
        fits = x.dim() == len(shape) and all(n in (1, length) for n, length in zip(x.shape, shape, strict=True))
        if not fits or x.device.type != "cpu" or x.dtype not in (*TYPES, torch.bool):
            raise ValueError(
                f"{name} must be a CPU tensor broadcastable to {shape}, got {tuple(x.shape)}, {x.dtype}, on {x.device}"
            )
        check_memory(name, x)
        self._kept.append(x)
        strides = (0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True))
        setattr(self, name, LookupArgument(x.data_ptr(), *strides, TYPES.get(x.dtype, 0)))

    def add_by_distance(self, x: Tensor, grad: Tensor | None, heads: int) -> None:
        """Set where what is added for each head and distance lies, float32 (heads, columns), and what its gradient is added to.

        grad: float32 (parts, batch, heads, columns), or None.

        Raises:
            ValueError: another shape, dtype or device, or not contiguous.
        """
        for name, y in (("by_distance", x), ("by_distance_grad", grad)):
            if y is None:
                continue
            fits = y.shape[-2:] == (heads, x.shape[-1]) and y.dtype == torch.float32 and y.device.type == "cpu"
            if not fits or not y.is_contiguous():
                raise ValueError(
                    f"{name} must be float32 (..., {heads}, {x.shape[-1]}), contiguous on the CPU, got {tuple(y.shape)}, {y.dtype}, "
                    f"{y.stride()}, on {y.device}"
                )
            self._kept.append(y)
        self.by_distance, self.by_distance_columns = x.data_ptr(), x.shape[-1]
        self.by_distance_grad = None if grad is None else grad.data_ptr()

    def hide(self, key_padding: Tensor, shape: tuple[int, int]) -> None:
        """Set the field `padding` to where a bool tensor (batch, keys) lies.

        Raises:
            ValueError: it is not of that shape or dtype, not on the CPU, or has strides that leave its memory.
        """
        x = key_padding
        if tuple(x.shape) != shape or x.dtype != torch.bool or x.device.type != "cpu":
            raise ValueError(
                f"key_padding must be bool {shape} on the CPU, got {tuple(x.shape)}, {x.dtype}, on {x.device}"
            )
        check_memory("key_padding", x)
        self._kept.append(x)
        self.padding = x.data_ptr()
        self.padding_batch, self.padding_row = x.stride()


SIZES = (ctypes.sizeof(CallArgument), 8 * len(_JOB), 8 * len(_ROW_SET))


class PackedJobs:
    """The jobs of one phase in flat arrays, kept alive as long as this object.

    Attributes:
        address: of the first job. count: how many.
        rows: query rows over all tiles and heads, of one batch element.
        even: whether each job's keys are evenly spaced at ascending positions, each counted once: what a short call reads.
    """

    def __init__(self, jobs: tuple[Job, ...], group: int) -> None:
        self._kept: dict[Any, np.ndarray] = {}
        sets = [[self._row_set(keys) for keys in job.keys] for job in jobs]
        self._sets = np.array([s for some in sets for s in some], np.int64).reshape(-1, len(_ROW_SET))
        rows, first = [], 0
        for job, some in zip(jobs, sets, strict=True):
            where = self._sets.ctypes.data + first * self._sets.itemsize * len(_ROW_SET)
            heads = (job.heads.start, job.heads.step, job.heads.length, job.tiles)
            rows.append([*heads, *self._row_set(job.queries), where, len(some), job.fresh, _first_key(job), 0])
            first += len(some)
        later: dict[int, int] = {}  # of each kv head
        for fields, job in zip(reversed(rows), reversed(jobs), strict=True):
            kv_heads = {(job.heads.start + n * job.heads.step) // group for n in range(job.heads.length)}
            fields[-1] = min((later.get(head, _BEYOND) for head in kv_heads), default=_BEYOND)
            later |= {head: min(later.get(head, _BEYOND), fields[-2]) for head in kv_heads}
        self._jobs = np.array(rows, np.int64).reshape(-1, len(_JOB))
        self.address, self.count = self._jobs.ctypes.data, len(jobs)
        self.even = all(len(job.keys) == 1 and job.fresh and _even(job.keys[0]) for job in jobs)
        self.rows = sum(job.heads.length * job.tiles * job.queries.index.count for job in jobs)

    def _row_set(self, rows: RowSet) -> list[int]:
        index = rows.index
        starts = start = tile_step = offsets = log2_count = 0
        if isinstance(index, PeriodicRows):
            start, period, block, step = index.start, index.period, len(index.offsets), 1
            offsets = self._keep(np.array(index.offsets, np.int64), index.offsets)
            if any(n != 1 for n in index.times):
                log2_count = self._keep(np.log2(np.array(index.times)).astype(np.float32), ("log2", index.times))
        elif isinstance(index, Affine):
            start, tile_step, period, block, step = index.start, index.tile_step, index.step, 1, 1
        else:
            starts, tile_step = self._keep(index.starts, id(index)), index.starts.shape[1]
            period, block, step = 0, index.run, index.step
        low, high = rows.band.low, rows.band.high
        bounds = (-_BEYOND if low is None else max(low, -_BEYOND), _BEYOND if high is None else min(high, _BEYOND))
        if not all(abs(n) < _FAR for n in rows.at):
            raise ValueError(f"positions must lie below 2^60, got origin and step {rows.at}")
        return [starts, start, tile_step, period, block, offsets, step, log2_count, index.count, *rows.at, *bounds]

    def _keep(self, array: np.ndarray, key: Any) -> int:
        return self._kept.setdefault(key, np.ascontiguousarray(array)).ctypes.data


def _first_key(job: Job) -> int:
    """The smallest row of a job's keys; far beyond all rows where it has none."""
    return min((_first_row(keys.index) for keys in job.keys if keys.index.count), default=_BEYOND)


def _first_row(index: Index | PeriodicRows) -> int:
    if isinstance(index, PeriodicRows):
        return index.start + index.offsets[0]
    if isinstance(index, Affine):
        ends = (t * index.tile_step + i * index.step for t in (0, index.tiles - 1) for i in (0, index.count - 1))
        return index.start + min(ends)
    return int(index.starts.min()) + min(0, (index.run - 1) * index.step)


def _even(keys: RowSet) -> bool:
    return isinstance(keys.index, Affine) and keys.index.count > 0 and keys.index.step > 0 and keys.at[1] > 0


def packed(lowered: Lowered, phase: int | None, group: int = 1) -> PackedJobs:
    """A phase in flat arrays, or all of them in order; kept with the plan. A backward says how many query heads share a kv head."""
    arrays = lowered.packed.get((phase, group))
    if not isinstance(arrays, PackedJobs):
        jobs = tuple(job for some in lowered.phases for job in some) if phase is None else lowered.phases[phase]
        made = PackedJobs(jobs, group)
        # Of two threads that pack at once, both use what the first one left.
        first = lowered.packed.setdefault((phase, group), made)
        arrays = first if isinstance(first, PackedJobs) else made
    return arrays


def check_memory(name: str, x: Tensor) -> None:
    """Raise ValueError where strides are negative or leave the tensor's memory."""
    if x.numel():
        last = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        if min(x.stride(), default=0) < 0 or (last + 1) * x.element_size() > x.untyped_storage().nbytes():
            raise ValueError(f"{name} must lie within its memory, got strides {x.stride()} for shape {tuple(x.shape)}")
