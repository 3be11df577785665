"""`longattn demo`: one pattern, what it reaches, its time beside dense attention and its error beside float64."""

from __future__ import annotations

from argparse import Namespace

import torch

from longattn.attention.cli import bench
from longattn.attention.cli.patterns import pattern_of
from longattn.attention.cli.report import Report, Table
from longattn.kernels import explain

HEAD_DIM, ROUNDS = 64, 3
LARGEST_ERROR = 1e-3
"""Of float32 results beside float64, relative to unit normal values: far above rounding, far below a wrong pair."""


def run(options: Namespace) -> Report:
    """Status 1 where the sampled rows are not those of float64."""
    pattern = pattern_of(options)
    peer = Namespace(**vars(options), batch=1, head_dim=HEAD_DIM, kv_heads=None, dtype="float32", backward=False)
    bench.check_memory(peer, options.heads)
    verdict = pattern.lint(options.length, options.heads, head_dim=HEAD_DIM)
    sides = {"longattn": bench.side_of("longattn", pattern, peer), "sdpa": bench.side_of("sdpa", pattern, peer)}
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, options.length, options.heads, HEAD_DIM, generator=generator) for _ in range(3))
    medians = bench.medians_of(bench.measure(sides, (q, k, v), ROUNDS, backward=False))
    found = explain(pattern, tuple(q.shape), verify=(q, k, v))  # type: ignore[arg-type]
    errors = dict(found.errors or ())
    worst = max(errors.values())
    ours, dense = medians["longattn"][0], medians["sdpa"][0]
    dense_pairs = options.heads * options.length * (options.length + 1 if pattern.causal else 2 * options.length) / 2
    rows = [
        ("tokens", f"{options.length}"),
        ("backend", str(found.backend)),
        ("pairs seen, of dense attention's", f"{verdict.pairs / dense_pairs:.4f}"),
        (
            "layers until every token has heard of all that it may",
            "never" if verdict.layers is None else str(verdict.layers),
        ),
        ("forward, ms", f"{ours * 1e3:.1f}"),
        ("dense SDPA, ms", f"{dense * 1e3:.1f}"),
        ("dense SDPA over longattn", f"{dense / ours:.2f}"),
        ("largest error of sampled rows beside float64", f"{worst:.2g}"),
    ]
    data = {
        "pattern": pattern.canonical(),
        "backend": found.backend,
        "pairs_of_dense": verdict.pairs / dense_pairs,
        "layers": verdict.layers,
        "seconds": ours,
        "dense_seconds": dense,
        "errors": errors,
    }
    return Report(data, [pattern.canonical(), Table("", ("what", "here"), rows)], status=int(not worst < LARGEST_ERROR))
