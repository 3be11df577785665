"""Long-context attention modules for torch: one forward over patterns, schedules and presets."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING

logging.getLogger("longattn").addHandler(logging.NullHandler())

if TYPE_CHECKING:
    from longattn.attention.functional import pattern_attention
    from longattn.attention.modules import MultiheadPatternAttention, PatternAttention
    from longattn.attention.presets import (
        DilatedAttention,
        ImprovedDilatedAttention,
        ImprovedMultiheadDilatedAttention,
        MultiheadDilatedAttention,
    )
    from longattn.attention.ring import Ring
    from longattn.attention.schedule import Local, Schedule
    from longattn.attention.weights import attention_weights

_HOME = {
    "DilatedAttention": "presets",
    "ImprovedDilatedAttention": "presets",
    "ImprovedMultiheadDilatedAttention": "presets",
    "Local": "schedule",
    "MultiheadDilatedAttention": "presets",
    "MultiheadPatternAttention": "modules",
    "PatternAttention": "modules",
    "Ring": "ring",
    "Schedule": "schedule",
    "attention_weights": "weights",
    "pattern_attention": "functional",
}

__all__ = [
    "DilatedAttention",
    "ImprovedDilatedAttention",
    "ImprovedMultiheadDilatedAttention",
    "Local",
    "MultiheadDilatedAttention",
    "MultiheadPatternAttention",
    "PatternAttention",
    "Ring",
    "Schedule",
    "attention_weights",
    "pattern_attention",
]

if not TYPE_CHECKING:

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
