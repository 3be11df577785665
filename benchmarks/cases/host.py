"""What a call costs before it computes anything: tiny tensors, beside SDPA's own call in the same process.

B=1, 16 tokens, 2 heads of 16. A call makes a thousand of ours or of SDPA, so milliseconds read as microseconds a call. Run it with
`--threads 1`: a second thread waits for work that is over before it wakes.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.calls import Calls, Make
from benchmarks.experiment import Direction, Labels, Targets
from longattn.attention import (
    DilatedAttention,
    Ring,
    RingBufferAttention,
    RingBufferConfig,
    RingDilatedAttentionV3,
    pattern_attention,
)
from longattn.kernels import attend, fused_attention, prepare
from longattn.patterncache import Full

TOKENS, HEADS, HEAD_DIM, CALLS = 16, 2, 16, 1000
MOST = {
    "attend": 4.0,
    "fused_attention": 4.0,
    "pattern_attention": 5.0,
    "module": 6.0,
    "prepared": 2.5,
    "ring-of-four": 25.0,
    "decoder-step": 4.0,
}
"""Ours over SDPA's call, at most."""
FORWARD_BACKWARD_MOST = 4.0

sdpa = torch.nn.functional.scaled_dot_product_attention
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def tensors(*, by_head: bool = False, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in (batch, seq, heads, head_dim), or the same numbers in SDPA's (batch, heads, seq, head_dim)."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, TOKENS, HEADS, HEAD_DIM, generator=generator) for _ in range(3)]
    q, k, v = (x.transpose(1, 2).contiguous() if by_head else x for x in drawn)
    return (q.requires_grad_(grad), k.requires_grad_(grad), v.requires_grad_(grad))


def ours() -> dict[str, tuple[Call, bool]]:
    """Each way in, and whether it takes SDPA's layout. Every one computes full attention."""
    pattern, ring = Full(), Ring(size=4)
    module = DilatedAttention((TOKENS,), (1,)).eval()
    prepared = prepare(pattern, *tensors())
    return {
        "attend": (lambda q, k, v: attend(q, k, v, pattern).out, False),
        "fused_attention": (fused_attention, True),
        "pattern_attention": (lambda q, k, v: pattern_attention(q, k, v, pattern), False),
        "module": (module, False),
        "prepared": (lambda q, k, v: prepared(q, k, v).out, False),
        "ring-of-four": (lambda q, k, v: pattern_attention(q, k, v, pattern, schedule=ring), False),
    }


def forwards(call: Call, by_head: bool, calls: int) -> Make:
    """So many forwards."""

    def make() -> Callable[[], object]:
        given = tensors(by_head=by_head)

        def run() -> None:
            for _ in range(calls):
                call(*given)

        return run

    return make


def forward_backwards(call: Call, by_head: bool, calls: int) -> Make:
    """So many forwards with their backwards."""

    def make() -> Callable[[], object]:
        given = tensors(by_head=by_head, grad=True)
        grad = torch.ones_like(given[0])

        def run() -> None:
            for _ in range(calls):
                torch.autograd.grad(call(*given), given, grad)

        return run

    return make


def decoder_steps(calls: int) -> Make:
    """So many steps over a ring of as many tokens."""

    def make() -> Callable[[], object]:
        config = RingBufferConfig(num_heads=HEADS, head_dim=HEAD_DIM, buffer_size=TOKENS, dropout=0.0)
        module = RingBufferAttention(config).eval()
        state = module.new_state(1)
        q, k, v = (x[:, :1] for x in tensors())

        def run() -> None:
            with torch.inference_mode():
                for _ in range(calls):
                    module(q, k, v, is_decoder=True, buffer_state=state)

        return run

    return make


def wrong(call: Call, by_head: bool) -> Callable[[], list[str]]:
    """The gate: the same numbers as SDPA, twice, since the first call of a signature goes another way than the second."""

    def gate() -> list[str]:
        given = tensors(by_head=by_head)
        expected = sdpa(*tensors(by_head=True))
        expected = expected if by_head else expected.transpose(1, 2)
        errors = [float((call(*given) - expected).abs().max()) for _ in range(2)]
        return [f"ours: call {n}: off by {error:.1e}" for n, error in enumerate(errors, 1) if error > 2e-5]

    return gate


def experiments(quick: bool) -> Iterator[Calls]:
    """Every row of the case."""
    calls = 2 if quick else CALLS

    def row(
        name: str, direction: Direction, mine: Make, peer: Make, most: float, gate: Callable[[], list[str]]
    ) -> Calls:
        labels = Labels("host", name, "sdpa", "float32", TOKENS, False, direction)
        return Calls(f"{name}-{direction}", labels, Targets() if quick else Targets(ratio=1 / most), mine, peer, gate)

    for name, (call, by_head) in ours().items():
        gate = wrong(call, by_head)
        yield row(name, "forward", forwards(call, by_head, calls), forwards(sdpa, True, calls), MOST[name], gate)
        if name in ("attend", "pattern_attention", "module"):
            mine, peer = forward_backwards(call, by_head, calls), forward_backwards(sdpa, True, calls)
            yield row(name, "forward+backward", mine, peer, FORWARD_BACKWARD_MOST, gate)
    yield row("decoder-step", "forward", decoder_steps(calls), forwards(sdpa, True, calls), MOST["decoder-step"], list)
    preset = RingDilatedAttentionV3((TOKENS,), (1,), ring_size=4).eval()
    mine = forwards(preset, False, calls)
    yield row("ring-preset", "forward", mine, forwards(sdpa, True, calls), MOST["ring-of-four"], wrong(preset, False))
