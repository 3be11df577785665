"""Attention on a GPU: gradients first, then the table. `python -m benchmarks.gpu` on a machine with one, `--dry` without.

Self-contained: it finds the four packages in this checkout and needs torch and triton. Each experiment states its work as FLOPs of
visible pairs (4, 10 or 14 times pairs * head_dim for forward, backward, both) and its target; a missed one is a row like any
other. Nothing is timed unless every kernel agrees with the float64 oracle on this device, gradients included. `--dry` runs the same path
on CPU tensors in triton's interpreter, on tiny sizes, and writes no row.
"""

import argparse
import csv
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for _package in ("bufmgr", "patterncache", "kernels", "attention"):
    sys.path.insert(0, str(ROOT / "packages" / _package / "src"))
if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when triton is imported

# After the paths and the variable above, which they read.
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.peers.on_gpu import peer_forward  # noqa: E402
from benchmarks.record import surroundings  # noqa: E402
from longattn.kernels import attend  # noqa: E402
from longattn.kernels.testing import Case, check_backend  # noqa: E402
from longattn.patterncache import Dilated, Full, Pattern, Rectangle, Span, Window  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "gpu.csv"
SEGMENTS, RATES = (2048, 4096, 8192), (1, 2, 4)
READ_TB_S = 4.3  # what a large copy reaches on an H200: the measure of decode


@dataclass(frozen=True)
class Experiment:
    """One line of the table.

    Attributes:
        key, pattern, lengths, batch, heads, head_dim: what is computed. direction: forward, backward or both.
        peer: one of `peers/on_gpu.py`, or "" (none). deterministic: the second way of the backward.
        target: unit and least (for ms and us: most) value that must be reached, or None.
    """

    key: str
    pattern: Pattern
    lengths: tuple[int, int]
    batch: int
    heads: int
    head_dim: int
    direction: str = "forward"
    peer: str = ""
    deterministic: bool = False
    target: tuple[str, float] | None = None


@dataclass(frozen=True)
class Row:
    """A row of the CSV; milliseconds are medians of GPU events, with the 20th and 80th percentile."""

    key: str
    head_dim: int
    direction: str
    ms: float
    ms_p20: float
    ms_p80: float
    tflops: float
    peer: str
    peer_ms: float | None
    target: str
    verdict: str
    extra_mib: float
    device: str
    torch: str
    triton: str
    commit: str
    date: str


def experiments(dry: bool) -> Iterator[Experiment]:
    """What is measured; `dry` keeps the kinds and shrinks the sizes."""
    if dry:
        small = Dilated((64, 128), (1, 2))
        yield Experiment("flash", Full(), (70, 70), 1, 2, 16)
        yield Experiment("flash-causal", Full(causal=True), (70, 70), 1, 1, 16, "backward", "dense")
        yield Experiment("flash-cudnn", Full(), (70, 70), 1, 1, 16, peer="cudnn")
        yield Experiment("longnet", small, (128, 128), 1, 1, 16, "both", "torchscale-style", deterministic=True)
        yield Experiment("longnet-flex", small, (128, 128), 1, 1, 16, peer="flex-permuted")
        yield Experiment("decode", Window(1 << 20), (1, 300), 1, 2, 16, target=("bandwidth", 0.85))
        return
    dims = {128: (520.0, 480.0, 400.0, 290.0), 64: (420.0, 0.0, 320.0, 230.0)}
    for dim, (full, causal, fast, fixed) in dims.items():
        for n in (8192, 16384):
            size = ((n, n), 16384 // n, 2048 // dim, dim)
            yield Experiment(f"flash-{n}", Full(), *size, peer="dense", target=("TFLOP/s", full))
            target = ("TFLOP/s", causal) if causal and n == 8192 else None
            yield Experiment(f"flash-causal-{n}", Full(causal=True), *size, peer="dense", target=target)
            yield Experiment(f"flash-{n}", Full(), *size, "backward", "dense", target=("TFLOP/s", fast))
            yield Experiment(f"flash-cudnn-{n}", Full(), *size, peer="cudnn")
            yield Experiment(f"flash-cudnn-{n}", Full(), *size, "backward", "cudnn")
            yield Experiment(f"flash-fixed-{n}", Full(), *size, "backward", "", True, ("TFLOP/s", fixed))
        longnet = Dilated(SEGMENTS, RATES)
        size = ((131072, 131072), 1, 8, dim)
        yield Experiment("longnet-131072", longnet, *size, target=("ms", 2.0 if dim == 64 else 3.2))
        yield Experiment("longnet-131072-style", longnet, *size, peer="torchscale-style", target=("ratio", 1.9))
        yield Experiment("longnet-131072-style", longnet, *size, "both", "torchscale-style", target=("ratio", 2.0))
        yield Experiment("longnet-causal-131072", longnet.with_causal(True), *size)
        # FlexAttention's block mask is made densely: at 32768 a head's still fits.
        yield Experiment("longnet-32768-flex", longnet, (32768, 32768), 1, 8, dim, peer="flex-permuted")
    # 512 MiB of keys and values, bfloat16.
    yield Experiment("decode-512MiB", Window(1 << 30), (1, 131072), 8, 16, 64, target=("bandwidth", 0.85))
    yield Experiment("overhead", Full(), (16, 16), 1, 1, 64, target=("us", 40.0))


def gate(dry: bool, device: str) -> None:
    """Outputs, lse and gradients of every kernel against the oracle on this device; AssertionError where one is wrong.

    On Hopper this is what catches a miscompiled product before it is timed.
    """
    half = torch.float32 if dry else torch.bfloat16
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        for dim in (16,) if dry else (64, 128):
            for pattern in (Full(causal=True), Dilated((64, 128), (1, 2)), Window(40, sinks=3)):
                length = 70 if dry else 333
                case = Case(
                    pattern, (length, length), batch=1, kv_heads=1, group=2, head_dim=dim, dtype=half, device=device
                )
                check_backend("triton", case)
    torch.use_deterministic_algorithms(False)
    print("gate: outputs, lse and gradients agree with the oracle")


def tensors(asked: Experiment, device: str) -> list[Tensor]:
    """q, k, v and a cotangent."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    nq, nk = asked.lengths
    sizes = (nq, nk, nk, nq)
    return [torch.randn(asked.batch, n, asked.heads, asked.head_dim, device=device, dtype=dtype) for n in sizes]


def ours(asked: Experiment, data: list[Tensor]) -> Callable[[], object]:
    """The call to time."""
    q, k, v, _ = data
    options = {"backend": "triton", "deterministic": asked.deterministic, "out_dtype": q.dtype}
    return graded(asked, lambda: attend(q, k, v, asked.pattern, **options).out, data)


def graded(asked: Experiment, forward: Callable[[], Tensor], data: list[Tensor]) -> Callable[[], object]:
    """`forward`, or its gradient alone (over one kept graph), or both."""
    q, k, v, grad = data
    if asked.direction == "forward":
        return torch.no_grad()(forward)
    for x in (q, k, v):
        x.requires_grad_()
    if asked.direction == "both":
        return lambda: torch.autograd.grad(forward(), (q, k, v), grad)
    out = forward()
    return lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)


def peer_times(asked: Experiment, data: list[Tensor], device: str, repeats: int) -> list[float]:
    """Milliseconds of the peer, which must say what we say; none where there is no peer, or torch does not serve it, with its reason."""
    forward = peer_forward(asked.peer, data[0], data[1], data[2], asked.pattern)
    if forward is None:
        return []
    try:
        theirs = torch.no_grad()(forward)()
    except RuntimeError as refusal:
        print(f"{asked.key}: {asked.peer} does not serve: {str(refusal).splitlines()[0]}", flush=True)
        return []
    mine = attend(data[0], data[1], data[2], asked.pattern, backend="triton", out_dtype=data[0].dtype).out
    torch.testing.assert_close(theirs, mine, rtol=3e-2, atol=3e-2)
    del theirs, mine
    return measure(graded(asked, forward, data), device, repeats)


def measure(call: Callable[[], object], device: str, repeats: int) -> list[float]:
    """Milliseconds of each call: GPU events between calls that follow a warm-up; a wall clock on CPU."""
    call()
    found = []
    for _ in range(repeats):
        if device == "cpu":
            begin = time.perf_counter()
            call()
            found.append((time.perf_counter() - begin) * 1e3)
            continue
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        found.append(first.elapsed_time(last))
    return found


def host_us(call: Callable[[], object]) -> float:
    """Microseconds that the host spends on a call."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(200):
        call()
    return (time.perf_counter() - begin) / 200 * 1e6


def pairs(asked: Experiment) -> int:
    """Visible (query, key) pairs of all heads, as often as they count."""
    nq, nk = asked.lengths
    plan = asked.pattern.plan(Rectangle(asked.heads, Span(nk - nq, nq), Span(0, nk)))
    return sum(branch.pairs * branch.heads.length for branch in plan.branches)


def verdict(asked: Experiment, ms: float, tflops: float, peer_ms: float | None, us: float | None) -> str:
    """met, missed with the value, or nothing without a target."""
    if asked.target is None:
        return ""
    unit, wanted = asked.target
    moved = 4 * asked.batch * asked.lengths[1] * asked.heads * asked.head_dim  # k and v, two bytes an element
    values = {"TFLOP/s": tflops, "ms": -ms, "us": None if us is None else -us, "ratio": peer_ms and peer_ms / ms}
    values["bandwidth"] = moved / (ms * 1e-3) / (READ_TB_S * 1e12)
    found, bound = values[unit], -wanted if unit in ("ms", "us") else wanted
    if found is None:
        return "not measured"
    return "met" if found >= bound else f"missed: {abs(found):.3g} {unit}"


def run(asked: Experiment, device: str, repeats: int) -> Row:
    """One row."""
    data = tensors(asked, device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    held = 0 if device == "cpu" else torch.cuda.memory_allocated()
    call = ours(asked, data)
    times = sorted(measure(call, device, repeats))
    extra = (torch.cuda.max_memory_allocated() - held) / 2**20 if device != "cpu" else 0.0
    theirs = peer_times(asked, data, device, repeats)
    peer_ms = statistics.median(theirs) if theirs else None
    us = host_us(call) if asked.target and asked.target[0] == "us" and device != "cpu" else None
    ms = statistics.median(times)
    factor = {"forward": 4, "backward": 10, "both": 14}[asked.direction]
    tflops = factor * pairs(asked) * asked.batch * asked.head_dim / (ms * 1e-3) / 1e12
    here = surroundings()
    name = "cpu, interpreted" if device == "cpu" else torch.cuda.get_device_name()
    target = "" if asked.target is None else f"{asked.target[1]:g} {asked.target[0]}"
    low, high = times[len(times) // 5], times[-1 - len(times) // 5]
    found = verdict(asked, ms, tflops, peer_ms, us)
    return Row(
        asked.key, asked.head_dim, asked.direction, ms, low, high, tflops, asked.peer, peer_ms, target, found, extra,
        name, torch.__version__, version("triton"), here.commit, here.date,
    )  # fmt: skip


def capture(device: str) -> None:
    """A call in a CUDA graph, after one warm-up that put its tables on the device: same bits on replay."""
    q = torch.randn(1, 256, 2, 64, device=device, dtype=torch.bfloat16)
    expected = attend(q, q, q, Full(causal=True), backend="triton").out
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        got = attend(q, q, q, Full(causal=True), backend="triton").out
    graph.replay()
    assert torch.equal(got, expected), "a captured call gave other bits"


def main() -> int:
    """The gate, then every experiment; rows go to results/gpu.csv as they come."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--dry", action="store_true", help="tiny, interpreted on CPU, no rows")
    parser.add_argument("--only", default="", help="experiments whose key holds this")
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    device = "cpu" if options.dry else "cuda"
    if not options.dry and not torch.cuda.is_available():
        print("no GPU here: nothing was timed. --dry runs the same path in triton's interpreter.")
        return 2
    gate(options.dry, device)
    if not options.dry:
        capture(device)
    for asked in experiments(options.dry):
        if options.only not in asked.key:
            continue
        row = run(asked, device, 1 if options.dry else options.repeats)
        print(
            ", ".join(f"{name}={value}" for name, value in asdict(row).items() if value not in ("", None)), flush=True
        )
        if not options.dry:
            append(row)
    return 0


def append(row: Row) -> None:
    """Add a row to the CSV, with its header where there is none yet."""
    fresh = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        if fresh:
            writer.writeheader()
        writer.writerow(asdict(row))


if __name__ == "__main__":
    sys.exit(main())
