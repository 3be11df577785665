"""`python -m examples.quality.fidelity`: gradients through the weights that merge a dilated pattern's branches, and in which precision they merge.

Two files: errors of one call's gradients beside float64 (`--out`), and the loss of training on real text with each (`--out` with "-curves").
Ways: "exact" is ours in float32; "detached" leaves the merge weights out of the gradient as torchscale does; "bfloat16" is ours on bfloat16 tensors, whose
branches meet in float32; "bfloat16 merges" rounds each branch's output and lse to bfloat16 and weighs them there.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from examples.quality.rows import Rows
from examples.quality.text import HEADS, LAYERS, documents, train
from longattn.attention import pattern_attention
from longattn.patterncache import Dilated

WAYS = ("exact", "detached", "bfloat16", "bfloat16 merges")


@dataclass(frozen=True)
class Merged:
    """Dilated attention whose branches meet in one of `WAYS`."""

    pattern: Dilated
    way: str

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(batch, length, heads, head_dim) each, and the result, in q's dtype."""
        if self.way in ("exact", "detached"):
            return pattern_attention(q, k, v, self.pattern, merge_grad=self.way)
        half = [x.bfloat16() for x in (q, k, v)]
        if self.way == "bfloat16":
            return pattern_attention(*half, self.pattern).to(q.dtype)
        branches = [pattern_attention(*half, branch, return_lse=True) for branch in self.pattern.addends]
        outs, lses = (torch.stack(parts).bfloat16() for parts in zip(*branches, strict=True))
        return (lses.softmax(0)[..., None] * outs).sum(0).to(q.dtype)


def gradients(pattern: Dilated, way: str, length: int, dtype: torch.dtype, seed: int, scale: float) -> list[Tensor]:
    """Of q, k and v under a drawn direction, as float64. Scores have a standard deviation of `scale` squared."""
    random = torch.Generator().manual_seed(seed)
    shape = (2, length, HEADS, 16)
    q, k, v, direction = (torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(4))
    # Rounded first, so that every way has the same inputs.
    leaves = [x.bfloat16().to(dtype).requires_grad_() for x in (q * scale, k * scale, v)]
    out = Merged(pattern, way).attend(*leaves)
    return [x.double() for x in torch.autograd.grad((out * direction.to(dtype)).sum(), leaves)]


def errors(pattern: Dilated, way: str, length: int, seed: int, scale: float) -> list[dict[str, object]]:
    """A row for each of q, k and v: the distance to float64's gradient over its length, and the cosine between them."""
    exact = gradients(pattern, "exact", length, torch.float64, seed, scale)
    rows = []
    for name, ours, true in zip("qkv", gradients(pattern, way, length, torch.float32, seed, scale), exact, strict=True):
        cosine = (torch.sum(ours * true) / (ours.norm() * true.norm())).item()
        error = ((ours - true).norm() / true.norm()).item()
        row = {"way": way, "length": length, "scale": scale, "seed": seed, "gradient": name}
        rows.append(row | {"error": f"{error:.2e}", "cosine": f"{cosine:.6f}"})
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Read the options, write both files."""
    parser = argparse.ArgumentParser(prog="python -m examples.quality.fidelity", description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder of text files (default: the standard library's sources)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    for name, default in (("length", 256), ("batch", 8), ("steps", 500)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--out", type=Path, default=Path("fidelity.csv"), help="default: fidelity.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    # The shape of the presets' default with its longest segment as long as the text: three branches, of which each token has up to three.
    pattern = Dilated((options.length // 4, options.length // 2, options.length), (1, 2, 4), causal=True)
    calls, curves = Rows(options.out), Rows(options.out.with_name(f"{options.out.stem}-curves.csv"))
    for seed in options.seeds:
        for scale in (1.0, 2.0):
            run = {"seed": seed, "scale": scale, "length": options.length}
            if not calls.finished(run):
                calls.append(*(row for way in WAYS for row in errors(pattern, way, options.length, seed, scale)))
    read, _ = documents(options.data, options.length)
    for seed in options.seeds:
        for way in options.ways:
            run = {"way": way, "seed": seed, "length": options.length, "batch": options.batch}
            if curves.finished(run):
                continue
            begin = time.process_time()
            patterns = [Merged(pattern, way)] * LAYERS
            _, losses = train(patterns, read, seed, options.length, options.batch, options.steps)
            parts = [losses[at : at + 50] for at in range(0, options.steps, 50)]
            means = [(50 * at + len(part), sum(part) / len(part)) for at, part in enumerate(parts)]
            run |= {"seconds": round(time.process_time() - begin, 1)}
            curves.append(*(run | {"step": step, "loss": round(loss, 4)} for step, loss in means))
            print(f"{way} | seed {seed}: {means[-1][1]:.4f} nats a byte over the last steps", flush=True)


if __name__ == "__main__":
    main()
