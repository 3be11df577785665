"""The native CPU row beside torch's kernels and the peers: promised figures are issue 6's, for two threads of the machine they name.

B=1, H=8, D=64, segments 2048/4096/8192 with rates 1/2/4, normal inputs; the row is asked for by name. Under LONGATTN_NATIVE=avx2
(or another level) rows say so, for laptops without AVX-512: `LONGATTN_NATIVE=avx2 python -m benchmarks.run native`.

    longnet  every head in every branch, beside the torchscale-style pipeline, dense SDPA and FlexAttention on permuted tokens
    split    heads divided over branches, beside the fkodom-style pipeline
    dense    no pattern at all, beside SDPA, OpenVINO and onnxruntime where they are installed and, as "fma-peak", a loop of as many
             multiply-adds: its ratio is the share of the peak
    table    issue 19's figures for AMD that no group above has: longer sequences, wider heads, backward and LongNet beside dense SDPA
    short    the last few rows of a long sequence, causal, beside SDPA, which is to be no faster in float32
"""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.calls import Calls
from benchmarks.cases.attention import RATES, SEGMENTS, branch_names
from benchmarks.comparison import Comparison, Contender, Inputs
from benchmarks.contenders import (
    dense,
    engines,
    fkodom_style,
    flex_permuted,
    fma_peak,
    forced_level,
    in_float32,
    ours,
    torchscale_style,
)
from benchmarks.experiment import DIRECTIONS, Direction, Labels, Targets
from longattn.kernels import attend
from longattn.patterncache import Dilated, Full

_TINY_SEGMENTS = (64, 128, 256)
_DTYPES = ("float32", "bfloat16")
_GROWTH = {"forward": 0.4, "forward+backward": 1.6}

# (dtype, length, causal, direction) -> the peer's CPU time over ours, at least.
_TORCHSCALE: dict[tuple[str, int, bool, str], float] = {
    ("float32", 32768, False, "forward"): 1.6,
    ("bfloat16", 32768, False, "forward"): 2.7,
    ("float32", 8192, True, "forward"): 1.75,
    ("bfloat16", 8192, True, "forward"): 2.8,
    ("float32", 8192, False, "forward+backward"): 1.35,
    ("bfloat16", 8192, False, "forward+backward"): 1.8,
    ("float32", 32768, False, "forward+backward"): 1.35,
    ("bfloat16", 32768, False, "forward+backward"): 1.8,
}
_SPLIT = {"float32": 1.3, "bfloat16": 2.1}
_DENSE = {"float32": 1.15, "bfloat16": 2.0}
_PEAK = {"float32": 0.76, "bfloat16": 0.66}


def _row(
    name: str,
    variant: str,
    peer: tuple[str, Contender],
    mine: Contender,
    inputs: Inputs,
    causal: bool,
    direction: Direction,
    ratio: float | None,
    borders: tuple[int, ...] = (),
) -> Comparison:
    heads, head_dim = inputs.per_token
    labels = Labels(
        "native",
        f"{variant} h{heads} d{head_dim}{forced_level()}",
        peer[0],
        inputs.dtype,
        inputs.seq_len,
        causal,
        direction,
    )
    growth = _GROWTH[direction] if inputs.seq_len >= 8192 else None
    return Comparison(labels, inputs, mine, peer[1], Targets(ratio=ratio, growth=growth), name=name, borders=borders)


def longnet(quick: bool) -> Iterator[Comparison]:
    """The headline: LongNet's dilated attention."""
    segments = _TINY_SEGMENTS if quick else SEGMENTS
    for seq_len, dtype, causal, direction in itertools.product((8192, 32768), _DTYPES, (False, True), DIRECTIONS):
        if quick and seq_len > 8192:
            return
        inputs = Inputs(256, dtype, (4, 16)) if quick else Inputs(seq_len, dtype)
        mine = ours(Dilated(segments, RATES, causal=causal), backend="native")
        peers = {"torchscale-style": torchscale_style(segments, RATES, causal)}
        if direction == "forward" and dtype == "float32" and not causal:
            peers["dense"] = dense(causal)
        if direction == "forward" and dtype == "float32" and seq_len == 8192 and not quick:
            peers["flex-permuted"] = flex_permuted(segments, RATES, causal)
        for peer in peers.items():
            ratio = _TORCHSCALE.get((dtype, seq_len, causal, direction))
            if peer[0] != "torchscale-style":
                ratio = 13.0 if (peer[0], seq_len) == ("dense", 32768) else None
            variant = f"dilated {branch_names(segments, RATES)}"
            yield _row("longnet", variant, peer, mine, inputs, causal, direction, None if quick else ratio, segments)


def split(quick: bool) -> Iterator[Comparison]:
    """Heads divided over branches."""
    segments = _TINY_SEGMENTS if quick else SEGMENTS
    for seq_len, dtype in itertools.product((8192, 32768), _DTYPES):
        if quick and seq_len > 8192:
            return
        inputs = Inputs(256, dtype, (4, 16)) if quick else Inputs(seq_len, dtype)
        mine = ours(Dilated(segments, RATES, heads="split"), backend="native")
        peer = ("fkodom-style", fkodom_style(segments, RATES, causal=False))
        ratio = None if quick else _SPLIT[dtype]
        variant = f"dilated {branch_names(segments, RATES)} split"
        yield _row("split", variant, peer, mine, inputs, False, "forward", ratio, segments)


def plain(quick: bool) -> Iterator[Comparison]:
    """Dense attention: the kernel itself."""
    for dtype, causal, direction in itertools.product(_DTYPES, (False, True), DIRECTIONS):
        inputs = Inputs(256, dtype, (4, 16)) if quick else Inputs(2048, dtype)
        mine = ours(Full(causal=causal), backend="native")
        promised = not quick and direction == "forward" and not causal
        ratio = _DENSE[dtype] if promised else None
        yield _row("dense", "full", ("dense", dense(causal)), mine, inputs, causal, direction, ratio)
        if direction == "forward":
            ratio = _PEAK[dtype] if promised else None
            yield _row("dense", "full", ("fma-peak", fma_peak(causal)), mine, inputs, causal, direction, ratio)
            for peer in engines(dtype, causal).items():
                yield _row("dense", "full", peer, mine, inputs, causal, direction, None)


# (pattern, dtype, length, head_dim, causal, direction) -> dense SDPA's CPU time over ours, at least.
_TABLE: dict[tuple[str, str, int, int, bool, Direction], float] = {
    **{("full", "bfloat16", 4096, dim, causal, "forward"): 2.0 for dim in (64, 128) for causal in (False, True)},
    **{("full", "bfloat16", 4096, 64, causal, "forward+backward"): 1.5 for causal in (False, True)},
    ("full", "float16", 4096, 64, False, "forward"): 1.0,
    ("dilated", "bfloat16", 8192, 64, False, "forward"): 6.0,
    ("dilated", "bfloat16", 8192, 64, True, "forward"): 5.0,
    **{("dilated", "bfloat16", 8192, 64, causal, "forward+backward"): 3.5 for causal in (False, True)},
    ("dilated", "bfloat16", 32768, 64, False, "forward"): 20.0,
}


def table(quick: bool) -> Iterator[Comparison]:
    """One issue's table. Float16 is beside the row's own float32, of the same numbers."""
    for (name, dtype, seq_len, head_dim, causal, direction), ratio in _TABLE.items():
        segments = _TINY_SEGMENTS if quick else SEGMENTS
        pattern = Full(causal=causal) if name == "full" else Dilated(segments, RATES, causal=causal)
        variant = "full" if name == "full" else f"dilated {branch_names(segments, RATES)}"
        if quick:
            variant += f", small form of {seq_len} d{head_dim}"  # rows that differ by that alone stay apart
        inputs = Inputs(256, dtype, (4, 16)) if quick else Inputs(seq_len, dtype, (8, head_dim))
        mine = ours(pattern, backend="native")
        peer = ("float32", in_float32(mine)) if dtype == "float16" else ("dense", dense(causal))
        borders = () if name == "full" else segments
        yield _row(
            f"table-d{head_dim}" + f"-{seq_len}" * quick,
            variant,
            peer,
            mine,
            inputs,
            causal,
            direction,
            None if quick else ratio,
            borders,
        )


def short(quick: bool) -> Iterator[Calls]:
    """Few query rows over many keys."""
    length = 64 if quick else 32768
    for dtype, heads, rows in itertools.product(_DTYPES, (1, 8), (1, 4, 16)):
        inputs = Inputs(length, dtype, (heads, 64))
        yield Calls(
            name=f"short-{dtype}-h{heads}-{rows}",
            labels=Labels(
                "native", f"{rows} rows h{heads} d64{forced_level()}", "dense", dtype, length, True, "forward"
            ),
            targets=Targets(ratio=1.0 if dtype == "float32" and not quick else None),
            ours=lambda inputs=inputs, rows=rows: _streamed(inputs, rows),
            peer=lambda inputs=inputs, rows=rows: _masked(inputs, rows),
            gate=lambda inputs=inputs, rows=rows: _differing(inputs, rows),
        )


def _streamed(inputs: Inputs, rows: int) -> Callable[[], Tensor]:
    q, k, v, _ = inputs.tensors()
    last = q[:, -rows:].contiguous()
    return lambda: attend(last, k, v, Full(causal=True), backend="native", out_dtype=q.dtype).out


def _masked(inputs: Inputs, rows: int) -> Callable[[], Tensor]:
    q, k, v, _ = (x.transpose(1, 2) for x in inputs.tensors())
    seen = torch.ones(rows, inputs.seq_len, dtype=torch.bool).tril(inputs.seq_len - rows) if rows > 1 else None
    last = q[:, :, -rows:].contiguous()
    return lambda: torch.nn.functional.scaled_dot_product_attention(last, k, v, attn_mask=seen)


def _differing(inputs: Inputs, rows: int) -> list[str]:
    """The gate: both beside float64."""
    q, k, v, _ = (x.double().transpose(1, 2) for x in inputs.tensors())
    seen = torch.ones(rows, inputs.seq_len, dtype=torch.bool).tril(inputs.seq_len - rows)
    truth = torch.nn.functional.scaled_dot_product_attention(q[:, :, -rows:], k, v, attn_mask=seen)
    most = 2e-5 if inputs.dtype == "float32" else 2e-2
    got = {"ours": _streamed(inputs, rows)().transpose(1, 2), "peer": _masked(inputs, rows)()}
    errors = {name: float((x.double() - truth).abs().max()) for name, x in got.items()}
    return [f"{name}: off by {error:.1e}" for name, error in errors.items() if not error <= most]


def experiments(quick: bool) -> Iterator[Comparison | Calls]:
    """Every row of the case; `quick` gives tiny ones without targets."""
    for group in (longnet, split, plain, table, short):
        yield from group(quick)
