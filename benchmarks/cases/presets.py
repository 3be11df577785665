"""Every preset beside the functional call of its own pattern and schedule: what a name costs.

8192 tokens, H=8, D=64 (embed_dim 512 for the multihead forms), segments 2048/4096/8192 with rates 1/2/4, float32, all
else as the preset's constructor has it. The presets are those that `longattn.attention.testing` lists. Modules hold no
gradient of their parameters here; both sides of a multihead row share them.

The functional side of a multihead preset is its projections, `pattern_attention`, LayerNorm and output projection
written out. The oracle does the same in float64.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gate
from benchmarks.cases.attention import RATES, SEGMENTS, branch_names
from benchmarks.comparison import Comparison, Contender, Inputs, pattern_oracle
from benchmarks.experiment import DIRECTIONS, Labels, Targets
from longattn.attention import MultiheadPatternAttention, PatternAttention, pattern_attention
from longattn.attention.testing import MULTIHEAD_PRESETS, PRESETS
from longattn.kernels import reference_attention
from longattn.patterncache import Rectangle, Span

OVERHEAD = 1.05
"""What a preset may cost, over the functional call."""

_TINY_SEGMENTS = (64, 128, 256)


def sides(preset: PatternAttention) -> tuple[Contender, Contender]:
    """(the preset, the functional call)."""
    pattern, schedule = preset.pattern, preset.schedule

    def functional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pattern_attention(q, k, v, pattern, schedule=schedule)

    truth = pattern_oracle(pattern)
    return Contender(preset, truth), Contender(functional, truth)


def multihead_sides(preset: MultiheadPatternAttention) -> tuple[Contender, Contender]:
    """(the preset, its parts in a row), called with query, key and value of (1, seq, embed_dim)."""
    pattern, schedule = preset.attention.pattern, preset.attention.schedule
    shape = (preset.num_heads, preset.head_dim)

    def functional(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, shape)
            for x, (weight, bias) in zip((query, key, value), preset.qkv_parameters(), strict=True)
        )
        return preset.out_proj(preset.norm(pattern_attention(q, k, v, pattern, schedule=schedule).flatten(2)))

    truth = functools.partial(multihead_truth, preset)
    return Contender(preset, truth), Contender(functional, truth)


@functools.lru_cache(maxsize=1)
def multihead_truth(preset: MultiheadPatternAttention, inputs: Inputs, rows: tuple[int, ...]) -> gate.Truth:
    """The multihead forward and its gradients in float64, for some rows of queries."""
    exact = copy.deepcopy(preset).double()
    *tensors, grad = inputs.tensors()
    query, key, value = (x.double().requires_grad_() for x in tensors)
    shape = (preset.num_heads, preset.head_dim)
    sampled = list(rows)
    q, k, v = (
        F.linear(x, weight, bias).unflatten(-1, shape)
        for x, (weight, bias) in zip((query[:, sampled], key, value), exact.qkv_parameters(), strict=True)
    )
    rectangle = Rectangle(
        num_heads=preset.num_heads, queries=tuple(Span(row, 1) for row in rows), keys=(Span(0, inputs.seq_len),)
    )
    counts = torch.tensor(preset.attention.pattern.counts(rectangle))
    out = exact.out_proj(exact.norm(reference_attention(q, k, v, counts).out.flatten(2)))
    dq, dk, dv = torch.autograd.grad(out, (query, key, value), grad[:, sampled].double())
    return gate.Truth(torch.tensor(sampled), out.detach(), dq[:, sampled], dk, dv)


def experiments(quick: bool) -> Iterator[Comparison]:
    """Each preset forward and forward + backward; at most 5 % over the functional call is promised."""
    seq_len, per_token = (256, (4, 16)) if quick else (8192, (8, 64))
    segments = _TINY_SEGMENTS if quick else SEGMENTS
    built: list[tuple[str, Inputs, tuple[Contender, Contender]]] = []
    # The table's types are the base classes, whose constructors take a pattern; a preset's takes branches.
    plain: dict[str, Callable[..., PatternAttention]] = {**PRESETS}
    multihead: dict[str, Callable[..., MultiheadPatternAttention]] = {**MULTIHEAD_PRESETS}
    for name, kind in plain.items():
        preset = kind(segment_lengths=segments, dilation_rates=RATES)
        built.append((name, Inputs(seq_len, "float32", per_token), sides(preset)))
    for name, kind in multihead.items():
        embed_dim = math.prod(per_token)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            preset = kind(embed_dim, per_token[0], segment_lengths=segments, dilation_rates=RATES)
        built.append((name, Inputs(seq_len, "float32", (embed_dim,)), multihead_sides(preset.requires_grad_(False))))
    targets = Targets(ratio=None if quick else round(1 / OVERHEAD, 3))
    variant = f"{branch_names(segments, RATES)} h{per_token[0]} d{per_token[1]}"
    for name, inputs, (mine, functional) in built:
        for direction in DIRECTIONS:
            labels = Labels("presets", f"{name} {variant}", "functional", "float32", seq_len, False, direction)
            yield Comparison(labels, inputs, mine, functional, targets, name=name, borders=segments)
