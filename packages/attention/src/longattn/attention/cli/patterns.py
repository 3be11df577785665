"""A pattern from its words on the command line."""

from __future__ import annotations

from argparse import Namespace

from longattn.patterncache import Dilated, Full, Pattern, Window, parse_pattern
from longattn.patterncache.spans import shortened

DEFAULT_LAYERS = 12
"""Layers of `for-length` where none are given."""


def pattern_of(options: Namespace) -> Pattern:
    """The pattern that `--pattern`, `--bidirectional`, `--length` and `--heads` name.

    Raises:
        ValueError: there is no such form, or a number in it is wrong.
    """
    text: str = options.pattern
    causal = not options.bidirectional
    if text.startswith("["):
        pattern = parse_pattern(text)
        return pattern.with_causal(False) if options.bidirectional else pattern
    kind, *parts = text.split(":")
    if kind == "full" and not parts:
        return Full(causal=causal)
    if kind == "window" and 1 <= len(parts) <= 2:
        size, sinks = _integer(text, parts[0]), _integer(text, parts[1]) if len(parts) == 2 else 0
        return Window(size, sinks=sinks, causal=causal)
    if kind == "dilated" and len(parts) == 2:
        segments, rates = (tuple(_integer(text, number) for number in part.split(",")) for part in parts)
        return Dilated(segments, rates, causal=causal)
    if kind == "for-length" and len(parts) <= 1:
        layers = _integer(text, parts[0]) if parts else DEFAULT_LAYERS
        return Dilated.for_length(options.length, layers=layers, num_heads=options.heads, causal=causal)
    raise ValueError(
        "--pattern must be full, window:SIZE[:SINKS], dilated:SEGMENTS:RATES, for-length[:LAYERS] or a canonical string "
        f"'[\"name\",{{...}}]', got {shortened(text)}"
    )


def _integer(text: str, number: str) -> int:
    if not number.strip().isdecimal():
        raise ValueError(f"--pattern must have integers after its name, got {shortened(number)} in {text!r}")
    return int(number)
