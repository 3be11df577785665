"""`longattn bench`: one call beside peers in this process, in interleaved rounds; medians and ratios, also as CSV and PNG."""

from __future__ import annotations

import csv
import logging
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longattn.attention.cli.patterns import pattern_of
from longattn.attention.cli.report import Report, Table
from longattn.attention.functional import pattern_attention
from longattn.bufmgr import read_device_memory
from longattn.patterncache import Pattern
from longattn.patterncache.spans import shortened

logger = logging.getLogger("longattn.attention")

MOST_MASKED = 16384
"""Tokens up to which a dense boolean mask is made for `sdpa-mask`."""

COLUMNS = ("side", "ms", "over_longattn", "cpu_ms", "same_attention")
Side = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(options: Namespace) -> Report:
    """Time every side; the first is ours."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    pattern = pattern_of(options)
    kv_heads = options.kv_heads or options.heads
    if options.heads % kv_heads:
        raise ValueError(f"--kv-heads must divide --heads={options.heads}, got {kv_heads}")
    check_memory(options, kv_heads)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(options.batch, options.length, heads, options.head_dim, generator=generator).to(
            getattr(torch, options.dtype)
        )
        for heads in (options.heads, kv_heads, kv_heads)
    )
    names = [name.strip() for name in options.peers.split(",") if name.strip()]
    sides = {name: side_of(name, pattern, options) for name in ("longattn", *names)}
    if options.backward:
        q, k, v = (x.requires_grad_() for x in (q, k, v))
    samples = measure(sides, (q, k, v), options.rounds, options.backward)
    medians = medians_of(samples)
    ours = medians["longattn"][0]
    rows = [
        (
            name,
            f"{wall * 1e3:.3f}",
            f"{wall / ours:.3f}",
            f"{cpu * 1e3:.3f}",
            "yes" if name != "sdpa" or _is_dense(pattern) else "no: dense",
        )
        for name, (wall, cpu) in medians.items()
    ]
    if options.csv is not None:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
    if options.png is not None:
        _draw(rows, options)
    what = "forward and backward" if options.backward else "forward"
    shape = f"{options.batch} x {options.length} x {options.heads} x {options.head_dim} {options.dtype}"
    title = f"{what} of {shape} on {torch.get_num_threads()} threads, medians of {options.rounds} rounds"
    data = {
        "pattern": pattern.canonical(),
        "shape": [options.batch, options.length, options.heads, options.head_dim],
        "dtype": options.dtype,
        "backward": options.backward,
        "threads": torch.get_num_threads(),
        "rows": [dict(zip(COLUMNS, row, strict=True)) for row in rows],
    }
    return Report(data, [pattern.canonical(), Table(title, COLUMNS, rows)])


def check_memory(options: Namespace, kv_heads: int) -> None:
    """Refuse a length whose tensors alone do not fit, before the system ends the process for it.

    Raises:
        ValueError: q, k, v and one result, and their gradients where they are wanted, are more than is available.
    """
    reading = read_device_memory(torch.device("cpu"))
    size = getattr(torch, options.dtype).itemsize * (2 if options.backward else 1)
    a_token = options.batch * options.head_dim * size * 2 * (options.heads + kv_heads)
    if reading is not None and options.length * a_token > reading.available:
        raise ValueError(
            f"--length must be at most {reading.available // a_token} here, where q, k, v and their result fill the "
            f"{reading.available / 2**30:.1f} GiB of memory that are available, got {options.length}"
        )


def measure(
    sides: dict[str, Side], tensors: tuple[Tensor, Tensor, Tensor], rounds: int, backward: bool
) -> dict[str, list[tuple[float, float]]]:
    """(seconds, CPU seconds) of each side in each round; a first round warms up and does not count."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        _say(f"timing {', '.join(sides)}: " + (f"round {turn} of {rounds}" if turn else "warming up"))
        for name, side in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            out = side(*tensors)
            if backward:
                torch.autograd.grad(out, tensors, torch.ones_like(out))
            if turn:
                samples[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    _say("")
    return samples


def _say(what: str) -> None:
    """One line on a terminal, which the next replaces and empty text clears; elsewhere a record."""
    if sys.stderr.isatty():
        print(f"\r{what:79}\r", end="", file=sys.stderr, flush=True)
    elif what:
        logger.info("%s", what)


def medians_of(samples: dict[str, list[tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """(seconds, CPU seconds) of each side, medians over its rounds."""
    return {
        name: (statistics.median(wall for wall, _ in pairs), statistics.median(cpu for _, cpu in pairs))
        for name, pairs in samples.items()
    }


def side_of(name: str, pattern: Pattern, options: Namespace) -> Side:
    """What is timed under a name: a function of q, k and v, (batch, seq, heads, head_dim).

    Raises:
        ValueError: there is no peer of that name, or it does not take the length.
    """
    grouped = (options.kv_heads or options.heads) != options.heads
    if name == "longattn":
        return lambda q, k, v: pattern_attention(q, k, v, pattern)
    if name == "sdpa":
        causal = pattern.causal
        return lambda q, k, v: _heads_first(
            lambda *x: scaled_dot_product_attention(*x, is_causal=causal, enable_gqa=grouped), q, k, v
        )
    if name == "sdpa-mask":
        if options.length > MOST_MASKED:
            raise ValueError(f"--length must be at most {MOST_MASKED} with --peers sdpa-mask, got {options.length}")
        counts = torch.as_tensor(pattern.to_dense(options.length, options.heads))
        bias = counts.to(getattr(torch, options.dtype)).log()[None]
        return lambda q, k, v: _heads_first(
            lambda *x: scaled_dot_product_attention(*x, attn_mask=bias, enable_gqa=grouped), q, k, v
        )
    if name == "flex":
        flex: Any = import_module("torch.nn.attention.flex_attention").flex_attention
        compiled: Callable[..., Any] = torch.compile(flex)  # pyright: ignore[reportUnknownMemberType]
        mask = pattern.to_block_mask(options.length, options.heads)
        return lambda q, k, v: _heads_first(
            lambda *x: compiled(*x, block_mask=mask.block_mask, score_mod=mask.score_mod, enable_gqa=grouped), q, k, v
        )
    raise ValueError(f"--peers must be of sdpa, sdpa-mask and flex, comma between, got {shortened(name)}")


def _heads_first(call: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Call with (batch, heads, seq, head_dim) views, as peers take them."""
    return call(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _is_dense(pattern: Pattern) -> bool:
    return pattern.canonical().startswith('["full"')


def _draw(rows: list[tuple[str, ...]], options: Namespace) -> None:
    figure = import_module("matplotlib.figure").Figure(figsize=(7.0, 1.2 + 0.5 * len(rows)), layout="constrained")
    agg = import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    axes = figure.subplots()
    bars = axes.barh([row[0] for row in rows], [float(row[1]) for row in rows])
    axes.bar_label(bars, [f"{row[1]} ms" for row in rows], padding=3)
    axes.invert_yaxis()
    axes.set(
        xlabel="ms, median",
        title=f"{options.length} tokens, {options.heads} heads of {options.head_dim}, {options.dtype}",
    )
    axes.margins(x=0.2)
    agg.print_png(options.png)
