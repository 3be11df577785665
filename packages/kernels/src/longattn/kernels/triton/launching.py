# pyright: reportMissingImports=false
"""What every launch of the family shares: the arguments that all kernels take, the grid, and the launch itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from functools import lru_cache
from subprocess import CalledProcessError
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from longattn.kernels.dispatch.call import Call
from longattn.kernels.dispatch.table import RowFailure
from longattn.kernels.far_rows import bounded
from longattn.kernels.problem import architecture_of
from longattn.kernels.triton.availability import FAILURES, INTERPRETED
from longattn.kernels.triton.configurations import Configuration, choose, padded
from longattn.kernels.triton.passes import DeviceTables
from longattn.kernels.triton.row_classes import gathered


@lru_cache
def programs(device: torch.device) -> int:
    """How many programs keep a device busy: its multiprocessors, twice, so that one computes while another loads."""
    return 8 if device.type == "cpu" else 2 * torch.cuda.get_device_properties(device).multi_processor_count


def precision(dtype: torch.dtype) -> str:
    """How float32 products are made: tf32 only when torch was told so."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


_COMPILER_TEXTS = ("PassManager::run failed", "Failed to find C compiler")
"""How messages of plain RuntimeErrors begin with which triton says that a kernel, or the C code that launches it, does not compile."""


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, device: torch.device, **keywords: Any) -> None:
    """Launch a kernel on `device`, whichever device is current; an empty grid launches nothing.

    Where the kernel does not compile, this row refuses from now on, and says with which configuration.

    Raises:
        RowFailure: the configuration, and what the compiler said.
        RuntimeError: the driver refused the launch; what was launched, and what the driver said.
    """
    if not math.prod(grid):
        return
    try:
        with on_device(device):
            with_scratch(device, lambda: kernel[grid](*arguments, **keywords))
    except (CompilationError, OutOfResources, PTXASError, CalledProcessError) as error:
        raise _row_failure(kernel, keywords, error) from error
    except RuntimeError as error:
        if str(error).startswith(_COMPILER_TEXTS):
            raise _row_failure(kernel, keywords, error) from error
        raise failed_launch(kernel.__name__, keywords, device, grid, error) from error


def with_scratch(device: torch.device, launch: Callable[[], object]) -> None:
    """Launch, with torch's memory for what a kernel needs beside its arguments: descriptors. A caller's own allocator stays as it was."""

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    def launch_so() -> None:
        triton.set_allocator(allocate)
        launch()

    copy_context().run(launch_so)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a device the current one: triton launches there, and takes pointers of any other without a word."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def failed_launch(
    name: str, keywords: dict[str, Any], device: torch.device, grid: tuple[int, ...], error: RuntimeError
) -> RuntimeError:
    """What was launched, and what the driver said."""
    return RuntimeError(f"{name} with {_constants(keywords)} on {device}, grid {grid}: {error}")


def _constants(keywords: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in keywords.items() if name.isupper() or name.startswith("num_")}


def _row_failure(kernel: Any, keywords: dict[str, Any], error: Exception) -> RowFailure:
    reason = f"{kernel.__name__} with {_constants(keywords)} does not compile: {type(error).__name__}: {error}"
    FAILURES.append(reason)
    return RowFailure(reason)


def tile_options(call: Call, configuration: Configuration) -> dict[str, Any]:
    """What every kernel of the family takes beside its tensors."""
    width, value_width = padded(call.q.shape[-1]), padded(call.v.shape[-1])
    return {
        "HEAD_DIM": call.q.shape[-1],
        "VALUE_DIM": call.v.shape[-1],
        "BLOCK_D": width,
        "BLOCK_V": value_width,
        "CHUNK": min(configuration.chunk or width, width),
        "MASK_ALL": call.mask is not None or call.bias is not None or call.key_padding is not None,
        "DROPOUT": call.dropout_p > 0,
        "PRECISION": precision(call.q.dtype),
        "UPCAST": INTERPRETED and call.q.dtype == torch.bfloat16,
        "num_warps": configuration.warps,
        "num_stages": configuration.stages,
    }


def value_chunk(call: Call, configuration: Configuration) -> int:
    """Columns of v that a product over them takes at a time."""
    width = padded(call.v.shape[-1])
    return min(configuration.chunk or width, width)


def mask_arguments(call: Call) -> dict[str, Any]:
    """Mask, bias and padding with their strides; what is not there is None, and leaves no trace in the kernel."""
    mask = None if call.mask is None else call.mask.view(torch.uint8)
    padding = None if call.key_padding is None else call.key_padding.view(torch.uint8)
    nq, nk = call.q.shape[1], call.k.shape[1]
    arguments: dict[str, Any] = {}
    # The kernels read a bias in float32, which ends before float64 does.
    bias = call.bias if call.bias is None or call.bias.dtype != torch.float64 else bounded(call.bias)
    for name, x in (("mask", mask), ("bias", bias)):
        wide = None if x is None else x.expand(call.q.shape[0], call.q.shape[2], nq, nk)
        arguments |= {f"{name}_ptr": wide, f"{name}_strides": None if wide is None else wide.stride()}
    return arguments | {"padding_ptr": padding, "padding_strides": None if padding is None else padding.stride()}


def has_terms(call: Call) -> bool:
    """Whether score terms act."""
    return call.softcap > 0 or call.by_distance is not None


def term_arguments(call: Call) -> dict[str, Any]:
    """Score terms; those that are not there leave no trace in the kernel. The cap is in log2 units, as scores are."""
    by_distance = call.by_distance
    return {
        "by_distance_ptr": by_distance,
        "cap": call.softcap * math.log2(math.e),
        "SOFTCAP": call.softcap > 0,
        "COLUMNS": 0 if by_distance is None else by_distance.shape[1],
    }


def shared_arguments(call: Call) -> dict[str, Any]:
    """Masks, dropout and score terms."""
    return mask_arguments(call) | dropout_arguments(call) | term_arguments(call)


def configuration_of(call: Call, kernel: str, prior: bool = False) -> Configuration:
    """The tile of a kernel for this call on its device; prior: it merges onto a state."""
    head_dim, architecture = max(call.q.shape[-1], call.v.shape[-1]), architecture_of(call.q.device)
    masked = call.dropout_p > 0 or any(x is not None for x in (call.mask, call.bias, call.key_padding))
    listed = gathered(call.plan.branches)
    return choose(kernel, architecture, head_dim, call.q.element_size(), has_terms(call), masked, prior, listed)[0]


def dropout_arguments(call: Call) -> dict[str, Any]:
    """Seed, threshold and scale of dropout, and the global number of head 0."""
    return {
        "seed": call.seed,
        "threshold": int(call.dropout_p * 2**32),
        "rescale": 1 / (1 - call.dropout_p),
        "first_head": call.plan.rectangle.heads.start,
    }


def persistent_grid(tables: DeviceTables, q: Tensor) -> tuple[int]:
    """Persistent: as many programs as keep the device busy; each does a job, then the next that is left of its turn.

    One axis, on which programs of all batch elements stand: the other two of a grid end at 65535, which a batch may exceed.
    """
    return (program_count(tables, q) * q.shape[0],)


def program_count(tables: DeviceTables, q: Tensor) -> int:
    """Programs that share the jobs of a batch element."""
    return min(tables.count, 4 * -(-programs(q.device) // max(1, q.shape[0])))


def table_arguments(tables: DeviceTables, q: Tensor) -> dict[str, Any]:
    """The tables, as kernels take them, and how many programs share them."""
    names = ("jobs", "entries", "weights", "rows")
    pointers = {f"{name}_ptr": getattr(tables, name) for name in names}
    return pointers | table_sizes(tables, q)


def table_sizes(tables: DeviceTables, q: Tensor) -> dict[str, Any]:
    """Jobs, the programs that share them, and whether rows are listed."""
    return {"job_count": tables.count, "program_count": program_count(tables, q), "LISTED": tables.listed}
