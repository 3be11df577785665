"""What of the device stands behind a row: kernels as they were loaded, their times, clocks, driver and assembler."""

import subprocess
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from triton import knobs


def loaded_kernels() -> tuple[str, str]:
    """(registers, spilled bytes) a thread of each compiled kernel, as the driver loaded it."""
    registers, spills = [], []
    for module, name in (
        ("forward_kernel", "forward_kernel"), ("dense_kernel", "dense_kernel"), ("merge_kernel", "merge_kernel"), ("backward_kernel", "rows_kernel"),
        ("backward_kernel", "keys_kernel"), ("query_gradient_kernel", "queries_kernel"),
    ):  # fmt: skip
        kernel: Any = getattr(import_module(f"longattn.kernels.triton.{module}"), name)
        for cached in getattr(kernel, "device_caches", {}).values():
            for compiled in cached[0].values():
                registers.append(f"{name} {compiled.n_regs}")
                spills.append(f"{name} {compiled.n_spills}")
    return "; ".join(registers), "; ".join(spills)


def kernel_times(events: Iterable[Any]) -> str:
    """Milliseconds of each kernel, from the events of torch's profiler that ran on the device."""
    ran = [event for event in events if event.device_type.name != "CPU"]
    return "; ".join(f"{event.key[:60]} {event.self_device_time_total / 1e3:.4f}" for event in ran)


def profiled(call: Callable[[], object]) -> str:
    """`kernel_times` of one call."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return kernel_times(seen.key_averages())


def assembler() -> str:
    """The version of the ptxas that compiles for this device."""
    nvidia: Any = knobs.nvidia
    blackwell = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 10
    return (nvidia.ptxas_blackwell if blackwell else nvidia.ptxas).version


def device_state() -> tuple[str, str]:
    """(SM clock in MHz, driver version), as nvidia-smi tells them; empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=clocks.sm,driver_version", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return "", ""
    clock, _, driver = told.splitlines()[0].partition(",")
    return clock.strip(), driver.strip()
