# pyright: reportMissingImports=false
"""What every launch of the family shares: the arguments that all kernels take, the grid, and the launch itself."""

from __future__ import annotations

from typing import Any

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from longattn.kernels.dispatch.call import Call
from longattn.kernels.dispatch.table import RowFailure
from longattn.kernels.far_rows import bounded
from longattn.kernels.triton.availability import FAILURES, INTERPRETED
from longattn.kernels.triton.configurations import Configuration
from longattn.kernels.triton.passes import DeviceTables


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
        "UPCAST": INTERPRETED and call.q.dtype == torch.bfloat16,
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


def persistent_grid(tables: DeviceTables, call: Call) -> tuple[int, int]:
    """Persistent: as many programs as keep the device busy; each does a job, then the next that is left of its turn."""
    busy = -(-programs(call.q.device) // call.q.shape[0])
    return min(tables.count, 4 * busy), call.q.shape[0]


def table_arguments(tables: DeviceTables) -> dict[str, Any]:
    """The tables, as kernels take them."""
    names = ("jobs", "entries", "weights", "rows")
    return {f"{name}_ptr": getattr(tables, name) for name in names} | {"job_count": tables.count}
