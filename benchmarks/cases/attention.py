"""Dilated attention beside dense SDPA and the torchscale-style pipeline, forward and forward + backward.

B=1, H=8, D=64, segments 2048/4096/8192 with rates 1/2/4, `heads="shared"`, normal inputs. Dense attention computes
something else (every pair), so the gate holds each side to the oracle of its own pattern; the torchscale-style pipeline
computes the same outputs, and is held to the same oracle, its gradients with differentiable merge weights.
"""

import itertools
from collections.abc import Iterator

from benchmarks.comparison import Comparison, Inputs
from benchmarks.contenders import dense, ours, torchscale_style
from benchmarks.experiment import DIRECTIONS, Direction, Labels, Targets
from longattn.patterncache import Dilated

RATES = (1, 2, 4)
SEGMENTS = (2048, 4096, 8192)
_TINY_SEGMENTS = (64, 128, 256)


def branch_names(segments: tuple[int, ...], rates: tuple[int, ...]) -> str:
    """Branches as rows of results spell them: segment/rate, joined by +."""
    return "+".join(f"{s}/{r}" for s, r in zip(segments, rates, strict=True))


def dilated(
    inputs: Inputs,
    causal: bool,
    peer: str,
    direction: Direction,
    targets: Targets,
    segments: tuple[int, ...] = SEGMENTS,
) -> Comparison:
    """Ours on a dilated pattern beside a peer, "dense" or "torchscale-style"."""
    heads, head_dim = inputs.per_token
    variant = f"dilated {branch_names(segments, RATES)} h{heads} d{head_dim}"
    return Comparison(
        labels=Labels("attention", variant, peer, inputs.dtype, inputs.seq_len, causal, direction),
        inputs=inputs,
        ours=ours(Dilated(segments, RATES, heads="shared", causal=causal)),
        peer=dense(causal) if peer == "dense" else torchscale_style(segments, RATES, causal),
        targets=targets,
        borders=segments,
    )


def _targets(inputs: Inputs, peer: str, direction: Direction) -> Targets:
    """What was promised for this machine: issue 2's figures, for float32 only."""
    if inputs.dtype != "float32":
        return Targets()
    growth = 0.6 if direction == "forward" else 2.2
    if peer == "torchscale-style":
        return Targets(ratio=0.95, growth=growth)
    at_length = inputs.seq_len == 32768 and direction == "forward"
    return Targets(ratio=8.0 if at_length else None, growth=growth)


def experiments(quick: bool) -> Iterator[Comparison]:
    """Every row of the case; `quick` gives a few tiny ones without targets."""
    if quick:
        for causal, direction in itertools.product((True, False), DIRECTIONS):
            inputs = Inputs(256, "float32", (4, 16))
            yield dilated(inputs, causal, "torchscale-style", direction, Targets(), _TINY_SEGMENTS)
        yield dilated(Inputs(256, "bfloat16"), True, "dense", "forward", Targets(), _TINY_SEGMENTS)
        return
    for seq_len, dtype, causal in itertools.product((8192, 32768), ("float32", "bfloat16"), (False, True)):
        inputs = Inputs(seq_len, dtype)
        for peer, direction in itertools.product(("torchscale-style", "dense"), DIRECTIONS):
            if peer == "dense" and direction == "forward+backward" and seq_len > 8192:
                continue  # dense backward at this length takes minutes a call and tells nothing new
            yield dilated(inputs, causal, peer, direction, _targets(inputs, peer, direction))
