"""The step for which the seeds' authors made their manager: dilated attention of lengths that vary, with it and without.

    op-for-op   the pipeline of `benchmarks/peers/op_for_op.py`, its temporaries from a manager or from torch.empty
    default     `ImprovedDilatedAttentionV2`, which holds almost nothing but its output, with `enable_buffer_manager` or without

One call goes through every length once and returns the last; ratios are of the whole round. `short` is 256 to 2048
tokens over segments 256/512/1024, `long` 2048 to 32768 over 2048/4096/8192, rates 1, 2, 4, H=8, D=64. The seeds say
3.47x for such lengths, on their GPU, for their code; their authors later found the opposite.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from benchmarks.cases.modules import module_of, round_of
from benchmarks.comparison import Comparison, Contender, Inputs, pattern_oracle
from benchmarks.experiment import DIRECTIONS, Direction, Labels, Targets
from benchmarks.gate import Attention
from benchmarks.peers.op_for_op import Empty, from_torch, op_for_op_attention
from longattn.bufmgr import AttentionBufferManager
from longattn.patterncache import Dilated

NO_SLOWER = 0.98
"""What a manager may cost on the default path: 2 %."""
RATES = (1, 2, 4)
SEEDS = "seeds 3.47x"


@dataclass(frozen=True)
class Lengths:
    """A round: what is gone through, over which segments. The last length is the longest."""

    name: str
    lengths: tuple[int, ...]
    segments: tuple[int, ...]


SHORT = Lengths("short", (256, 1792, 512, 1024, 768, 1536, 320, 2048), (256, 512, 1024))
LONG = Lengths("long", (4096, 20480, 2048, 10240, 6144, 32768), (2048, 4096, 8192))
TINY = Lengths("tiny", (32, 128, 50, 256), (32, 64, 128))


def op_for_op(segments: Sequence[int], empty: Empty) -> Attention:
    """The pipeline over one source of temporaries."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return op_for_op_attention(q, k, v, segments, RATES, empty=empty)

    return attention


def pipeline_steps(lengths: Lengths) -> Comparison:
    """Op for op; nothing is promised here, where a manager has most to give."""
    segments = lengths.segments
    truth = pattern_oracle(Dilated(segments, RATES, heads="split"))
    with_manager, without = (
        Contender(round_of(op_for_op(segments, empty), lengths.lengths), truth)
        for empty in (AttentionBufferManager().empty, from_torch)
    )
    return _comparison("op-for-op", lengths, with_manager, without, Targets(), "forward")


def default_steps(lengths: Lengths, direction: Direction, targets: Targets) -> Comparison:
    """The default path."""
    ours, peer = (
        module_of("ImprovedDilatedAttentionV2", lengths.segments, flags)
        for flags in ({"enable_buffer_manager": True}, {})
    )
    truth = pattern_oracle(peer.pattern)
    with_manager, without = (Contender(round_of(module, lengths.lengths), truth) for module in (ours, peer))
    return _comparison("default", lengths, with_manager, without, targets, direction)


def _comparison(
    path: str, lengths: Lengths, ours: Contender, peer: Contender, targets: Targets, direction: Direction
) -> Comparison:
    longest = lengths.lengths[-1]
    labels = Labels(
        "buffers", f"step {path} {lengths.name}, {SEEDS}", "no manager", "float32", longest, False, direction
    )
    return Comparison(
        labels, Inputs(longest, "float32"), ours, peer, targets, f"step-{path}-{lengths.name}", lengths.segments
    )


def steps(quick: bool) -> Iterator[Comparison]:
    """Both paths, both rounds, forward; the short round of the default path with its backward too."""
    targets = Targets() if quick else Targets(ratio=NO_SLOWER)
    for lengths in (TINY,) if quick else (SHORT, LONG):
        yield pipeline_steps(lengths)
        for direction in DIRECTIONS[: 1 if lengths is LONG else 2]:
            yield default_steps(lengths, direction, targets)
