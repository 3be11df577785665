"""Decode over a full ring buffer: beside reading its memory once, beside caches that grow, and beside the bare torch operations.

H=8, D=64. `seq_len` is the ring's size in tokens; `variant` says how many steps a call makes.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.calls import Calls, Make
from benchmarks.experiment import Labels, Targets
from benchmarks.peers.growing_caches import Step, installed
from longattn.attention import RingBufferAttention, RingBufferConfig

HEADS, HEAD_DIM = 8, 64
SHARE = 0.8
"""Of the bandwidth that a plain read of the same bytes reaches, at least."""
OVERHEAD_US = 30.0
"""Whole steps over a tiny ring, in Python and torch together, at most."""
LARGE = 512 << 20
"""Bytes of keys and values from which decode is judged by bandwidth."""


def tokens(n: int, batch: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of n tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, n, HEADS, HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    return q, k, v


def ring(size: int, batch: int, dtype: torch.dtype, filled: int | None = None) -> Step:
    """A step over a state that holds `filled` tokens, default `size`."""
    return ring_and_memory(size, batch, dtype, filled)[0]


def ring_and_memory(size: int, batch: int, dtype: torch.dtype, filled: int | None = None) -> tuple[Step, Tensor]:
    """The same, and the memory of its keys and values as float32 numbers, in a row."""
    config = RingBufferConfig(num_heads=HEADS, head_dim=HEAD_DIM, buffer_size=size, dropout=0.0)
    module = RingBufferAttention(config).eval()
    state = module.new_state(batch, dtype=dtype)
    _, k, v = tokens(size if filled is None else filled, batch, dtype)
    state.append(k, v, None)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return module(q, k, v, position=state.position, is_decoder=True, buffer_state=state)

    return step, state.kv.main.storage.view(torch.float32).view(-1)


def repeated(make: Callable[[], Step], batch: int, dtype: torch.dtype, steps: int) -> Make:
    """What is timed: so many steps in a row, under inference_mode."""

    def prepare() -> Callable[[], object]:
        step, token = make(), tokens(1, batch, dtype, seed=1)

        def call() -> None:
            with torch.inference_mode():
                for _ in range(steps):
                    step(*token)

        return call

    return prepare


Ring = Callable[[], tuple[Step, Tensor]]
"""A step over a full ring, and the ring's memory, made when first asked for: both sides of a row read the same bytes."""


def reads() -> dict[str, Callable[[Ring], Make]]:
    """Reading the bytes of a ring's keys and values once, in three ways."""

    def copied(x: Tensor, room: int = 1 << 18) -> Callable[[], object]:
        near = torch.empty(min(room, x.numel()))

        def call() -> None:
            # memcpy into a place that stays in the processor's cache: what is left is the read.
            for part in x.split(room):
                near[: part.numel()].copy_(part)

        return call

    def dotted(x: Tensor) -> Callable[[], object]:
        half = x.numel() // 2
        return lambda: torch.dot(x[:half], x[half:])

    return {
        "read-sum": lambda ring: lambda: ring()[1].sum,
        "read-dot": lambda ring: lambda: dotted(ring()[1]),
        "read-memcpy": lambda ring: lambda: copied(ring()[1]),
    }


def bare(size: int) -> Step:
    """The operations that any decode step makes, on tensors that are ready: two rows written, two products, a softmax."""
    keys, values = torch.randn(2, HEADS, size, HEAD_DIM)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys.select(1, 0).copy_(k[0, 0])
        values.select(1, 0).copy_(v[0, 0])
        scores = torch.bmm(keys, (q.view(HEADS, HEAD_DIM, 1)) * HEAD_DIM**-0.5).view(HEADS, 1, size)
        return torch.bmm(torch.softmax(scores, -1), values).view(q.shape)

    return step


def wrong(peer: Callable[[Tensor, Tensor], Step], dtype: torch.dtype) -> list[str]:
    """The gate: in a ring that is not full yet, both give the same; past its end, ours is the peer's over the window."""
    _, k, v = tokens(40, 2, dtype)
    mine, other = ring(50, 2, dtype, filled=40), peer(k, v)
    late, window = ring(30, 2, dtype, filled=40), peer(k[:, 11:], v[:, 11:])
    token = tokens(1, 2, dtype, seed=1)
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    pairs = {"growing": (mine(*token), other(*token)), "full": (late(*token), window(*token))}
    return [
        f"ours: {name}: off by {error:.1e}"
        for name, (got, expected) in pairs.items()
        if not (error := float((got.double() - expected.double()).abs().max())) <= tolerance
    ]


def experiments(quick: bool) -> Iterator[Calls]:
    """Every row of the case."""
    large = 1 << 16 if quick else LARGE
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield from _bandwidth(large // (2 * HEADS * HEAD_DIM * dtype.itemsize), dtype, quick)
    sizes = (32,) if quick else (4096, 32768)
    for size in sizes:
        for batch in (1, 8):
            for dtype in (torch.float32, torch.bfloat16):
                yield from _growing(size, batch, dtype)
    yield from _overhead(16, 10 if quick else 1000, quick)


def _bandwidth(size: int, dtype: torch.dtype, quick: bool) -> Iterator[Calls]:
    name = str(dtype).removeprefix("torch.")
    for peer, make in reads().items():
        # Lives as long as the row's two calls.
        shared: Ring = functools.cache(lambda: ring_and_memory(size, 1, dtype))
        yield Calls(
            name=f"bandwidth-{name}",
            labels=Labels("decode", "1 step b1", peer, name, size, True, "forward"),
            targets=Targets() if quick else Targets(ratio=SHARE),
            ours=repeated(lambda shared=shared: shared()[0], 1, dtype, 1),
            peer=make(shared),
            gate=lambda: wrong(installed()["torch.cat"], dtype),
        )


def _growing(size: int, batch: int, dtype: torch.dtype) -> Iterator[Calls]:
    name = str(dtype).removeprefix("torch.")
    for peer, make in installed().items():

        def filled(make: Callable[[Tensor, Tensor], Step] = make) -> Step:
            _, k, v = tokens(size, batch, dtype)
            return make(k, v)

        yield Calls(
            name=f"step-b{batch}-{name}",
            labels=Labels("decode", f"4 steps b{batch}", peer, name, size, True, "forward"),
            targets=Targets(),
            ours=repeated(lambda: ring(size, batch, dtype), batch, dtype, 4),
            peer=repeated(filled, batch, dtype, 4),
            gate=lambda make=make: wrong(make, dtype),
        )


def _overhead(size: int, steps: int, quick: bool) -> Iterator[Calls]:
    yield Calls(
        name="overhead",
        labels=Labels("decode", f"{steps} steps b1", "bare-operations", "float32", size, True, "forward"),
        targets=Targets() if quick else Targets(most_ms=OVERHEAD_US * steps / 1000),
        ours=repeated(lambda: ring(size, 1, torch.float32), 1, torch.float32, steps),
        peer=repeated(lambda: bare(size), 1, torch.float32, steps),
        gate=lambda: wrong(installed()["torch.cat"], torch.float32),
    )
