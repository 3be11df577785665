# pyright: reportMissingImports=false
"""Launching the forward kernel: tile choice, passes, and the split over keys where queries are few."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from longattn.kernels.dispatch.call import Call
from longattn.kernels.dispatch.environment import ScratchAllocator
from longattn.kernels.triton.bound import BoundLaunch, Launch, apart, bind_launches, can_bind, is_aligned, launch_bound
from longattn.kernels.triton.forward_form import Form, form_of
from longattn.kernels.triton.forward_kernel import forward_kernel
from longattn.kernels.triton.joblist import JobTables
from longattn.kernels.triton.launch_dense import dense_configuration, dense_launch
from longattn.kernels.triton.launching import (
    persistent_grid,
    run,
    shared_arguments,
    table_arguments,
    table_sizes,
    tile_options,
)
from longattn.kernels.triton.merge_kernel import merge_kernel
from longattn.kernels.triton.passes import DeviceTables, query_passes, query_tables, tables_on
from longattn.kernels.triton.tokens_ahead import PlansAhead, TokensAhead


def forward(call: Call, dense: bool | None = None) -> tuple[Tensor, Tensor]:
    """out (batch, Nq, heads, head_dim) in out_dtype, lse (batch, Nq, heads) float32.

    dense: whether dense tiles go to the warp-specialised kernel. Default: where it serves and was right on this device.
    """
    form, allocator = form_of(call, dense), call.allocator
    memory = _memory(call.q.shape, call.v.shape[-1], call.out_dtype, form, call.q.device, allocator)
    out, lse = memory[:2]
    if not form.complete:
        # Some rows see nothing at all, and no launch writes them.
        for x, before, nothing in zip((out, lse), call.prior or (None, None), (0.0, -torch.inf), strict=True):
            x.fill_(nothing) if before is None else x.copy_(before)
    for launch in _launches(call, form, memory):
        run(launch.kernel, launch.grid, device=call.q.device, **launch.arguments)
    return _finish(memory, call.out_dtype, allocator)


class BoundForward:
    """(q, k, v, seed, allocator) -> (out, lse), for tensors laid out like those of the call that it was made from."""

    def __init__(self, call: Call) -> None:
        call = apart(call)
        self._form, self._shape, self._value_dim = form_of(call), call.q.shape, call.v.shape[-1]
        self._out_dtype, self._device = call.out_dtype, call.q.device
        memory = _memory(self._shape, self._value_dim, self._out_dtype, self._form, self._device, call.allocator)
        tensors = (call.q, call.k, call.v, *memory)
        self._launches = bind_launches(_launches(call, self._form, memory), tensors, self._device)

    def at_lengths(self, call: Call) -> BoundForward | None:
        """The same for a call that differs only in the lengths of k and v; None where it is computed in another form."""
        form = form_of(call) if can_bind(call) else None
        merges = self._form.parts > 1
        if form is None or form != self._form or any(form.split) or len(self._launches) != len(form.split) + merges:
            return None
        bound = object.__new__(BoundForward)
        bound.__dict__ = self.__dict__.copy()
        bound._launches = self._launches.copy()
        for number in range(len(form.split)):
            launch = self._over(number, _tables(call, number, form)[1], call.q, call.k, call.v)
            if launch is None:
                return None
            bound._launches[number] = launch
        return bound

    def _over(self, number: int, tables: DeviceTables, q: Tensor, k: Tensor, v: Tensor) -> BoundLaunch | None:
        """A launch over other tables, and over keys of another length."""
        arguments = {"k_strides": k.stride(), "v_strides": v.stride(), **table_sizes(tables, q)}
        return self._launches[number].changed(persistent_grid(tables, q), arguments, tables)

    def over_tables(self, tables: DeviceTables, q: Tensor, k: Tensor, v: Tensor) -> BoundForward | None:
        """The same over tables of its own, which it keeps, for keys of their length; None where other kernels would serve."""
        launch = self._over(0, tables, q, k, v) if is_aligned(q, k, v) else None
        if launch is None:
            return None
        bound = object.__new__(BoundForward)
        bound.__dict__ = self.__dict__ | {"_launches": [launch, *self._launches[1:]], "_tables": tables}
        return bound

    def tokens_ahead(self, plans: PlansAhead) -> TokensAhead | None:
        """What binds lengths of a cache that grows by a key a call together; None where a call is no single launch of one query a head."""
        form = self._form
        single = self._shape[1] == 1 and form.single and form.complete and not any(form.split)
        if not single or len(self._launches) != 1 + (form.parts > 1):
            return None
        return TokensAhead(form, self.over_tables, plans)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, allocator: ScratchAllocator
    ) -> tuple[Tensor, Tensor] | None:
        """Compute; out and lse are the allocator's. None: the plan is gone, or a tensor lies where the kernels were not compiled for it."""
        if any(launch.outlived for launch in self._launches) or not is_aligned(q, k, v):
            return None
        memory = _memory(self._shape, self._value_dim, self._out_dtype, self._form, self._device, allocator)
        if not self._form.complete:
            memory[0].zero_()
            memory[1].fill_(-torch.inf)
        tensors, number = (q, k, v, *memory), 0 if seed is None else int(seed)
        launch_bound(self._launches, tensors, number, self._device)
        return _finish(memory, self._out_dtype, allocator)


def bind(call: Call, out: Tensor, lse: Tensor) -> BoundForward | None:
    """`forward` of such calls with everything in place but tensors and seed; None where a call has more than q, k and v."""
    return BoundForward(call) if can_bind(call) else None


def _memory(
    q_shape: torch.Size,
    dim: int,
    out_dtype: torch.dtype,
    form: Form,
    device: torch.device,
    allocator: ScratchAllocator,
) -> tuple[Tensor, ...]:
    """out and lse, unwritten, and a state that one launch hands to the next, or where keys are split the parts' own.

    out is in out_dtype at once where one pass writes it.
    """
    shape, dtype = (*q_shape[:3], dim), out_dtype if form.single else torch.float32
    out = allocator.empty(shape, dtype, device, "output" if dtype == out_dtype else "temp")
    lse = allocator.empty(shape[:3], torch.float32, device, "temp")
    if form.handed:
        return out, lse, out if dtype == torch.float32 else allocator.empty(shape, torch.float32, device, "temp")
    if form.parts == 1:
        return out, lse
    parts = allocator.empty((form.parts, *shape), torch.float32, device, "temp")
    return out, lse, parts, allocator.empty((form.parts, *shape[:3]), torch.float32, device, "temp")


def _finish(memory: tuple[Tensor, ...], out_dtype: torch.dtype, allocator: ScratchAllocator) -> tuple[Tensor, Tensor]:
    """out in out_dtype, and lse; the rest goes back to its owner."""
    out, lse, *beside = memory
    for x in beside:
        if x is not out:
            allocator.release(x, "temp")
    if out.dtype == out_dtype:
        return out, lse
    final = allocator.empty(out.shape, out_dtype, out.device, "output").copy_(out)
    allocator.release(out, "temp")
    return final, lse


def _launches(call: Call, form: Form, memory: tuple[Tensor, ...]) -> Iterator[Launch]:
    """Pass by pass; where keys are split, a partial state for each part, then one merge of all, the prior included."""
    out, lse, *beside = memory
    if form.parts > 1:
        parts, parts_lse = beside
        strides = (parts.stride()[1:], parts_lse.stride()[1:], (parts.stride(0), parts_lse.stride(0)))
        yield _launch(call, 0, form, parts, parts_lse, None, strides)
        yield merge_launch(parts, parts_lse, call.prior, out, lse)
        return
    for number, launch in enumerate(query_passes(call.plan).launches):
        prior, split = call.prior if launch.fresh else (out, lse), form.split[number]
        strides = (out.stride(), lse.stride(), (0, 0))
        if split is None:
            yield _launch(call, number, form, out, lse, prior, strides)
            continue
        if split.rest is not None:
            state = beside[0] if beside else out
            yield _launch(call, number, form, state, lse, prior, strides, split.rest)
            prior = state, lse
        yield dense_launch(call, number, split.dense, out, lse, prior)


def merge_launch(
    parts: Tensor, parts_lse: Tensor, prior: tuple[Tensor, Tensor] | None, out: Tensor, lse: Tensor
) -> Launch:
    """Merges (parts, batch, Nq, heads, d) states, and a prior, into contiguous out (batch, Nq, heads, d) and lse."""
    *shape, dim = out.shape
    rows = math.prod(shape)
    prior_out, prior_lse = (None, None) if prior is None else (x.contiguous() for x in prior)
    arguments = {
        "parts_ptr": parts, "parts_lse_ptr": parts_lse, "prior_out_ptr": prior_out, "prior_lse_ptr": prior_lse,
        "out_ptr": out, "lse_ptr": lse, "rows": rows, "part_stride": parts.stride(0), "part_lse_stride": parts_lse.stride(0),
        "PARTS": parts.shape[0], "HEAD_DIM": dim, "BLOCK_D": 1 << (dim - 1).bit_length(), "ROWS": 16, "num_warps": 4,
    }  # fmt: skip
    return Launch(merge_kernel, (-(-rows // 16),), arguments)


def _launch(
    call: Call,
    number: int,
    form: Form,
    out: Tensor,
    lse: Tensor,
    prior: tuple[Tensor, Tensor] | None,
    strides: tuple[tuple[int, ...], tuple[int, ...], tuple[int, int]],
    rest: JobTables | None = None,
) -> Launch:
    """The forward kernel over all jobs of a pass, or over the rest of them; strides: of out, of lse, and of both by part."""
    owned, tables = _tables(call, number, form, rest)
    prior_out, prior_lse = (None, None) if prior is None else prior
    arguments = {
        "q_ptr": call.q, "k_ptr": call.k, "v_ptr": call.v, "out_ptr": out, "lse_ptr": lse, "prior_out_ptr": prior_out, "prior_lse_ptr": prior_lse,
        "q_strides": call.q.stride(), "k_strides": call.k.stride(), "v_strides": call.v.stride(),
        "out_strides": strides[0], "lse_strides": strides[1], "part_strides": strides[2],
        "prior_out_strides": None if prior_out is None else prior_out.stride(),
        "prior_lse_strides": None if prior_lse is None else prior_lse.stride(),
        "scale": abs(call.scale) * math.log2(math.e), "FLIP": call.scale < 0,
        "GROUP": call.q.shape[2] // call.k.shape[2], "PACK": form.pack, "BLOCK_M": owned, "BLOCK_N": form.tile.streamed,
        **shared_arguments(call), **table_arguments(tables, call.q), **tile_options(call, form.tile),
    }  # fmt: skip
    return Launch(forward_kernel, persistent_grid(tables, call.q), arguments, tables)


def _tables(call: Call, number: int, form: Form, rest: JobTables | None = None) -> tuple[int, DeviceTables]:
    """The query rows that a job of a launch owns, and the tables of its jobs."""
    pack, parts = form.pack, form.parts
    owned = max(form.tile.owned, 1 << (pack - 1).bit_length())
    if rest is not None:
        owned = min(owned, dense_configuration(call).owned)
    block = (owned, form.tile.streamed)
    key = ("queries" if rest is None else "rest", number, *block, pack, parts)
    tables = tables_on(
        call.plan, key, call.q.device, lambda: rest or query_tables(call.plan, number, block, pack, parts)
    )
    return owned, tables
