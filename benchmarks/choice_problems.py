"""The problems of `benchmarks.choice`: patterns x dtypes x head sizes x directions, long and short, each with what else computes it."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.cases.attention import RATES, SEGMENTS
from benchmarks.experiment import DIRECTIONS, Direction
from benchmarks.gate import Attention
from longattn.patterncache import BlockSparse, Dilated, Full, Pattern, Rectangle, Span, Window

DTYPES = ("float32", "bfloat16", "float16")
BLOCK = 128
_WORTH_COMPILING = 1024
HIDDEN = (0.5, 0.9, 0.98)


@dataclass(frozen=True)
class Problem:
    """One call: the last `queries` of `seq_len` tokens see by `pattern`."""

    name: str
    pattern: Pattern = field(repr=False, compare=False)
    dtype: str
    seq_len: int
    heads: int
    head_dim: int
    direction: Direction
    queries: int

    @property
    def key(self) -> str:
        """Name, dtype, sizes and direction."""
        sizes = f"{self.queries}x{self.seq_len}-h{self.heads}-d{self.head_dim}"
        return f"{self.name}-{self.dtype}-{sizes}-{self.direction}"

    @property
    def rectangle(self) -> Rectangle:
        """Who is asked about."""
        return Rectangle(self.heads, Span(self.seq_len - self.queries, self.queries), Span(0, self.seq_len))

    @functools.cached_property
    def seen(self) -> float:
        """Share of all (query, key) pairs that the pattern sees, each as often as it counts."""
        pairs = sum(b.pairs * b.heads.length for b in self.pattern.plan(self.rectangle).branches)
        return pairs / (self.heads * self.queries * self.seq_len)

    @property
    def dense(self) -> bool:
        """Whether dense attention computes the same."""
        return isinstance(self.pattern, Full)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and dO: always the same normal numbers."""
        generator = torch.Generator().manual_seed(0)
        lengths = (self.queries, self.seq_len, self.seq_len, self.queries)
        dtype = getattr(torch, self.dtype)
        q, k, v, grad = (torch.randn(1, n, self.heads, self.head_dim, generator=generator).to(dtype) for n in lengths)
        return q, k, v, grad


def problems() -> Iterator[Problem]:
    """All of them, in order: dense, windows, dilated, blocks, short calls."""
    sizes = itertools.product(DTYPES, (64, 128), (Full(), Full(causal=True)), DIRECTIONS)
    for dtype, head_dim, pattern, direction in sizes:
        yield Problem("causal" if pattern.causal else "full", pattern, dtype, 2048, 4, head_dim, direction, 2048)
    for dtype, size, direction in itertools.product(DTYPES, (64, 512), DIRECTIONS):
        yield Problem(f"window {size}", Window(size), dtype, 8192, 2, 64, direction, 8192)
    for dtype, causal, direction in itertools.product(DTYPES, (False, True), DIRECTIONS):
        name, pattern = f"longnet{' causal' * causal}", Dilated(SEGMENTS, RATES, causal=causal)
        yield Problem(name, pattern, dtype, 8192, 2, 64, direction, 8192)
    for dtype, direction in itertools.product(DTYPES[:2], DIRECTIONS):
        yield Problem("split", Dilated(SEGMENTS, RATES, heads="split"), dtype, 8192, 3, 64, direction, 8192)
    for dtype, hidden, direction in itertools.product(DTYPES[:2], HIDDEN, DIRECTIONS):
        pattern = BlockSparse(BLOCK, random_blocks(4096 // BLOCK, hidden))
        yield Problem(f"blocks {hidden:.0%} hidden", pattern, dtype, 4096, 2, 64, direction, 4096)
    for dtype, rows, heads, keys in itertools.product(DTYPES[:2], (1, 16), (1, 8), (512, 4096, 32768)):
        yield Problem("short", Full(causal=True), dtype, keys, heads, 64, "forward", rows)


def random_blocks(count: int, hidden: float) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """A random mask of blocks that hides that share; the diagonal is seen."""
    return (np.random.default_rng(0).random((count, count)) >= hidden) | np.eye(count, dtype=bool)


def tiny() -> Iterator[Problem]:
    """A few small ones for a smoke test."""
    for pattern, direction in ((Full(), "forward"), (Window(8), "forward+backward")):
        yield Problem(type(pattern).__name__, pattern, "float32", 64, 2, 16, direction, 64)  # type: ignore[arg-type]
    yield Problem("short", Full(causal=True), "float32", 64, 2, 16, "forward", 2)


def sdpa(problem: Problem) -> Attention:
    """torch's SDPA over the whole sequence, causal where the pattern is."""
    causal, rows, length = problem.pattern.causal, problem.queries, problem.seq_len
    # SDPA's own is_causal is about the first rows; one row that is the last sees everything.
    mask = None
    if causal and 1 < rows < length:
        mask = torch.ones(rows, length, dtype=torch.bool).tril(length - rows)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, is_causal=causal and rows == length
        )
        return out.transpose(1, 2)

    return attention


def flex(problem: Problem) -> Attention | None:
    """Compiled FlexAttention; None where it is no peer (no backward on CPUs, dilated patterns touch every block of its mask), and, so that
    compilers do not take an hour, in float16 and at other head sizes than 64.
    """
    seen, length = _seen(problem.pattern), problem.seq_len
    whole = problem.direction == "forward" and problem.queries == length >= _WORTH_COMPILING
    if seen is None or not whole or problem.dtype == "float16" or problem.head_dim != 64:
        return None
    blocks: BlockMask = create_block_mask(seen, None, None, length, length, device="cpu", BLOCK_SIZE=BLOCK)
    # Compiled for this problem alone: past a handful of forms torch stops compiling, and would run FlexAttention's slow form.
    torch._dynamo.reset()
    call = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = call(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=blocks)  # type: ignore[assignment]
        return out.transpose(1, 2)

    return attention


def _seen(pattern: Pattern) -> Callable[..., Tensor] | None:
    """The pattern as FlexAttention's mask function."""
    if isinstance(pattern, Full) and pattern.causal:
        return lambda b, h, i, j: j <= i
    if isinstance(pattern, Full):
        return lambda b, h, i, j: j >= 0
    if isinstance(pattern, Window):
        size = pattern.size
        return lambda b, h, i, j: (j <= i) & (j > i - size)
    if isinstance(pattern, BlockSparse):
        mask, size = torch.from_numpy(np.array(pattern.mask)), pattern.block_size
        return lambda b, h, i, j: mask[i // size, j // size]
    return None
