"""What else a pattern can be: long lists of branches, short texts, split heads, rings, blocks, and the tiled rows.

B=1, H=8, D=64, normal inputs; each group of rows is a function below, its name opens the keys.

    long      LongNet's longer list, segments 2048 to 32768 with rates 1 to 12. Causal only: the torchscale-style peer
              pads segments to a multiple of the rate and, without a causal mask, attends to the padding.
    short     2048 tokens: the usual list, whose segments are then all the whole text, and a list of short ones
    split     heads divided over branches, beside the fkodom-style pipeline
    ring      a ring of four played in one process, beside the same call without one
    blocks    50, 90 or 98 % of the blocks of 128 hidden at random, the diagonal kept, beside dense SDPA; at 90 % beside a gather by hand
              and one mask for each head ("blocks-per-head") as well
    tiled     the readable rows of torch operations, both orders, beside SDPA on the same dense problem
"""

import itertools
from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from benchmarks.cases.attention import RATES, SEGMENTS, branch_names
from benchmarks.comparison import Comparison, Contender, Inputs
from benchmarks.contenders import dense, fkodom_style, gathered_blocks, ours, torchscale_style
from benchmarks.experiment import DIRECTIONS, Direction, Labels, Targets
from longattn.attention import Local, Ring
from longattn.patterncache import BlockSparse, Dilated, Full

LONG_SEGMENTS = (2048, 4096, 8192, 16384, 32768)
LONG_RATES = (1, 2, 4, 6, 12)
SHORT_SEGMENTS = (256, 512, 1024)
RING_SIZE = 4
SPARSITY, HIDDEN = 0.9, (0.5, 0.9, 0.98)
_BLOCKS = {"float32": 10.0, "bfloat16": 18.0}
_TINY_SEGMENTS = (64, 128, 256)
_TINY_HEADS = (4, 16)
_LAYOUTS: tuple[Literal["contiguous", "zigzag", "striped"], ...] = ("contiguous", "zigzag", "striped")
_MASKS = (False, True)


def comparison(
    name: str,
    variant: str,
    peer: tuple[str, Contender],
    mine: Contender,
    inputs: Inputs,
    causal: bool,
    direction: Direction,
    *,
    borders: tuple[int, ...] = (),
    ratio: float | None = None,
) -> Comparison:
    """One row of this case. `name` and the peer's make its key; `ratio` is its target."""
    heads, head_dim = inputs.per_token
    variant = f"{variant} h{heads} d{head_dim}"
    labels = Labels("patterns", variant, peer[0], inputs.dtype, inputs.seq_len, causal, direction)
    return Comparison(labels, inputs, mine, peer[1], Targets(ratio=ratio), name=name, borders=borders)


def long(quick: bool) -> Iterator[Comparison]:
    """LongNet's longer list at 32768 tokens, beside the torchscale-style pipeline."""
    segments, rates = ((32, 64, 128, 256), (1, 2, 4, 6)) if quick else (LONG_SEGMENTS, LONG_RATES)
    for dtype, direction in itertools.product(("float32", "bfloat16"), DIRECTIONS):
        inputs = Inputs(256, dtype, _TINY_HEADS) if quick else Inputs(32768, dtype)
        yield comparison(
            "long",
            f"dilated {branch_names(segments, rates)}",
            ("torchscale-style", torchscale_style(segments, rates, causal=True)),
            ours(Dilated(segments, rates, heads="shared", causal=True)),
            inputs,
            True,
            direction,
            borders=segments,
        )


def short(quick: bool) -> Iterator[Comparison]:
    """A text of 2048 tokens, beside the torchscale-style pipeline and, forward only, dense attention."""
    inputs = Inputs(128, "float32", _TINY_HEADS) if quick else Inputs(2048, "float32")
    lists = {"short": (128, 256, 512), "short-segments": (32, 64, 128)}
    if not quick:
        lists = {"short": SEGMENTS, "short-segments": SHORT_SEGMENTS}
    for (name, segments), causal in itertools.product(lists.items(), _MASKS):
        mine = ours(Dilated(segments, RATES, heads="shared", causal=causal))
        peers = {"torchscale-style": torchscale_style(segments, RATES, causal), "dense": dense(causal)}
        for peer, direction in itertools.product(peers.items(), DIRECTIONS):
            if peer[0] == "dense" and direction == "forward+backward":
                continue  # a different problem: one row says how far apart they are
            variant = f"dilated {branch_names(segments, RATES)}"
            yield comparison(name, variant, peer, mine, inputs, causal, direction, borders=segments)


def split(quick: bool) -> Iterator[Comparison]:
    """Heads divided over branches, beside the fkodom-style pipeline."""
    segments = _TINY_SEGMENTS if quick else SEGMENTS
    variant = f"dilated {branch_names(segments, RATES)} split"
    for seq_len, dtype, causal in itertools.product((8192, 32768), ("float32", "bfloat16"), _MASKS):
        if quick and seq_len > 8192:
            return
        inputs = Inputs(256, dtype, _TINY_HEADS) if quick else Inputs(seq_len, dtype)
        mine = ours(Dilated(segments, RATES, heads="split", causal=causal))
        peer = ("fkodom-style", fkodom_style(segments, RATES, causal))
        for direction in DIRECTIONS:
            yield comparison("split", variant, peer, mine, inputs, causal, direction, borders=segments)


def ring(quick: bool) -> Iterator[Comparison]:
    """A ring of four in this process, in each layout, beside Local: what cutting and merging cost."""
    segments = _TINY_SEGMENTS if quick else SEGMENTS
    inputs = Inputs(256, "float32", _TINY_HEADS) if quick else Inputs(8192, "float32")
    borders = (*segments, *(inputs.seq_len * i // RING_SIZE for i in range(1, RING_SIZE)))
    for causal, layout in itertools.product(_MASKS, _LAYOUTS):
        pattern = Dilated(segments, RATES, heads="shared", causal=causal)
        mine = ours(pattern, schedule=Ring(size=RING_SIZE, layout=layout))
        peer = ("local", ours(pattern, schedule=Local()))
        variant = f"dilated {branch_names(segments, RATES)} ring{RING_SIZE} {layout}"
        for direction in DIRECTIONS:
            yield comparison(f"ring-{layout}", variant, peer, mine, inputs, causal, direction, borders=borders)


def blocks(quick: bool) -> Iterator[Comparison]:
    """Random blocks beside dense SDPA: issue 19 promises 18x in bfloat16 and 10x in float32 at 90 %, forward, on AMD."""
    size, seq_len, per_token = (32, 256, _TINY_HEADS) if quick else (128, 8192, (8, 64))
    count = seq_len // size
    masks = {f"blocks-{hidden:.0%}": (hidden, random_blocks(count, hidden=hidden)) for hidden in HIDDEN}
    per_head = np.stack([random_blocks(count, seed) for seed in range(per_token[0])])
    masks["blocks-per-head"] = (SPARSITY, per_head)
    for (name, (hidden, mask)), dtype in itertools.product(masks.items(), ("float32", "bfloat16")):
        pattern = BlockSparse(size, mask)
        peers = {"dense": dense(causal=False)}
        if hidden == SPARSITY:
            peers["gathered-blocks"] = gathered_blocks(pattern)
        variant = f"blocksparse {size} {hidden:.0%} hidden{', per head' if mask.ndim == 3 else ''}"
        for peer, direction in itertools.product(peers.items(), DIRECTIONS):
            promised = not quick and (peer[0], hidden, direction) == ("dense", SPARSITY, "forward") and mask.ndim == 2
            yield comparison(
                name,
                variant,
                peer,
                ours(pattern),
                Inputs(seq_len, dtype, per_token),
                False,
                direction,
                borders=tuple(range(size, seq_len, seq_len // 8)),
                ratio=_BLOCKS[dtype] if promised else None,
            )


def random_blocks(count: int, seed: int = 0, hidden: float = SPARSITY) -> npt.NDArray[np.bool_]:
    """(count, count), True on the diagonal and at random elsewhere; never less than the share that is not `hidden` is True."""
    seen = np.eye(count, dtype=bool).reshape(-1)
    rest = np.flatnonzero(~seen)
    count_seen = max(int(np.ceil((1 - hidden) * count * count - 1e-9)) - count, 0)
    seen[np.random.default_rng(seed).permutation(rest)[:count_seen]] = True
    return seen.reshape(count, count)


def tiled(quick: bool) -> Iterator[Comparison]:
    """The two tiled rows on dense attention, beside SDPA."""
    rows = {"tiled": "tiled", "tiled-k-major": "tiled_k_major"}
    for seq_len, (name, backend), causal in itertools.product((2048, 4096), rows.items(), _MASKS):
        if quick and seq_len > 2048:
            return
        inputs = Inputs(300, "float32", _TINY_HEADS) if quick else Inputs(seq_len, "float32")
        mine = ours(Full(causal=causal), backend=backend)
        for direction in DIRECTIONS:
            peer = ("dense", dense(causal))
            yield comparison(name, f"full, row {backend}", peer, mine, inputs, causal, direction)


def experiments(quick: bool) -> Iterator[Comparison]:
    """Every row of the case; `quick` gives tiny ones of each group."""
    for group in (long, short, split, ring, blocks, tiled):
        yield from group(quick)
