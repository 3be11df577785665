# pyright: reportMissingImports=false
"""Launching the forward kernel: tables, strides, grid and tile choice. The only other thing between a `Call` and a kernel is `passes`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from longattn.kernels.dispatch.call import Call
from longattn.kernels.dispatch.table import RowFailure
from longattn.kernels.far_rows import bounded
from longattn.kernels.problem import architecture_of
from longattn.kernels.triton.configurations import Configuration, choose
from longattn.kernels.triton.forward_kernel import forward_kernel
from longattn.kernels.triton.merge_kernel import merge_kernel
from longattn.kernels.triton.passes import DeviceTables, packable, query_passes, query_tables, tables_on
from longattn.kernels.triton.row import FAILURES, INTERPRETED

_DECODE_ROWS = 64
"""Query rows x grouped heads up to which a call is a decode: one tile of queries, keys split over programs."""

_PART_TILES = 2
"""Tiles that a part of a split has at least."""


def interpreting() -> bool:
    """Whether kernels run in triton's interpreter."""
    return INTERPRETED


def programs(device: torch.device) -> int:
    """How many programs keep a device busy: its multiprocessors, twice, so that one computes while another loads."""
    return 8 if device.type == "cpu" else 2 * torch.cuda.get_device_properties(device).multi_processor_count


def precision(dtype: torch.dtype) -> str:
    """How float32 products are made: tf32 only when torch was told so."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """Launch a kernel; where it does not compile, this row refuses from now on, and says with which configuration.

    Raises:
        RowFailure: the configuration, and what the compiler said.
    """
    try:
        kernel[grid](*arguments, **named)
    except (CompilationError, OutOfResources, PTXASError) as error:
        asked = {name: value for name, value in named.items() if name.isupper() or name.startswith("num_")}
        said = f"{kernel.__name__} with {asked} does not compile: {type(error).__name__}: {error}"
        FAILURES.append(said)
        raise RowFailure(said) from error


def tile_options(call: Call, configuration: Configuration, width: int) -> dict[str, Any]:
    """What every kernel of the family takes beside its tensors."""
    return {
        "HEAD_DIM": call.q.shape[-1],
        "BLOCK_D": width,
        "CHUNK": configuration.chunk or width,
        "MASK_ALL": call.mask is not None or call.bias is not None or call.key_padding is not None,
        "DROPOUT": call.dropout_p > 0,
        "PRECISION": precision(call.q.dtype),
        "UPCAST": interpreting() and call.q.dtype == torch.bfloat16,
        "num_warps": configuration.warps,
        "num_stages": configuration.stages,
    }


def mask_arguments(call: Call) -> dict[str, Any]:
    """Mask, bias and padding with their strides; what is not there is None, and leaves no trace in the kernel."""
    mask = None if call.mask is None else call.mask.view(torch.uint8)
    padding = None if call.key_padding is None else call.key_padding.view(torch.uint8)
    nq, nk = call.q.shape[1], call.k.shape[1]
    found: dict[str, Any] = {}
    # The kernels read a bias in float32, which ends before float64 does.
    bias = call.bias if call.bias is None or call.bias.dtype != torch.float64 else bounded(call.bias)
    for name, x in (("mask", mask), ("bias", bias)):
        wide = None if x is None else x.expand(call.q.shape[0], call.q.shape[2], nq, nk)
        found |= {f"{name}_ptr": wide, f"{name}_strides": None if wide is None else wide.stride()}
    return found | {"padding_ptr": padding, "padding_strides": None if padding is None else padding.stride()}


def dropout_arguments(call: Call) -> dict[str, Any]:
    """Seed, threshold and scale of dropout, and the global number of head 0."""
    return {
        "seed": call.seed,
        "threshold": int(call.dropout_p * 2**32),
        "rescale": 1 / (1 - call.dropout_p),
        "first_head": call.plan.rectangle.heads.start,
    }


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out (batch, Nq, heads, head_dim) in out_dtype, lse (batch, Nq, heads) float32."""
    passes = query_passes(call.plan)
    pack = _pack(call)
    parts = _parts(call, pack) if len(passes.launches) == 1 and passes.complete else 1
    if parts > 1:
        return _split(call, pack, parts)
    single = len(passes.launches) == 1
    out, lse = _new_state(call, call.out_dtype if single else torch.float32, not passes.complete)
    for number, launch in enumerate(passes.launches):
        prior = call.prior if launch.fresh else (out, lse)
        _launch(call, number, pack, out, lse, prior)
    if out.dtype == call.out_dtype:
        return out, lse
    final = call.allocator.empty(out.shape, call.out_dtype, out.device, "output").copy_(out)
    call.allocator.release(out, "temp")
    return final, lse


def _new_state(call: Call, dtype: torch.dtype, filled: bool) -> tuple[Tensor, Tensor]:
    """out and lse to write: unwritten, or, where some rows see nothing at all, the prior's or the empty state."""
    role = "output" if dtype == call.out_dtype else "temp"
    out = call.allocator.empty(call.q.shape, dtype, call.q.device, role)
    lse = call.allocator.empty(call.q.shape[:3], torch.float32, call.q.device, "temp")
    if filled and call.prior is not None:
        out.copy_(call.prior[0])
        lse.copy_(call.prior[1])
    elif filled:
        out.zero_()
        lse.fill_(-torch.inf)
    return out, lse


def _pack(call: Call) -> int:
    """How many heads are rows of one tile: all that share a kv head where queries are few, else one."""
    group = call.q.shape[2] // call.k.shape[2]
    few = call.q.shape[1] * group <= _DECODE_ROWS
    return group if few and group > 1 and packable(call.plan, group) else 1


def _parts(call: Call, pack: int) -> int:
    """Into how many parts keys are split: as many as keep the device busy, where queries alone do not."""
    batch, rows, heads, _ = call.q.shape
    if rows * pack > _DECODE_ROWS or not batch * rows:
        return 1
    tile = _configuration(call, pack)[0].streamed
    wanted = programs(call.q.device) // (batch * heads // pack)
    return max(1, min(wanted, call.k.shape[1] // (_PART_TILES * tile)))


def _split(call: Call, pack: int, parts: int) -> tuple[Tensor, Tensor]:
    """Split over keys: a partial state for each part, then one merge of all, the prior included."""
    partial = call.allocator.empty((parts, *call.q.shape), torch.float32, call.q.device, "temp")
    partial_lse = call.allocator.empty((parts, *call.q.shape[:3]), torch.float32, call.q.device, "temp")
    _launch(call, 0, pack, partial[0], partial_lse[0], None, (parts, partial.stride(0), partial_lse.stride(0)))
    out, lse = _new_state(call, call.out_dtype, False)
    merge_states(partial, partial_lse, call.prior, out, lse)
    for x in (partial, partial_lse):
        call.allocator.release(x, "temp")
    return out, lse


def merge_states(
    parts: Tensor, parts_lse: Tensor, prior: tuple[Tensor, Tensor] | None, out: Tensor, lse: Tensor
) -> None:
    """Merge (parts, batch, Nq, heads, d) states, and a prior, into contiguous out (batch, Nq, heads, d) and lse."""
    *shape, dim = out.shape
    rows = math.prod(shape)
    prior_out, prior_lse = (None, None) if prior is None else (x.contiguous() for x in prior)
    arguments = (parts, parts_lse, prior_out, prior_lse, out, lse, rows, parts.stride(0), parts_lse.stride(0))
    sizes = {"PARTS": parts.shape[0], "HEAD_DIM": dim, "BLOCK_D": 1 << (dim - 1).bit_length(), "ROWS": 16}
    run(merge_kernel, (-(-rows // 16),), *arguments, **sizes, num_warps=4)


def _configuration(call: Call, pack: int) -> tuple[Configuration, int]:
    few = call.q.shape[1] * pack <= _DECODE_ROWS
    kernel = "decode" if few else "forward"
    return choose(kernel, architecture_of(call.q.device), call.q.shape[-1], call.q.element_size())


def _launch(
    call: Call,
    number: int,
    pack: int,
    out: Tensor,
    lse: Tensor,
    prior: tuple[Tensor, Tensor] | None,
    split: tuple[int, int, int] = (1, 0, 0),
) -> None:
    """One launch of the forward kernel over all jobs of a pass; split: (parts, stride of out's, stride of lse's part)."""
    configuration, width = _configuration(call, pack)
    owned = max(configuration.owned, 1 << (pack - 1).bit_length())
    key = ("queries", number, owned, configuration.streamed, pack, split[0])
    block = (owned, configuration.streamed)
    tables = tables_on(call.plan, key, call.q.device, lambda: query_tables(call.plan, number, block, pack, split[0]))
    if not tables.count or not call.q.shape[0]:
        return
    prior_out, prior_lse = (None, None) if prior is None else prior
    strides = {f"{name}_strides": x.stride() for name, x in zip("qkv", (call.q, call.k, call.v), strict=True)}
    run(
        forward_kernel, persistent_grid(tables, call),
        call.q, call.k, call.v, out, lse, prior_out, prior_lse,
        **table_arguments(tables), **mask_arguments(call), **dropout_arguments(call), **strides,
        out_strides=out.stride(), lse_strides=lse.stride(), part_strides=split[1:],
        prior_out_strides=None if prior_out is None else prior_out.stride(),
        prior_lse_strides=None if prior_lse is None else prior_lse.stride(),
        scale=abs(call.scale) * math.log2(math.e), FLIP=call.scale < 0,
        GROUP=call.q.shape[2] // call.k.shape[2], PACK=pack, BLOCK_M=owned, BLOCK_N=configuration.streamed,
        LISTED=tables.listed, **tile_options(call, configuration, width),
    )  # fmt: skip


def persistent_grid(tables: DeviceTables, call: Call) -> tuple[int, int]:
    """Persistent: as many programs as keep the device busy; each does a job, then the next that is left of its turn."""
    busy = -(-programs(call.q.device) // call.q.shape[0])
    return min(tables.count, 4 * busy), call.q.shape[0]


def table_arguments(tables: DeviceTables) -> dict[str, Any]:
    """The tables, as kernels take them."""
    names = ("jobs", "entries", "weights", "rows")
    return {f"{name}_ptr": getattr(tables, name) for name in names} | {"job_count": tables.count}
