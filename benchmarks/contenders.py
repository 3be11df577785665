"""The sides that cases put against each other: longattn in its forms, and the peers. Each carries its oracle."""

import functools
import os
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from benchmarks import gate
from benchmarks.comparison import Contender, pattern_oracle
from benchmarks.peers import engines as other_engines
from benchmarks.peers.dense import dense_attention
from benchmarks.peers.fkodom_style import fkodom_style_attention
from benchmarks.peers.flex_permuted import flex_permuted_attention
from benchmarks.peers.flex_window import flex_window_attention
from benchmarks.peers.fma_peak import multiply_adds_of_attention
from benchmarks.peers.gathered_blocks import GatheredBlocks
from benchmarks.peers.torchscale_style import torchscale_style_attention
from longattn.attention import pattern_attention
from longattn.attention.schedules.base import Schedule
from longattn.patterncache import BlockSparse, Dilated, Full, Pattern, Window


def forced_level() -> str:
    """What a row of results adds to its variant where LONGATTN_NATIVE names a level of the native row: " avx2"; else nothing."""
    level = os.environ.get("LONGATTN_NATIVE", "")
    return f" {level}" if level not in ("", "0", "1") else ""


def in_float32(side: Contender) -> Contender:
    """The same on float32 copies of half-precision numbers; it converts them itself, each time."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return side.attention(q.float(), k.float(), v.float()).to(q.dtype)

    return replace(side, attention=attention)


def ours(pattern: Pattern, *, schedule: Schedule | None = None, backend: str | None = None) -> Contender:
    """`pattern_attention`, the functional call."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pattern_attention(q, k, v, pattern, schedule=schedule, backend=backend)

    return Contender(attention, pattern_oracle(pattern))


def dense(causal: bool) -> Contender:
    """torch's SDPA over the whole sequence."""
    return Contender(functools.partial(dense_attention, causal=causal), pattern_oracle(Full(causal=causal)))


def engines(dtype: str, causal: bool) -> dict[str, Contender]:
    """Dense attention of other engines that are installed here, forward only."""
    oracle = pattern_oracle(Full(causal=causal))
    return {
        name: Contender(functools.partial(attention, causal=causal), oracle)
        for name, attention in other_engines.installed(dtype).items()
    }


def torchscale_style(segments: Sequence[int], rates: Sequence[int], causal: bool) -> Contender:
    """The torchscale-style pipeline on the heads of `Dilated(heads="shared")`; checked with its merge differentiable."""

    def attention(merge_grad: bool) -> gate.Attention:
        return functools.partial(
            torchscale_style_attention,
            segment_lengths=segments,
            dilation_rates=rates,
            causal=causal,
            merge_grad=merge_grad,
        )

    pattern = Dilated(segments, rates, heads="shared", causal=causal)
    return Contender(attention(merge_grad=False), pattern_oracle(pattern), checked=attention(merge_grad=True))


def fkodom_style(segments: Sequence[int], rates: Sequence[int], causal: bool) -> Contender:
    """The fkodom-style pipeline; checked without its two divisions, which are no part of attention."""

    def attention(normalize: bool) -> gate.Attention:
        return functools.partial(
            fkodom_style_attention, segment_lengths=segments, dilation_rates=rates, causal=causal, normalize=normalize
        )

    pattern = Dilated(segments, rates, heads="split", causal=causal)
    return Contender(attention(normalize=True), pattern_oracle(pattern), checked=attention(normalize=False))


def flex_permuted(segments: Sequence[int], rates: Sequence[int], causal: bool) -> Contender:
    """FlexAttention on tokens sorted by residue."""
    attention = functools.partial(
        flex_permuted_attention, segment_lengths=segments, dilation_rates=rates, causal=causal
    )
    return Contender(attention, pattern_oracle(Dilated(segments, rates, heads="shared", causal=causal)))


def flex_window(size: int) -> Contender:
    """FlexAttention on a causal window."""
    return Contender(functools.partial(flex_window_attention, size=size), pattern_oracle(Window(size)))


def fma_peak(causal: bool) -> Contender:
    """As many multiply-adds as dense attention has, and nothing else; what the gate checks in its place is SDPA."""
    spin = functools.partial(multiply_adds_of_attention, causal=causal)
    return Contender(
        spin, pattern_oracle(Full(causal=causal)), checked=functools.partial(dense_attention, causal=causal)
    )


def gathered_blocks(pattern: BlockSparse) -> Contender:
    """Gather and SDPA by hand, for block masks without causality."""
    return Contender(GatheredBlocks(pattern.block_size, pattern.mask), pattern_oracle(pattern))
