"""Presets with a pool, a lightweight pool or a buffer manager, beside the same preset without: the table of seeds/001, on ours.

The variant ends with the seeds' own figure as a ratio (theirs without over theirs with, on their GPU, for their code): 0.81x for a
pool on small fixed shapes, 0.85x for the second preset's, 1.03x lightweight, 0.34x for the manager, and 3.47x for the manager where
lengths vary. `fixed` is 1024 tokens, H=8, D=64, segments 256/512/1024 with rates 1/2/4. `varying` goes through lengths from 256 to
2048 in one call, each once, and returns the last; ratios are of the whole round.
"""

import functools
from collections.abc import Iterator, Sequence

from torch import Tensor

from benchmarks import gate
from benchmarks.comparison import Comparison, Contender, Inputs, pattern_oracle
from benchmarks.experiment import DIRECTIONS, Direction, Labels, Targets
from longattn.attention import PatternAttention
from longattn.attention.integrations.factory import create_attention

LIGHTWEIGHT = 0.98
"""What a lightweight pool may cost on fixed small shapes: 2 %."""

_FLAGS: tuple[tuple[str, str, dict[str, bool], float, float | None], ...] = (
    ("pool", "DilatedAttention", {"enable_memory_pool": True}, 0.81, None),
    ("pool", "ImprovedDilatedAttention", {"enable_memory_pool": True}, 0.85, None),
    (
        "lightweight",
        "ImprovedDilatedAttention",
        {"enable_memory_pool": True, "lightweight_pool": True},
        1.03,
        LIGHTWEIGHT,
    ),
    ("manager", "ImprovedDilatedAttentionV2", {"enable_buffer_manager": True}, 0.34, None),
    (
        "manager-readied",
        "ImprovedDilatedAttentionV2",
        {"enable_buffer_manager": True, "enable_preallocation": True},
        0.34,
        None,
    ),
)
"""(row, preset, flags, the seeds' ratio on fixed shapes, what ours should reach there)."""

_VARYING_SEED = 3.47


def round_of(module: gate.Attention, lengths: Sequence[int]) -> gate.Attention:
    """A call at each length, in order; the last one's output."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for length in lengths[:-1]:
            module(*(x[:, : min(length, x.shape[1])] for x in (q, k, v)))
        return module(q, k, v)

    return attention


def module_of(name: str, segments: Sequence[int], flags: dict[str, bool]) -> PatternAttention:
    """The preset of that name over these segments, rates 1, 2, 4."""
    module = create_attention(name, segment_lengths=segments, dilation_rates=(1, 2, 4), **flags)
    assert isinstance(module, PatternAttention)
    return module


def experiments(quick: bool) -> Iterator[Comparison]:
    """Fixed shapes forward and forward + backward, in float32 and bfloat16; then varying lengths, forward."""
    segments, fixed, varying = (
        ((32, 64, 128), 128, (32, 128, 64, 256))
        if quick
        else (
            (256, 512, 1024),
            1024,
            (256, 1792, 512, 1024, 768, 1536, 320, 2048),
        )
    )
    for dtype in ("float32", "bfloat16"):
        for row, name, flags, seed, target in _FLAGS:
            plain, module = module_of(name, segments, {}), module_of(name, segments, flags)
            truth = pattern_oracle(plain.pattern)
            sides = Contender(module, truth), Contender(plain, truth)
            build = functools.partial(_comparison, row=row, name=name, dtype=dtype, segments=segments)
            for direction in DIRECTIONS:
                goal = Targets(ratio=None if quick else target)
                yield build(kind="fixed", sides=sides, direction=direction, seq_len=fixed, seed=seed, targets=goal)
            rounds = Contender(round_of(module, varying), truth), Contender(round_of(plain, varying), truth)
            known = _VARYING_SEED if row.startswith("manager") else None
            yield build(
                kind="varying", sides=rounds, direction="forward", seq_len=varying[-1], seed=known, targets=Targets()
            )


def _comparison(
    *,
    row: str,
    name: str,
    dtype: str,
    segments: tuple[int, ...],
    kind: str,
    sides: tuple[Contender, Contender],
    direction: Direction,
    seq_len: int,
    seed: float | None,
    targets: Targets,
) -> Comparison:
    said = "" if seed is None else f", seeds {seed}x"
    labels = Labels("modules", f"{name} {row} {kind}{said}", "no-flags", dtype, seq_len, False, direction)
    key = f"{row}-{name}-{kind}"
    return Comparison(labels, Inputs(seq_len, dtype), *sides, targets, name=key, borders=segments)
