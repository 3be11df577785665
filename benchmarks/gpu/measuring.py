"""One experiment on this device: times, the peer's, what must be reached, and what of the device stood behind it."""

import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from benchmarks.gpu import ROOT
from benchmarks.gpu.device import assembler, device_state, loaded_kernels, profiled
from benchmarks.gpu.experiments import Experiment
from benchmarks.peers.on_gpu import peer_forward
from benchmarks.record import surroundings
from longattn.kernels import attend
from longattn.kernels.triton import configurations, forward_form
from longattn.kernels.triton.availability import installed_version
from longattn.patterncache import Full, Rectangle, Span


@dataclass(frozen=True)
class Row:
    """A row of the CSV; milliseconds are medians of GPU events, with the 20th and 80th percentile.

    `registers` and `spills` are of the compiled kernels as the driver loaded them, `kernel_ms` is what each took in one call, `first_call_s` is the
    first call's time, compilation included, `predicted_tflops` what the model of the compiled code said (gpu-predicted.csv, for one H100). A row
    that failed has its error as the verdict and no figures.
    """

    key: str
    head_dim: int
    direction: str
    tile: str = ""
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    tflops: float | None = None
    predicted_tflops: float | None = None
    peer: str = ""
    peer_ms: float | None = None
    target: str = ""
    verdict: str = ""
    extra_mib: float | None = None
    first_call_s: float | None = None
    registers: str = ""
    spills: str = ""
    kernel_ms: str = ""
    clock_mhz: str = ""
    device: str = ""
    driver: str = ""
    ptxas: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""


def ceilings(device: str) -> dict[str, float]:
    """What this device reaches: TB/s of a large copy (bytes read and written), TFLOP/s of a large bfloat16 product."""
    dry = device == "cpu"
    source = torch.empty(1 << (16 if dry else 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(64 if dry else 8192, 64 if dry else 8192, device=device, dtype=torch.bfloat16)
    repeats = 1 if dry else 20
    copy_ms = statistics.median(measure(lambda: target.copy_(source), device, repeats))
    product_ms = statistics.median(measure(lambda: a @ a, device, repeats))
    return {"copy": 2 * source.numel() / copy_ms / 1e9, "product": 2 * a.shape[0] ** 3 / product_ms / 1e9}


def tensors(experiment: Experiment, device: str) -> list[Tensor]:
    """q, k, v and a cotangent."""
    half = torch.float16 if experiment.dense else torch.float32
    dtype = half if device == "cpu" else torch.bfloat16
    nq, nk = experiment.lengths
    return [
        torch.randn(experiment.batch, n, experiment.heads, experiment.head_dim, device=device, dtype=dtype)
        for n in (nq, nk, nk, nq)
    ]


def ours(experiment: Experiment, data: list[Tensor]) -> Callable[[], object]:
    """The call to time."""
    q, k, v, _ = data
    options = {"backend": "triton", "deterministic": experiment.deterministic, "out_dtype": q.dtype}
    if experiment.grows:
        (keys, values), held = (torch.cat([x, torch.zeros_like(x)], 1) for x in (k, v)), count(experiment.lengths[1])

        def grown() -> Tensor:
            length = next(held)
            return attend(q, keys[:, :length], values[:, :length], experiment.pattern, **options).out

        return graded(experiment, grown, data)
    return graded(experiment, lambda: attend(q, k, v, experiment.pattern, **options).out, data)


def graded(experiment: Experiment, forward: Callable[[], Tensor], data: list[Tensor]) -> Callable[[], object]:
    """`forward`, or its gradient alone (over one kept graph), or both."""
    q, k, v, grad = data
    if experiment.direction == "forward":
        return torch.no_grad()(forward)
    for x in (q, k, v):
        x.requires_grad_()
    if experiment.direction == "both":
        return lambda: torch.autograd.grad(forward(), (q, k, v), grad)
    out = forward()
    return lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)


def replayed(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph replays it."""
    call()
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        call()
    return graph.replay


def peer_times(experiment: Experiment, data: list[Tensor], device: str, repeats: int) -> tuple[list[float], str]:
    """Milliseconds of the peer, which must say what we say; none where it does not serve, with its reason."""
    forward = peer_forward(experiment.peer, data[0], data[1], data[2], experiment.pattern)
    if forward is None:
        return [], ""
    try:
        theirs = torch.no_grad()(forward)()
    except (RuntimeError, ImportError) as refusal:
        return [], f"{experiment.peer} does not serve: {str(refusal).splitlines()[0]}"
    mine = attend(data[0], data[1], data[2], experiment.pattern, backend="triton", out_dtype=data[0].dtype).out
    torch.testing.assert_close(theirs, mine, rtol=3e-2, atol=3e-2)
    del theirs, mine
    return measure(graded(experiment, forward, data), device, repeats), ""


def measure(call: Callable[[], object], device: str, repeats: int) -> list[float]:
    """Milliseconds of each call: GPU events between calls that follow a warm-up; a wall clock on CPU."""
    call()
    times = []
    for _ in range(repeats):
        if device == "cpu":
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e3)
            continue
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last))
    return times


def host_us(call: Callable[[], object]) -> float:
    """Microseconds that the host spends on a call."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(200):
        call()
    return (time.perf_counter() - begin) / 200 * 1e6


def pairs(experiment: Experiment) -> int:
    """Visible (query, key) pairs of all heads, as often as they count."""
    nq, nk = experiment.lengths
    plan = experiment.pattern.plan(Rectangle(experiment.heads, Span(nk - nq, nq), Span(0, nk)))
    return sum(branch.pairs * branch.heads.length for branch in plan.branches)


def verdict(experiment: Experiment, values: dict[str, float | None]) -> str:
    """met, missed with the value, or nothing without a target. values: by unit; of us the least is best."""
    if experiment.target is None:
        return ""
    unit, target = experiment.target
    value = values[unit]
    if value is None:
        return "not measured"
    met = value <= target if unit == "us" else value >= target
    return "met" if met else f"missed: {value:.3g} {unit}"


PREDICTED = ROOT / "benchmarks" / "results" / "gpu-predicted.csv"


def predicted(experiment: Experiment) -> float | None:
    """The model's TFLOP/s of a dense experiment with the table's tiles, or None."""
    if experiment.pattern != Full() or experiment.tile or experiment.lengths[0] < 8192 or not PREDICTED.exists():
        return None
    way = {"forward": ", warp-specialised" if experiment.dense else ""}.get(
        experiment.direction, ", deterministic" if experiment.deterministic else ""
    )
    with PREDICTED.open(encoding="utf-8") as file:
        rows = {(row["direction"], int(row["head_dim"])): float(row["tflops"]) for row in csv.DictReader(file)}
    return rows.get((experiment.direction + way, experiment.head_dim))


def use_tile(experiment: Experiment) -> None:
    """Put the experiment's tile in the table's place, in this process."""
    if not experiment.tile:
        return
    tile = configurations.Configuration(*experiment.tile)
    if experiment.dense:
        configurations.DENSE.update((at, tile) for at in [*configurations.DENSE] if at[1] == experiment.head_dim)
        return
    kernel = "forward" if experiment.direction == "forward" else "backward_keys"
    if experiment.lengths[0] == 1:
        kernel = "decode"
    elif experiment.deterministic:
        kernel = "backward_queries"
    for at in configurations.TABLE:
        if at[0] == kernel and at[2] == experiment.head_dim:
            configurations.TABLE[at] = tile


def use_kernel(dense: bool | None) -> None:
    """Send dense tiles to the warp-specialised kernel in this process, or never."""
    if dense is not None:
        forward_form.is_dense = lambda call: dense


def run(experiment: Experiment, device: str, repeats: int, reached: dict[str, float]) -> Row:
    """One row; reached: this device's `ceilings`."""
    if experiment.fails:
        raise RuntimeError("this row fails on purpose")
    use_tile(experiment)
    use_kernel(experiment.dense)
    data = tensors(experiment, device)
    on_gpu = device != "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if on_gpu else 0
    begin = time.perf_counter()
    call = ours(experiment, data)
    call()
    if on_gpu:
        torch.cuda.synchronize()
    first_call = time.perf_counter() - begin
    timed = replayed(call) if experiment.graph else call
    times = sorted(measure(timed, device, repeats))
    clock, driver = device_state() if on_gpu else ("", "")
    extra = (torch.cuda.max_memory_allocated() - held) / 2**20 if on_gpu else 0.0
    theirs, reason = peer_times(experiment, data, device, repeats)
    ms = statistics.median(times)
    peer_ms = statistics.median(theirs) if theirs else None
    tflops = (
        {"forward": 4, "backward": 10, "both": 14}[experiment.direction]
        * pairs(experiment)
        * experiment.batch
        * experiment.head_dim
        / ms
        / 1e9
    )
    # k and v, two bytes an element.
    moved = 4 * experiment.batch * experiment.lengths[1] * experiment.heads * experiment.head_dim
    values: dict[str, float | None] = {
        "TFLOP/s": tflops,
        "product": tflops / reached["product"] if reached else None,
        "ratio": peer_ms and peer_ms / ms,
        "copy": moved / ms / 1e9 / reached["copy"] if reached else None,
        "us": host_us(call) if experiment.target and experiment.target[0] == "us" and on_gpu else None,
    }
    here, (registers, spills) = surroundings(), loaded_kernels()
    return Row(
        experiment.key, experiment.head_dim, experiment.direction, "x".join(map(str, experiment.tile)), ms, times[len(times) // 5],
        times[-1 - len(times) // 5], tflops, predicted(experiment), experiment.peer, peer_ms,
        "" if experiment.target is None else f"{experiment.target[1]:g} {experiment.target[0]}", verdict(experiment, values) or reason, extra,
        first_call, registers, spills, profiled(call) if on_gpu else "", clock,
        torch.cuda.get_device_name() if on_gpu else "cpu, interpreted", driver, assembler(), torch.__version__, installed_version() or "", here.commit, here.date,
    )  # fmt: skip
