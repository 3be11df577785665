"""Tiles of a ring buffer as they were tuned, beside the ones that a config has when nothing is said: issue 19 asks for 1.1x somewhere.

Calls of several queries from an empty state, causal, eight heads; tuning is not timed, and its choice is kept on the machine.
"""

from collections.abc import Callable, Iterator

import torch

from benchmarks.calls import Calls
from benchmarks.experiment import Labels, Targets
from longattn.attention import RingBufferAttention, RingBufferConfig

SHAPES = ((8, 64, 512, 2048, "bfloat16"), (8, 64, 1024, 2048, "float32"), (4, 32, 4096, 4096, "float32"))
"""(heads, head_dim, window, tokens of a call, dtype)."""
AT_LEAST = 1.1


def _module(heads: int, head_dim: int, window: int) -> RingBufferAttention:
    config = RingBufferConfig(num_heads=heads, head_dim=head_dim, buffer_size=window, dropout=0.0)
    return RingBufferAttention(config).eval()


def _tensors(heads: int, head_dim: int, tokens: int, dtype: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 1, tokens, heads, head_dim, generator=generator)
    return drawn.to(getattr(torch, dtype)).unbind()


def _call(shape: tuple[int, int, int, int, str], tune: bool) -> Callable[[], object]:
    heads, head_dim, window, tokens, dtype = shape
    module, given = _module(heads, head_dim, window), _tensors(heads, head_dim, tokens, dtype)
    if tune:
        module.tune(tokens, dtype=given[0].dtype)

    def run() -> object:
        with torch.no_grad():
            return module(*given)[0]

    return run


def _differing(shape: tuple[int, int, int, int, str]) -> list[str]:
    """The gate: both give the same, beyond rounding."""
    ours, peer = (_call(shape, tune)() for tune in (True, False))
    most = 2e-2 if shape[-1] == "bfloat16" else 2e-5
    error = float((ours.double() - peer.double()).abs().max())  # type: ignore[attr-defined]
    return [] if error <= most else [f"tuned tiles change the result by {error:.1e}"]


def experiments(quick: bool) -> Iterator[Calls]:
    """Every row of the case; `quick` gives a tiny one without a target."""
    for shape in ((2, 16, 32, 64, "float32"),) if quick else SHAPES:
        heads, head_dim, window, tokens, dtype = shape
        yield Calls(
            name=f"tuned-{dtype}-w{window}",
            labels=Labels(
                "tiles",
                f"ring of {window}, tuned, h{heads} d{head_dim}",
                "default tiles",
                dtype,
                tokens,
                True,
                "forward",
            ),
            targets=Targets() if quick else Targets(ratio=AT_LEAST),
            ours=lambda shape=shape: _call(shape, True),
            peer=lambda shape=shape: _call(shape, False),
            gate=lambda shape=shape: _differing(shape),
        )
