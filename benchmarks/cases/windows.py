"""Narrow bands on the native CPU row: causal windows of 64, 256 and 512 at 8192 tokens.

B=1, H=8, D=64, normal inputs. `share` is the row itself on `Full(causal=True)`: the ratio that is promised is what the pairs of the
window cost there, and half as much again. Dense SDPA and FlexAttention are the peers; FlexAttention has no backward on CPUs.
"""

import itertools
from collections.abc import Iterator

from benchmarks.comparison import Comparison, Inputs
from benchmarks.contenders import dense, flex_window, forced_level, ours
from benchmarks.experiment import DIRECTIONS, Direction, Labels, Targets
from longattn.patterncache import Full, Window

_SIZES = (64, 256, 512)
_MOST_OVER_SHARE = 1.5


def _targets(inputs: Inputs, size: int, peer: str, direction: Direction) -> Targets:
    """Issue 19's: a window of 64 against its share of causal attention; 512 in bfloat16 against FlexAttention."""
    if peer == "share" and size == 64 and direction == "forward":
        length = inputs.seq_len
        share = (size * length - size * (size - 1) / 2) / (length * (length + 1) / 2)
        return Targets(ratio=1 / (_MOST_OVER_SHARE * share))
    if peer == "flex-window" and size == 512 and inputs.dtype == "bfloat16":
        return Targets(ratio=1.0)
    return Targets()


def experiments(quick: bool) -> Iterator[Comparison]:
    """Every row of the case; `quick` gives tiny ones without targets."""
    for size, dtype, direction in itertools.product(_SIZES, ("float32", "bfloat16"), DIRECTIONS):
        inputs = Inputs(256, dtype, (4, 16)) if quick else Inputs(8192, dtype)
        peers = {"share": ours(Full(causal=True), backend="native"), "dense": dense(True)}
        if direction == "forward" and not quick:
            peers["flex-window"] = flex_window(size)
        heads, head_dim = inputs.per_token
        for peer, contender in peers.items():
            variant = f"window {size} h{heads} d{head_dim}{forced_level()}"
            yield Comparison(
                Labels("windows", variant, peer, dtype, inputs.seq_len, True, direction),
                inputs,
                ours(Window(size), backend="native"),
                contender,
                Targets() if quick else _targets(inputs, size, peer, direction),
                name=f"window-{size}",
                borders=(size,),
            )
