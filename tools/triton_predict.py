# pyright: reportMissingImports=false
"""What a GPU should reach, from the compiler's output alone: a model's prediction, never a measurement.

`python -m tools.triton_predict [--write]` compiles the dense loop of each kernel for sm_90, counts its instructions, and states the model:
a tile takes 1.25 * (tensor + max(issue, exponentials)) clocks, with

- tensor: floating-point operations of the tile's products / 4096, what a Hopper multiprocessor does in a clock with bfloat16;
- issue: instructions of the loop a warp * warps / 4 schedulers;
- exponentials: scores of the tile / 16 a clock.

The warp-specialised kernel has two consumers of half a tile each, which run apart: one may compute while the other waits for its product. How much of
the shorter term that hides is not known; a third is assumed (`HIDDEN`), which is where its sketch was put: 420 to 470 and 500 to 600 TFLOP/s.

132 multiprocessors at 1.7 GHz. It gives Triton's own tutorial kernel 357 and 485 TFLOP/s at head_dim 64 and 128, which is known to reach about
400 and 450 to 490: differences under a fifth say nothing. `--write` writes benchmarks/results/gpu-predicted.csv.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import triton

from longattn.kernels.triton.configurations import DENSE, TABLE
from tools.sass import disassemble, product_loops
from tools.triton_ahead import TableLine, compiled

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "gpu-predicted.csv"
MULTIPROCESSORS, CLOCK, TENSOR, EXPONENTIALS, SCHEDULERS, OVERHEAD = 132, 1.7e9, 4096, 16, 4, 1.25

HIDDEN = 1 / 3
"""Assumed share of the shorter of tensor and issue clocks that two consumers hide."""

ROWS: dict[str, tuple[tuple[str, int], ...]] = {
    "forward": (("forward", 2),),
    "forward, warp-specialised": (("dense", 2),),
    "backward": (("backward_keys", 5),),
    "backward, deterministic": (("backward_keys", 4), ("backward_queries", 3)),
}
"""What is predicted -> the kernels that it takes, each with its products of a tile."""

COUNTED = {"forward": 2, "forward, warp-specialised": 2, "backward": 5, "backward, deterministic": 5}
"""Products that a user counts: recomputed ones are not work done."""


@dataclass(frozen=True)
class Loop:
    """The hot loop of one kernel: clocks of a tile by the model, and what they come from."""

    kernel: str
    tile: str
    warps: int
    instructions: int
    tensor: float
    issue: float
    exponentials: float
    consumers: int = 1

    @property
    def clocks(self) -> float:
        """Clocks of one tile."""
        beside = max(self.issue, self.exponentials)
        hidden = HIDDEN * min(self.tensor, beside) if self.consumers > 1 else 0.0
        return OVERHEAD * (self.tensor + beside - hidden)


@dataclass(frozen=True)
class Prediction:
    """A row of the CSV. `source` says that it was not measured."""

    direction: str
    head_dim: int
    dtype: str
    architecture: str
    kernels: str
    instructions: str
    tensor_clocks: str
    issue_clocks: str
    exponential_clocks: str
    tflops: float
    source: str
    triton: str


def hot_loop(line: TableLine, products: int, flags: dict[str, Any] | None = None) -> Loop:
    """The dense loop of a kernel: of its innermost loops that hold matrix products, the one with the fewest instructions."""
    tile = line.configuration
    loops = [len(loop) for loop in product_loops(disassemble(compiled(line, flags).asm["cubin"]))]
    count, scores = min(loops), tile.owned * tile.streamed
    consumers = len(loops) if line.kernel == "dense" else 1
    return Loop(
        line.kernel, f"{tile.owned}x{tile.streamed}x{tile.warps}x{tile.stages}", tile.warps, count,
        products * 2 * scores * line.head_dim / TENSOR, count * consumers * tile.warps / SCHEDULERS, scores / EXPONENTIALS, consumers,
    )  # fmt: skip


def predict(direction: str, head_dim: int, architecture: str = "sm_90") -> Prediction:
    """The model's figure for one direction, bfloat16."""
    found = []
    for kernel, products in ROWS[direction]:
        tile = DENSE[architecture, head_dim] if kernel == "dense" else TABLE[kernel, architecture, head_dim, 2]
        flags = {"REDUCE": products == 5} if kernel == "backward_keys" else None
        found.append((hot_loop(TableLine(kernel, architecture, head_dim, 2, tile), products, flags), tile))
    # Clocks of one score; kernels follow each other.
    clocks = sum(loop.clocks / (tile.owned * tile.streamed) for loop, tile in found)
    tflops = COUNTED[direction] * 2 * head_dim / clocks * MULTIPROCESSORS * CLOCK / 1e12
    each = [loop for loop, _ in found]
    return Prediction(
        direction, head_dim, "bfloat16", architecture, "; ".join(f"{loop.kernel} {loop.tile}" for loop in each),
        "; ".join(str(loop.instructions) for loop in each), "; ".join(f"{loop.tensor:.0f}" for loop in each),
        "; ".join(f"{loop.issue:.0f}" for loop in each), "; ".join(f"{loop.exponentials:.0f}" for loop in each), round(tflops),
        "model, nothing was timed" + (f", {HIDDEN:.2f} of the shorter term assumed hidden" if each[0].consumers > 1 else ""), triton.__version__,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Print the predictions; with --write, write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args(argv)
    rows = [predict(direction, dim) for direction in ROWS for dim in (64, 128)]
    for row in rows:
        print(
            f"{row.direction:26} D{row.head_dim:<4} {row.tflops:5.0f} TFLOP/s  {row.kernels}, {row.instructions} instructions"
        )
    if options.write:
        with RESULTS.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Prediction)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
