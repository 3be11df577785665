"""What is measured on a GPU: experiments by name, with what must be reached."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from longattn.patterncache import Dilated, Full, Pattern, Window

SEGMENTS, RATES = (2048, 4096, 8192), (1, 2, 4)


@dataclass(frozen=True)
class Experiment:
    """One line of the table.

    Attributes:
        key, pattern, lengths, batch, heads, head_dim: what is computed; key and direction name it.
        direction: forward, backward or both.
        peer: one of `peers/on_gpu.py`, or "" (none). deterministic: the second way of the backward.
        target: unit and least (for us: most) value that must be reached, or None. "copy" and "product" are shares of what this device's own copies
            and matrix products reached in the same run, "ratio" is over the peer.
        graph: whether calls are replayed from a CUDA graph. grows: each call has a key more than the one before, as in a cache that grows.
        tile: (rows owned, rows streamed, warps, stages[, chunk]) in place of the table's, or (): the table's.
        dense: True: dense tiles go to the warp-specialised kernel; False: never; None: as the row decides.
        second_ptxas: compiled by the other assembler that is here.
        fails: raise before anything is measured; only `--dry` has such a row, and shows that one failing row costs itself alone.
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
    graph: bool = False
    grows: bool = False
    tile: tuple[int, ...] = ()
    dense: bool | None = None
    second_ptxas: bool = False
    fails: bool = False

    @property
    def name(self) -> str:
        """What tells it from every other."""
        tile = "x".join(map(str, self.tile))
        return " ".join(part for part in (self.key, f"D{self.head_dim}", self.direction, tile) if part)


DENSE_SWEEP: dict[int, tuple[tuple[int, ...], ...]] = {
    64: ((128, 128, 4, 2), (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 4, 4)),
    128: ((128, 64, 4, 3), (128, 32, 4, 2), (128, 32, 4, 3), (128, 32, 4, 4)),
}
"""head_dim -> tiles of the warp-specialised kernel to try beside the table's. (128, 128) at head_dim 128 fits where out is in 16 bits."""

SWEEP: dict[tuple[str, int], tuple[tuple[int, ...], ...]] = {
    ("forward", 64): ((128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 4), (128, 64, 8, 3)),
    ("forward", 128): ((128, 128, 8, 2), (128, 64, 4, 2), (64, 64, 4, 3), (128, 32, 4, 4)),
    ("backward", 64): ((64, 64, 4, 2), (128, 64, 8, 1), (64, 32, 4, 2), (128, 32, 8, 3)),
    ("backward", 128): ((128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)),
}
"""Direction, head_dim -> tiles to try beside the table's, at 8192 tokens. Backward: of the kernel that owns keys."""

FIXED_SWEEP: dict[int, tuple[tuple[int, ...], ...]] = {
    64: ((128, 64, 8, 1), (64, 64, 4, 2), (64, 128, 4, 2), (128, 32, 8, 3)),
    128: ((128, 64, 8, 1), (64, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 2)),
}
"""head_dim -> tiles to try of the kernel that owns queries in the deterministic backward."""

DECODE_SWEEP: tuple[tuple[int, ...], ...] = ((64, 64, 4, 2), (64, 64, 4, 4), (64, 128, 4, 2), (64, 32, 4, 4))
"""Tiles to try of the forward kernel with one query a head."""

CARD = 700.0
"""TFLOP/s of a large bfloat16 product on the card that the targets below were written for (an H100): over it, they are shares of any card's."""


def experiments(dry: bool) -> Iterator[Experiment]:
    """What is measured, in order of what a stopped run should have; `dry` keeps the kinds and shrinks the sizes."""
    if dry:
        yield from _small()
        return
    dims = {128: (520.0, 480.0, 400.0, 290.0), 64: (420.0, 0.0, 320.0, 230.0)}
    for dim, (full, causal, fast, fixed) in dims.items():
        flash = Experiment("flash-8192", Full(), (8192, 8192), 2, 2048 // dim, dim)
        for n in (8192, 16384):
            sized = replace(flash, key=f"flash-{n}", lengths=(n, n), batch=16384 // n)
            yield replace(sized, peer="dense", target=_share(full))
            if n == 8192:
                yield replace(sized, key="flash-one-kernel-8192", dense=False)
                yield replace(sized, key="flash-causal-one-kernel-8192", pattern=Full(causal=True), dense=False)
            yield replace(sized, direction="backward", peer="dense", target=_share(fast))
            target = _share(causal) if causal and n == 8192 else None
            yield replace(sized, key=f"flash-causal-{n}", pattern=Full(causal=True), peer="dense", target=target)
            key = f"flash-fixed-{n}"
            yield replace(sized, key=key, direction="backward", deterministic=True, target=_share(fixed))
        longnet = Experiment("longnet", Dilated(SEGMENTS, RATES), (131072, 131072), 1, 8, dim)
        # 2.0 and 3.2 ms on that card.
        yield replace(longnet, key="longnet-131072", target=_share(481.0 if dim == 64 else 601.0))
        yield replace(longnet, key="longnet-one-kernel-131072", dense=False)
        styled = replace(longnet, key="longnet-131072-style", peer="torchscale-style")
        yield replace(styled, target=("ratio", 1.9))
        yield replace(styled, direction="both", target=("ratio", 2.0))
        yield replace(longnet, key="longnet-causal-131072", pattern=longnet.pattern.with_causal(True))
        # FlexAttention's block mask is made densely: at 32768 a head's still fits.
        yield replace(
            longnet, key="longnet-32768-flex", lengths=(32768, 32768), peer="flex-permuted", target=("ratio", 1.3)
        )
    # 512 MiB of keys and values, bfloat16.
    decode = Experiment("decode-512MiB", Window(1 << 30), (1, 131072), 8, 16, 64, target=("copy", 0.85))
    yield decode
    yield replace(decode, key="decode-512MiB-graph", graph=True)
    yield Experiment("overhead", Full(), (16, 16), 1, 1, 64, target=("us", 40.0))
    yield Experiment("overhead", Full(), (16, 16), 1, 1, 64, "both", target=("us", 90.0))
    for key, pattern in (
        ("full", Full()), ("window-and-sinks", Window(512, sinks=4)), ("longnet", Dilated(SEGMENTS, RATES, causal=True))
    ):  # fmt: skip
        yield Experiment(f"growing-{key}", pattern, (1, 8192), 1, 8, 64, target=("us", 60.0), grows=True)
    for (direction, dim), tiles in SWEEP.items():
        for tile in tiles:
            yield Experiment("sweep-8192", Full(), (8192, 8192), 2, 2048 // dim, dim, direction, tile=tile)
    for dim, tiles in DENSE_SWEEP.items():
        for tile in tiles:
            yield Experiment("sweep-dense-8192", Full(), (8192, 8192), 2, 2048 // dim, dim, tile=tile, dense=True)
    for dim, tiles in FIXED_SWEEP.items():
        for tile in tiles:
            swept = Experiment("sweep-fixed-8192", Full(), (8192, 8192), 2, 2048 // dim, dim, "backward", tile=tile)
            yield replace(swept, deterministic=True)
    for tile in DECODE_SWEEP:
        yield replace(decode, key="sweep-decode-512MiB", tile=tile, graph=True, target=None)
    for dim in (64, 128):
        flash = Experiment("flash-8192", Full(), (8192, 8192), 2, 2048 // dim, dim)
        for direction in ("forward", "backward"):
            yield replace(flash, key="flash-second-ptxas-8192", direction=direction, second_ptxas=True)
        for peer in ("cudnn", "fa3", "fa4", "flex", "flex-max-autotune"):
            for direction in ("forward", "backward"):
                yield replace(flash, key=f"flash-{peer}-8192", peer=peer, direction=direction)


def _share(tflops: float) -> tuple[str, float]:
    return "product", round(tflops / CARD, 2)


def _small() -> Iterator[Experiment]:
    """Every kind, at sizes that triton's interpreter does in seconds."""
    pattern = Dilated((64, 128), (1, 2))
    yield Experiment("flash", Full(), (70, 70), 1, 2, 16)
    yield Experiment("flash-causal", Full(causal=True), (70, 70), 1, 1, 16, "backward", "dense")
    yield Experiment("flash-cudnn", Full(), (70, 70), 1, 1, 16, peer="cudnn")
    yield Experiment("broken", Full(), (70, 70), 1, 1, 16, fails=True)
    yield Experiment("flash-fa3", Full(), (70, 70), 1, 1, 16, peer="fa3")
    yield Experiment("longnet", pattern, (128, 128), 1, 1, 16, "both", "torchscale-style", deterministic=True)
    yield Experiment("decode", Window(1 << 20), (1, 300), 1, 2, 16, target=("copy", 0.85))
    yield Experiment("growing", Full(), (1, 130), 1, 1, 16, target=("us", 60.0), grows=True)
    yield Experiment("sweep", Full(), (70, 70), 1, 1, 16, tile=(64, 32, 4, 1))
    yield Experiment("flash-dense", Full(), (128, 128), 1, 1, 16, dense=True)
    yield Experiment("flash-second-ptxas", Full(), (70, 70), 1, 1, 16, target=("product", 0.74), second_ptxas=True)
