"""One path in one process: started by `demo.paths`, answers requests on standard input with a line of JSON each.

1. Start: read the text, build q, k, v and dO, run a tiny problem so that code and threads are there; answer `ready`.
2. `run`: one timed pass, with the peak of memory above what the inputs take; answered with milliseconds and bytes.
3. `check`: errors on sampled rows beside the float64 oracle.
4. End of input: exit.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gate
from benchmarks.harness import Sample, timed
from benchmarks.memory import ResidentPeak
from benchmarks.peers.dense import dense_attention
from benchmarks.peers.torchscale_style import torchscale_style_attention
from demo.options import Options
from demo.text import embed
from longattn.attention import pattern_attention
from longattn.kernels import explain
from longattn.patterncache import Full, Pattern

_TINY = 256
_ROWS = 32


def pattern_of(path: str, options: Options) -> Pattern:
    """Who sees whom on a path."""
    return Full(causal=True) if path == "dense" else options.joined if path == "joined" else options.pattern


def attention_of(path: str, options: Options) -> gate.Attention:
    """The function of a path, "ours", "joined", "baseline" or "dense": (q, k, v) -> out, all (batch, seq, heads, head_dim)."""
    if path == "dense":
        return partial(dense_attention, causal=True)
    if path == "baseline":
        return partial(
            torchscale_style_attention, segment_lengths=options.segments, dilation_rates=options.rates, causal=True
        )
    pattern = pattern_of(path, options)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = pattern_attention(q, k, v, pattern)
        assert isinstance(out, Tensor), "without return_lse the output comes alone"
        return out

    return ours


class Peak:
    """Peak memory above the inputs: the allocator's on CUDA, the process's resident size on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._resident = ResidentPeak()
        self._base = 0

    def start(self) -> None:
        """Call the present use zero."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._base = torch.cuda.memory_allocated(self._device)
        else:
            self._resident.start()

    def growth(self) -> int | None:
        """Bytes since `start`; None where the system does not tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._base
        return self._resident.growth()


class Worker:
    """A path with its inputs. `dense` runs forward only, the others forward and backward."""

    def __init__(self, path: str, options: Options, text: bytes) -> None:
        self._path = path
        self._options = options
        self._attention = attention_of(path, options)
        self._device = torch.device(options.device)
        self._inputs = embed(text, options)
        self._pass([x[:, :_TINY] for x in self._inputs])
        self._peak = Peak(self._device)
        # Only the first pass of a process shows its memory: later ones find blocks that the allocator kept.
        self._growth: int | None = None

    def ready(self) -> dict[str, Any]:
        """What this process runs on."""
        return {"ready": True, "torch": torch.__version__, "threads": torch.get_num_threads()}

    def run(self) -> dict[str, Any]:
        """One pass: milliseconds of wall time and of CPU time (all threads), and bytes of growth."""
        first = self._growth is None
        if first:
            self._peak.start()
        forward, backward = self._pass(self._inputs)
        if first:
            self._growth = self._peak.growth()
        parts = [forward] if backward is None else [forward, backward]
        return {"wall": [one.wall for one in parts], "cpu": [one.cpu for one in parts], "growth": self._growth}

    def check(self) -> dict[str, float]:
        """Errors on sampled rows, each over the largest true value: out, and gradients of paths that compute them."""
        dense, pattern = self._path == "dense", pattern_of(self._path, self._options)
        q, k, v, grad = self._inputs
        rows = gate.sampled_rows(q.shape[1], self._options.segments, _ROWS, self._options.seed)
        truth = gate.oracle(q, k, v, grad, pattern, rows)
        return gate.errors(self._attention, q, k, v, grad, truth, gradients=not dense)

    def _pass(self, inputs: Any) -> tuple[Sample, Sample | None]:
        q, k, v, grad = inputs
        if self._path == "dense":
            with torch.no_grad():
                return self._timed(lambda: self._attention(q, k, v)), None
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        outs: list[Tensor] = []
        forward = self._timed(lambda: outs.append(self._attention(*leaves)))
        backward = self._timed(lambda: torch.autograd.grad(outs.pop(), leaves, grad))
        return forward, backward

    def _timed(self, call: Callable[[], object]) -> Sample:
        if self._device.type != "cuda":
            return timed(call)

        def finished() -> object:
            result = call()
            torch.cuda.synchronize(self._device)
            return result

        torch.cuda.synchronize(self._device)
        return timed(finished)


def missing_device(device: str) -> str | None:
    """A line that says why torch cannot use the device, or None if it can."""
    wanted = torch.device(device)
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        return f"--device {device}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
    return None


def choice(options: Options, text: bytes) -> dict[str, Any]:
    """Which backend of ours takes the problem, and every row's reasons; a refusal if none does."""
    shape = (1, len(text), options.heads, options.head_dim)
    found = explain(
        options.pattern, shape, dtype=getattr(torch, options.dtype), device=options.device, requires_grad=True
    )
    if found.backend is None:
        return {"refusal": " ".join(str(found).split())}
    return {"backend": found.backend, "explain": str(found)}


def answer(reply: dict[str, Any]) -> None:
    """One line of JSON to whoever started this process."""
    print(json.dumps(reply), flush=True)


def main() -> None:
    """Serve requests until standard input ends."""
    path, options_json, text_file = sys.argv[1:]
    options, text = Options.from_json(options_json), Path(text_file).read_bytes()
    refusal = missing_device(options.device)
    chosen = {"refusal": refusal} if refusal else choice(options, text) if path == "ours" else {}
    if "refusal" in chosen:
        answer(chosen)
        return
    worker = Worker(path, options, text)
    answer(worker.ready() | chosen)
    requests: dict[str, Callable[[], dict[str, Any]]] = {"run": worker.run, "check": worker.check}
    for line in sys.stdin:
        answer(requests[line.strip()]())


if __name__ == "__main__":
    main()
