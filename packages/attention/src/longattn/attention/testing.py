"""For tests of attention modules, ours and yours: the table of presets, and `check_schedule`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longattn.attention.functional import pattern_attention
from longattn.attention.integrations.catalog import MULTIHEAD_PRESETS, PRESET_FLAGS, PRESETS
from longattn.attention.modules import PatternAttention
from longattn.attention.multihead import MultiheadPatternAttention
from longattn.attention.schedules.base import Schedule
from longattn.attention.schedules.local import Local
from longattn.attention.sparse_config import SparsePatternConfig
from longattn.patterncache import Pattern

__all__ = [
    "FINAL",
    "MULTIHEAD_PRESETS",
    "PRESETS",
    "PRESET_FLAGS",
    "check_final",
    "check_schedule",
    "small_inputs",
    "small_preset",
]

FINAL = {PatternAttention: "forward", MultiheadPatternAttention: "forward"}
"""The forwards that nothing overrides."""


_SPARSE = SparsePatternConfig("bigbird", 0.3, block_size=4, local_window_size=4, num_global_tokens=1)


def small_preset(name: str, **options: Any) -> PatternAttention | MultiheadPatternAttention:
    """The preset of that name over segments 8, 16 at rates 1, 2, with any options.

    Multihead ones have 16 features in 2 heads; block-sparse ones blocks of 4, so that they hide something.
    """
    options = {"segment_lengths": (8, 16), "dilation_rates": (1, 2)} | options
    if name.startswith("BlockSparse"):
        options = {"sparse_config": _SPARSE} | options
    return MULTIHEAD_PRESETS[name](16, 2, **options) if name in MULTIHEAD_PRESETS else PRESETS[name](**options)


def small_inputs(name: str, length: int = 21, **options: Any) -> tuple[Tensor, ...]:
    """What `small_preset(name)` is called with: (1, length, 16) once, or (1, length, 2, 8) three times. Options of torch.randn."""
    if name in MULTIHEAD_PRESETS:
        return (torch.randn(1, length, 16, **options),)
    return tuple(torch.randn(1, length, 2, 8, **options) for _ in range(3))


def check_final(cls: type[nn.Module]) -> None:
    """Assert that a preset configures: its forward is that of the class it comes from."""
    base = next(b for b in FINAL if issubclass(cls, b))
    assert cls.forward is base.forward, f"{cls.__name__} overrides forward"


def check_schedule(
    schedule: Schedule,
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tolerance: float = 1e-10,
    *,
    is_causal: bool | None = None,
    softmax_scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    backend: str | None = None,
    q_start: int | None = None,
) -> None:
    """Assert that a schedule gives what `Local` gives on float64 inputs: out, lse and gradients. Options as in `pattern_attention`."""

    def run(chosen: Schedule) -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = pattern_attention(
            inputs[0],
            inputs[1],
            inputs[2],
            pattern,
            is_causal=is_causal,
            softmax_scale=softmax_scale,
            key_padding_mask=key_padding_mask,
            attention_mask=attention_mask,
            backend=backend,
            q_start=q_start,
            schedule=chosen,
            return_lse=True,
        )
        loss = out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).sum()
        return [out, lse, *torch.autograd.grad(loss, inputs)]

    for actual, expected in zip(run(schedule), run(Local()), strict=True):
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
