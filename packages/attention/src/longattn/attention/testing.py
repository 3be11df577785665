"""For tests of attention modules, ours and yours: the table of presets, and `check_schedule`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longattn.attention import presets
from longattn.attention.functional import pattern_attention
from longattn.attention.modules import MultiheadPatternAttention, PatternAttention
from longattn.attention.schedule import Local, Schedule
from longattn.patterncache import Pattern

PRESETS: dict[str, type[PatternAttention]] = {
    cls.__name__: cls for cls in (presets.DilatedAttention, presets.ImprovedDilatedAttention)
}
"""Presets called as (query, key, value)."""

MULTIHEAD_PRESETS: dict[str, type[MultiheadPatternAttention]] = {
    cls.__name__: cls for cls in (presets.MultiheadDilatedAttention, presets.ImprovedMultiheadDilatedAttention)
}
"""Presets called as (query) with an embedding."""

FINAL = {PatternAttention: "forward", MultiheadPatternAttention: "forward"}
"""The forwards that nothing overrides."""


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

    for found, expected in zip(run(schedule), run(Local()), strict=True):
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
